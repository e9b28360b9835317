"""The learned depthwise kernels of the modulation, drawn as sheets."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from conv2former.tools.explain.opening import Place, choose_blocks, open_explained
from conv2former.tools.explain.sheets import save

SHOWN = 0.999  # share of the taps that lie within the colour scale; the few beyond it have its end colours


def kernel_sheet(place: Place) -> Figure:
    """All kernels of a block, those with the largest norm first, on one scale around 0."""
    taps = place.mod.dwconv.weight.detach().float().cpu().numpy()[:, 0]
    order = np.argsort(-np.square(taps).sum(axis=(1, 2)), kind="stable")
    grid = tiled(taps[order])
    limit = float(np.quantile(np.abs(taps), SHOWN)) or 1.0
    side = min(max(len(grid) / 30, 4), 12)
    figure = Figure(figsize=(side * grid.shape[1] / len(grid) + 1, side + 0.5), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    image = axes.imshow(grid, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set_title(f"{place}: {len(taps)} kernels of {taps.shape[1]} x {taps.shape[2]}, largest norm first", fontsize=9)
    figure.colorbar(image, shrink=0.7, extend="both").ax.tick_params(labelsize=7)
    return figure


def tiled(kernels: np.ndarray) -> np.ndarray:
    """Kernels (C, k, k) side by side, about as many across as down, with a line of NaN between them and around."""
    count, side, _ = kernels.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cells = np.full((rows * columns, side + 1, side + 1), np.nan)
    cells[:count, 1:, 1:] = kernels
    grid = cells.reshape(rows, columns, side + 1, side + 1).swapaxes(1, 2).reshape(rows * (side + 1), -1)
    return np.pad(grid, ((0, 1), (0, 1)), constant_values=np.nan)


def draw_kernels(
    checkpoint: Path, out: Path, *, stages: list[int] | None = None, blocks: list[int] | None = None
) -> list[Path]:
    """``conv2former explain kernels``: a sheet ``kernels.stageS.blockB.png`` for each block.

    Args:
        checkpoint: Run folder or saved model of any task, on a Conv2Former.
        out: Folder for the sheets.
        stages: See ``choose_blocks``.
        blocks: See ``choose_blocks``.

    Returns:
        The sheets.

    Raises:
        UserError: A checkpoint, a stage or a block that is not there, a folder that cannot be written.
    """
    files = []
    for place in choose_blocks(open_explained(checkpoint, device="cpu"), stages, blocks):
        path = out / f"kernels.stage{place.stage}.block{place.block}.png"
        save(kernel_sheet(place), path)
        files.append(path)
    return files
