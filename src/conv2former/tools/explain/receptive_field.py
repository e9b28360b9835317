"""Effective receptive fields: how far from the centre of a map the pixels lie that change it.

The measure is that of Ding et al., "Scaling Up Your Kernels to 31x31" (RepLKNet), arXiv:2203.06717, Sec. 5 and
Appendix, as their published scripts compute it (``erf/visualize_erf.py`` and ``erf/analyze_erf.py``):

1. An image is brought to a square by bicubic interpolation, whatever its shape, and normalised.
2. The channels of the map's central position, negative ones as 0, are summed. The gradient of the sum with respect to
   the image, negative parts as 0 again, is summed over the image's three channels: a score for each pixel.
3. Scores are averaged over images.
4. The side of the smallest square around the image's centre that holds more than a fraction of all scores: their table
   takes ``log10(score + 1)`` for score here ("log10" in ours).

A map with an even number of positions on a side has none in the middle: the one right of and below it is taken, half a
stride off.

Our own choices are these. We measure the map of every stage, not of the last alone. We also give the side for the
scores themselves ("scores"): a factor on a network's output changes the logarithm's side, but not this one. Squares
start at one pixel, and it is the whole image where no smaller square suffices (theirs start at three pixels and give
nothing). Images have 224 pixels by default where theirs have 1024, and they are evenly spaced over all that there are.
Networks compute in float32 and in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from conv2former.data.images import decode, given_images
from conv2former.data.loading import Normalizer
from conv2former.errors import UserError, one_line
from conv2former.tools.explain.subjects import Subject

IMAGES = 50  # of the measure; fewer are noted
FRACTIONS = {"50": 0.5, "99": 0.99}


@dataclass(frozen=True)
class FieldRow:
    """The field of one stage. The names of the fields are the keys of ``receptive_fields.jsonl``."""

    model: str  # as the user wrote it
    weights: str  # 'untrained', 'pretrained' or 'trained'
    stage: int  # from 1
    stride: int  # of the stage's map, pixels
    size: int  # side of the images, pixels
    images: int  # how many were averaged over
    scores: dict[str, int]  # side of the square that holds a fraction (in percent) of the scores, pixels
    log10: dict[str, int]  # the same of log10(score + 1), as in RepLKNet's table
    notes: tuple[str, ...] = ()  # what to know of the numbers


def contributions(network: Callable[[Tensor], Sequence[Tensor]], image: Tensor) -> list[np.ndarray]:
    """Step 2 of the measure for each map of a network.

    ``network`` turns a normalised image (1, 3, H, W) into maps (1, C, h, w). Scores are (H, W), float64, none negative.
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


def side_length(scores: np.ndarray, fraction: float) -> int:
    """Side of the smallest square around the centre of (H, H) scores that holds more than a fraction of their sum."""
    side, total = len(scores), scores.sum()
    centre = side // 2
    for reach in range(centre):
        rows = slice(centre - reach, centre + reach + 1)
        if scores[rows, rows].sum() > fraction * total:
            return 2 * reach + 1
    return side


def field(subject: Subject, images: Sequence[Path], size: int) -> list[np.ndarray]:
    """Steps 1 to 3: mean scores (size, size) for each stage.

    Raises:
        UserError: An image that cannot be read, a size that the network does not take, scores that are no numbers.
    """
    normalizer = Normalizer(subject.mean, subject.std).to(subject.device)
    totals: Any = 0
    for path in images:
        pixels = np.array(decode(path).resize((size, size), Image.Resampling.BICUBIC))
        image = normalizer(torch.from_numpy(pixels).permute(2, 0, 1)[None].to(subject.device))
        try:
            totals = totals + np.stack(contributions(subject.maps, image))
        except (ArithmeticError, AssertionError, LookupError, ValueError, RuntimeError) as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise
            raise UserError(
                f"{subject.name} does not take images of {size} pixels, give another --size: {one_line(error)}"
            ) from None
    scores = totals / len(images)
    if not np.isfinite(scores).all():
        raise UserError(f"{subject.name} gives gradients that are no numbers: its weights are damaged or overflow")
    for stage, total in enumerate(scores.sum(axis=(1, 2)), 1):
        if not total:
            raise UserError(f"{subject.name}: nothing in the images changes the centre of stage {stage}")
    return list(scores)


def choose_images(data: Path, count: int) -> list[Path]:
    """``count`` image files, evenly spaced over those in a folder; raises UserError where there are fewer."""
    if not data.exists():
        raise UserError(f"--data {data}: no such folder")
    files = given_images([data])
    if len(files) < count:
        raise UserError(
            f"{data} holds {len(files)} images, {count} are to be averaged over: give more, or say --images "
            f"{len(files)}"
        )
    return [files[int(index)] for index in np.linspace(0, len(files) - 1, count)]


def measure(subject: Subject, images: Sequence[Path], size: int) -> tuple[list[FieldRow], list[np.ndarray]]:
    """A row for each stage of a network, and the scores (size, size) behind it; raises UserError like ``field``."""
    scores = field(subject, images, size)
    notes = subject.notes
    if len(images) < IMAGES:
        notes = (*notes, f"over {len(images)} images alone, the measure takes {IMAGES} or more")
    rows = [
        FieldRow(
            model=subject.name,
            weights=subject.weights,
            stage=stage,
            stride=stride,
            size=size,
            images=len(images),
            scores={name: side_length(own, fraction) for name, fraction in FRACTIONS.items()},
            log10={name: side_length(np.log10(own + 1), fraction) for name, fraction in FRACTIONS.items()},
            notes=notes,
        )
        for stage, (own, stride) in enumerate(zip(scores, subject.strides, strict=True), 1)
    ]
    return rows, scores
