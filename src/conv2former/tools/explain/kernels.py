"""The learned depthwise kernels of the modulation, drawn as sheets."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torchvision.utils import make_grid

from conv2former.tools.explain.opening import Block, choose_blocks, open_explained
from conv2former.tools.explain.sheets import save

SHOWN = 0.999  # fraction of the weights that lie within the colour scale; the few beyond it have its end colours


def kernel_sheet(block: Block) -> Figure:
    """All kernels of a block, those with the largest norm first, on one scale around 0."""
    weight = block.mod.dwconv.weight.detach().float().cpu().numpy()[:, 0]
    order = np.argsort(-np.square(weight).sum(axis=(1, 2)), kind="stable")
    grid = tiled(weight[order])
    most = float(np.quantile(np.abs(weight), SHOWN)) or 1.0
    side = min(max(len(grid) / 30, 4), 12)
    figure = Figure(figsize=(side * grid.shape[1] / len(grid) + 1, side + 0.5), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    drawn = axes.imshow(grid, cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
    count, height, width = weight.shape
    axes.set_title(f"{block}: {count} kernels of {height} x {width}, largest norm first", fontsize=9)
    figure.colorbar(drawn, shrink=0.7, extend="both").ax.tick_params(labelsize=7)
    return figure


def tiled(kernels: np.ndarray) -> np.ndarray:
    """Kernels (C, k, k) side by side, about as many across as down, with a line of NaN between them and around."""
    columns = math.ceil(math.sqrt(len(kernels)))
    return make_grid(torch.from_numpy(kernels)[:, None], nrow=columns, padding=1, pad_value=math.nan)[0].numpy()


def draw_kernels(
    checkpoint: Path, out: Path, *, stages: list[int] | None = None, blocks: list[int] | None = None
) -> list[Path]:
    """``conv2former explain kernels``: writes and returns a sheet ``kernels.stageS.blockB.png`` for each block.

    The model is of any task, on a Conv2Former. ``stages`` and ``blocks`` are as in ``choose_blocks``.

    Raises:
        UserError: A checkpoint, a stage or a block that is not there, a folder that cannot be written.
    """
    files = []
    for block in choose_blocks(open_explained(checkpoint, device="cpu"), stages, blocks):
        files.append(out / f"kernels.stage{block.stage}.block{block.number}.png")
        save(kernel_sheet(block), files[-1])
    return files
