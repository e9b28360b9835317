"""Effective receptive fields: how far from the centre of a map the pixels lie that change it.

The measure is that of Ding et al., "Scaling Up Your Kernels to 31x31" (RepLKNet), arXiv:2203.06717, Sec. 5 and
Appendix, as their published scripts compute it (``erf/visualize_erf.py`` and ``erf/analyze_erf.py``):

1. A picture is brought to a square by bicubic interpolation, whatever its shape, and normalised.
2. The channels of the map's central position, negative ones as 0, are summed. The gradient of the sum with respect to
   the picture, negative parts as 0 again, is summed over the picture's three channels: a score for each pixel.
3. Scores are averaged over pictures.
4. The side of the smallest square around the picture's centre that holds more than a share of all scores: their table
   takes ``log10(score + 1)`` for score here ("log10" in ours).

A map with an even number of positions on a side has none in the middle: the one right of and below it is taken, half a
stride off.

Ours are: the map of every stage and not of the last alone; the same side for the scores themselves ("scores"), which a
factor on a network's output does not change while it does change the logarithm's; squares of one pixel, and the whole
picture where no smaller square suffices (theirs start at three pixels and give nothing); 224 pixels by default where
they take 1024; pictures evenly spaced over all that there are. Networks compute in float32 and in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from conv2former.data.images import decode, find_images
from conv2former.data.loading import Normalizer
from conv2former.errors import UserError, one_line
from conv2former.tools.explain.subjects import Subject

PICTURES = 50  # of the measure; fewer are noted
SHARES = {"50": 0.5, "99": 0.99}


@dataclass(frozen=True)
class FieldRow:
    """The field of one stage.

    Attributes:
        model: As the user named it.
        weights: 'untrained', 'pretrained' or 'trained'.
        stage: From 1.
        stride: Of the stage's map, pixels.
        size: Side of the pictures, pixels.
        images: Pictures averaged over.
        scores: Side of the square that holds a share (in percent) of the scores, pixels.
        log10: The same of ``log10(score + 1)``, as in RepLKNet's table.
        notes: What to know of the numbers.
    """

    model: str
    weights: str
    stage: int
    stride: int
    size: int
    images: int
    scores: dict[str, int]
    log10: dict[str, int]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The row as a dictionary."""
        return asdict(self)


def contributions(network: Callable[[Tensor], Sequence[Tensor]], image: Tensor) -> list[np.ndarray]:
    """Step 2 of the measure for each map of a network.

    Args:
        network: (1, 3, H, W) -> maps (1, C, h, w).
        image: A normalised picture, (1, 3, H, W).

    Returns:
        Scores (H, W) of float64, not negative, for each map.
    """
    image = image.detach().requires_grad_()
    with torch.enable_grad():
        maps = network(image)
        sums = [x[:, :, x.shape[2] // 2, x.shape[3] // 2].relu().sum() for x in maps]
    found = []
    for number, total in enumerate(sums, 1):
        (gradient,) = torch.autograd.grad(total, image, retain_graph=number < len(sums))
        found.append(gradient.relu().sum(dim=(0, 1)).double().cpu().numpy())
    return found


def side_length(scores: np.ndarray, share: float) -> int:
    """Side of the smallest square around the centre of a square map (H, H) that holds more than a share of its sum."""
    side, total = len(scores), scores.sum()
    centre = side // 2
    for reach in range(centre):
        rows = slice(centre - reach, centre + reach + 1)
        if scores[rows, rows].sum() > share * total:
            return 2 * reach + 1
    return side


def field(subject: Subject, pictures: Sequence[Path], size: int) -> list[np.ndarray]:
    """Steps 1 to 3: mean scores (size, size) for each stage.

    Raises:
        UserError: A picture that cannot be read, a size that the network does not take, scores that are no numbers.
    """
    normalizer = Normalizer(subject.mean, subject.std).to(subject.place)
    totals: Any = 0
    for path in pictures:
        pixels = np.array(decode(path).resize((size, size), Image.Resampling.BICUBIC))
        image = normalizer(torch.from_numpy(pixels).permute(2, 0, 1)[None].to(subject.place))
        try:
            totals = totals + np.stack(contributions(subject.maps, image))
        except (ArithmeticError, AssertionError, LookupError, ValueError, RuntimeError) as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise
            raise UserError(
                f"{subject.name} does not take pictures of {size} pixels, give another --size: {one_line(error)}"
            ) from None
    scores = totals / len(pictures)
    if not np.isfinite(scores).all():
        raise UserError(f"{subject.name} gives gradients that are no numbers: its weights are damaged or overflow")
    for stage, total in enumerate(scores.sum(axis=(1, 2)), 1):
        if not total:
            raise UserError(f"{subject.name}: nothing in the pictures changes the centre of stage {stage}")
    return list(scores)


def choose_pictures(data: Path, count: int) -> list[Path]:
    """As many picture files as asked for, evenly spaced over those in a folder.

    Raises:
        UserError: There are fewer.
    """
    if not data.exists():
        raise UserError(f"--data {data}: no such folder")
    files = find_images([data])
    if not files:
        raise UserError(f"no images in {data}")
    if len(files) < count:
        raise UserError(
            f"{data} holds {len(files)} pictures, {count} are to be averaged over: give more, or say --images "
            f"{len(files)}"
        )
    return [files[int(index)] for index in np.linspace(0, len(files) - 1, count)]


def measure(subject: Subject, pictures: Sequence[Path], size: int) -> tuple[list[FieldRow], list[np.ndarray]]:
    """A row for each stage of a network, and the scores (size, size) behind it.

    Args:
        subject: The network.
        pictures: Files.
        size: Side that they are brought to, pixels.

    Raises:
        UserError: See ``field``.
    """
    scores = field(subject, pictures, size)
    notes = subject.notes
    if len(pictures) < PICTURES:
        notes = (*notes, f"over {len(pictures)} pictures alone, the measure takes {PICTURES} or more")
    rows = [
        FieldRow(
            model=subject.name,
            weights=subject.weights,
            stage=stage,
            stride=stride,
            size=size,
            images=len(pictures),
            scores={name: side_length(own, share) for name, share in SHARES.items()},
            log10={name: side_length(np.log10(own + 1), share) for name, share in SHARES.items()},
            notes=notes,
        )
        for stage, (own, stride) in enumerate(zip(scores, subject.strides, strict=True), 1)
    ]
    return rows, scores
