"""The modulation's weights A = DWConv(GELU(W1 X)) and modulated values A * V over images (Eqs. 3-5).

They are the network's counterpart of attention maps (Sec. 3.2): A says at every position, for every channel, how much
of the value there goes on. A has as many maps as the block has channels. The sheets show the root mean square over the
channels, of A and of A * V. They also show, with their signs, the single channels of A that vary most over the
positions (standard deviation). The summing and normalising variants of ``conv2former.models.ablations`` show the A that
goes into their combination, and what comes out of it in the place of A * V.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from conv2former.models.ablations import WeightingMod
from conv2former.tools.explain.opening import Block, Explained, choose_blocks, open_explained
from conv2former.tools.explain.sheets import each_image, over, sheet


class Modulation(NamedTuple):
    """What one block did with one image: A, and A * V or what its variant makes of the two, (C, h, w) of its stage."""

    block: Block
    a: Tensor
    z: Tensor


@torch.no_grad()
def modulations(model: Explained, image: Tensor, blocks: Sequence[Block]) -> list[Modulation]:
    """A and A * V of blocks for an image (1, 3, H, W).

    A is computed once more from the layer's input (``modulation_weights``): in the forward pass it is a part of a fused
    operation and never a tensor of its own.
    """
    inputs: dict[Any, Tensor] = {}
    with ExitStack() as hooks:
        for block in blocks:
            hook = block.mod.register_forward_pre_hook(lambda mod, given: inputs.update({mod: given[0]}))
            hooks.enter_context(hook)
        model.task.trunk(image)
    found = []
    for block in blocks:
        x, mod = inputs[block.mod], block.mod
        a, v = mod.modulation_weights(x), mod.w2(x)
        z = mod.combine(a, v) if isinstance(mod, WeightingMod) else a * v
        found.append(Modulation(block, *(part[0].permute(2, 0, 1).float() for part in (a, z))))
    return found


def energy(x: Tensor) -> Tensor:
    """The root mean square over the channels, (C, h, w) -> (h, w)."""
    return x.square().mean(dim=0).sqrt()


def liveliest(a: Tensor, count: int) -> list[int]:
    """The channels of (C, h, w) that vary most over the positions, most first."""
    return a.flatten(1).std(dim=1, correction=0).topk(min(count, len(a))).indices.tolist()


def enlarged(values: Tensor, padded: Sequence[int], view: Sequence[int]) -> np.ndarray:
    """A map (h, w) at the size (H, W) of the network's input by bilinear interpolation, the padding cut off."""
    size: Any = tuple(padded)
    large = F.interpolate(values[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    return large[: view[0], : view[1]].cpu().numpy()


def map_panels(
    model: Explained, image: Image.Image, blocks: Sequence[Block], *, channels: int
) -> list[tuple[str, list[tuple[str, np.ndarray]]]]:
    """A row for each block, with its name: the image, all of A, single channels of A, all of A * V.

    A panel is a title and (h, w, 3) of uint8.
    """
    view = model.task.preprocess(image).pixels
    batch = model.task.inputs(view)

    def drawn(values: Tensor, *, signed: bool = False) -> np.ndarray:
        return over(view, enlarged(values, batch.shape[-2:], view.shape[:2]), signed=signed)

    rows = []
    for block, a, z in modulations(model, batch, blocks):
        panels = [("image", view), ("A, all channels", drawn(energy(a)))]
        panels += [(f"A, channel {channel}", drawn(a[channel], signed=True)) for channel in liveliest(a, channels)]
        combined = "A and V combined" if isinstance(block.mod, WeightingMod) else "A * V, all channels"
        height, width = a.shape[1:]
        rows.append((f"{block}\n{height} x {width}", [*panels, (combined, drawn(energy(z)))]))
    return rows


def run_maps(
    checkpoint: Path,
    inputs: Sequence[Path],
    *,
    out: Path,
    stages: list[int] | None = None,
    blocks: list[int] | None = None,
    channels: int = 3,
    device: str = "auto",
) -> int:
    """``conv2former explain maps``: a sheet ``NAME.maps.png`` for each image; returns the exit status.

    The model is of any task, on a Conv2Former. ``stages`` and ``blocks`` are as in ``choose_blocks``; ``channels`` is
    how many single channels of A are drawn.

    Raises:
        UserError: A checkpoint, a stage or a block that is not there, no images, a folder that cannot be written.
    """
    model = open_explained(checkpoint, device=device)
    chosen = choose_blocks(model, stages, blocks)
    fields = dict(blocks=[[block.stage, block.number] for block in chosen])

    def explain(image: Image.Image) -> tuple[dict[str, Any], Figure]:
        return fields, sheet(map_panels(model, image, chosen, channels=channels))

    return each_image(inputs, out, "maps", explain)
