"""The modulation's weights A = DWConv(GELU(W1 X)) and modulated values A * V over pictures (Eqs. 3-5).

They are the network's counterpart of attention maps (Sec. 3.2): A says at every position, for every channel, how much
of the value there goes on. A has as many maps as the block has channels. Drawn are the root of the mean square over the
channels, of A and of A * V, and the single channels of A that differ most from place to place (standard deviation over
the positions), with their signs, around 0. The summing and normalising variants of
``conv2former.models.ablations`` show the A that goes into their combination, and what comes out of it in the place of
A * V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from conv2former.models.ablations import WeightingMod
from conv2former.tools.explain.opening import Explained, Place, choose_blocks, open_explained
from conv2former.tools.explain.sheets import each_picture, over, sheet


@dataclass(frozen=True)
class Modulation:
    """What one block did with one picture, at the resolution of its stage.

    Attributes:
        place: The block.
        a: The weights A, (C, h, w).
        z: A * V, or what the block's variant makes of the two, (C, h, w).
    """

    place: Place
    a: Tensor
    z: Tensor


def modulations(model: Explained, image: Tensor, places: Sequence[Place]) -> list[Modulation]:
    """A and A * V of blocks for a picture (1, 3, H, W).

    A is computed once more from the layer's input (``modulation_weights``): in the forward pass it is a part of a fused
    operation and never a tensor of its own.
    """
    inputs: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(module: Any, given: tuple[Tensor]) -> None:
            inputs[index] = given[0]

        return hook

    handles = [place.mod.register_forward_pre_hook(keep(index)) for index, place in enumerate(places)]
    try:
        with torch.no_grad():
            model.task.trunk(image)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    with torch.no_grad():
        for index, place in enumerate(places):
            x, mod = inputs[index], place.mod
            a, v = mod.modulation_weights(x), mod.w2(x)
            z = mod.combine(a, v) if isinstance(mod, WeightingMod) else a * v
            found.append(Modulation(place, *(part[0].permute(2, 0, 1).float() for part in (a, z))))
    return found


def energy(x: Tensor) -> Tensor:
    """The root of the mean square over the channels, (C, h, w) -> (h, w)."""
    return x.square().mean(dim=0).sqrt()


def liveliest(a: Tensor, count: int) -> list[int]:
    """The channels of (C, h, w) that differ most from place to place, most first."""
    return a.flatten(1).std(dim=1, correction=0).topk(min(count, len(a))).indices.tolist()


def enlarged(values: Tensor, padded: Sequence[int], view: Sequence[int]) -> np.ndarray:
    """A map (h, w) at the size (H, W) of the network's input by bilinear interpolation, the padding cut off."""
    size: Any = tuple(padded)
    large = F.interpolate(values[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    return large[: view[0], : view[1]].cpu().numpy()


def map_panels(
    model: Explained, picture: Image.Image, places: Sequence[Place], *, channels: int
) -> list[tuple[str, list[tuple[str, np.ndarray]]]]:
    """A row for each block, with its name: the picture, all of A, single channels of A, all of A * V.

    A panel is a title and (h, w, 3) of uint8.
    """
    view = model.task.preprocess(picture).pixels
    image = model.task.inputs(view)

    def drawn(values: Tensor, *, signed: bool = False) -> np.ndarray:
        return over(view, enlarged(values, image.shape[-2:], view.shape[:2]), signed=signed)

    rows = []
    for found in modulations(model, image, places):
        summing = isinstance(found.place.mod, WeightingMod)
        panels = [("picture", view), ("A, all channels", drawn(energy(found.a)))]
        panels += [
            (f"A, channel {channel}", drawn(found.a[channel], signed=True)) for channel in liveliest(found.a, channels)
        ]
        panels.append(("A and V combined" if summing else "A * V, all channels", drawn(energy(found.z))))
        height, width = found.a.shape[1:]
        rows.append((f"{found.place}\n{height} x {width}", panels))
    return rows


def map_sheet(model: Explained, picture: Image.Image, places: Sequence[Place], *, channels: int) -> Figure:
    """``map_panels`` on one sheet."""
    return sheet(map_panels(model, picture, places, channels=channels))


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
    """``conv2former explain maps``: a sheet ``NAME.maps.png`` for each picture; returns the exit status.

    Args:
        checkpoint: Run folder or saved model of any task, on a Conv2Former.
        inputs: Picture files, and folders of them.
        out: Folder for the sheets.
        stages: See ``choose_blocks``.
        blocks: See ``choose_blocks``.
        channels: Single channels of A that are drawn.
        device: 'auto', 'cpu', 'cuda', ...

    Raises:
        UserError: A checkpoint, a stage or a block that is not there, no pictures, a folder that cannot be written.
    """
    model = open_explained(checkpoint, device=device)
    places = choose_blocks(model, stages, blocks)
    fields = dict(blocks=[[place.stage, place.block] for place in places])

    def explain(picture: Image.Image) -> tuple[dict[str, Any], Figure]:
        return fields, map_sheet(model, picture, places, channels=channels)

    return each_picture(inputs, out, "maps", explain)
