"""From a segmentation model to probabilities: whole images or windows, several views, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from conv2former.tasks.dense import padded
from conv2former.tasks.segmentation.config import SegmentationDataSection
from conv2former.tasks.segmentation.upernet import resize

BAND = 2**24  # numbers of a map that are made at a time, 4 bytes each


def probability_bands(
    model: Any, images: Sequence[Tensor], data: SegmentationDataSection, *, size: tuple[int, int], mirror: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """Probabilities at the size of the image in its file, averaged over views, by bands of rows.

    With one view no more than ``BAND`` numbers are made at a time, whatever the size of the image; several are added
    up at its full size.

    Args:
        model: A segmentation model in evaluation mode.
        images: One normalised view (1, 3, h, w) for each scale.
        data: Says whether whole images are taken or windows.
        size: (H, W).
        mirror: Whether each view is taken mirrored, too.

    Yields:
        The rows of a band, and (1, K, rows, W).
    """
    flips = (False, True) if mirror else (False,)
    views = [(image, flip) for image in images for flip in flips]
    if len(views) == 1:
        yield from _bands(_logits(model, *views[0], data), size)
        return
    total: Any = None
    for view in views:
        for rows, probabilities in _bands(_logits(model, *view, data), size):
            if total is None:
                total = probabilities.new_zeros(1, probabilities.shape[1], *size)
            total[:, :, rows] += probabilities
    yield slice(0, size[0]), total / len(views)


def _logits(model: Any, image: Tensor, mirrored: bool, data: SegmentationDataSection) -> Tensor:
    """Logits of a view (1, K, h, w) at its own size, the right way round."""
    view = image.flip(3) if mirrored else image
    sliding = data.window == "slide"
    logits = slide(model, view, side=data.crop_size, stride=data.step) if sliding else whole(model, view)
    return logits.flip(3) if mirrored else logits


def _bands(logits: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Probabilities of logits (1, K, h, w) brought to (H, W) by bilinear interpolation, some rows at a time."""
    height, width = size
    step = max(BAND // (logits.shape[1] * width), 1)
    for start in range(0, height, step):
        rows = slice(start, min(start + step, height))
        yield rows, resize(_rows(logits, rows, height), (rows.stop - rows.start, width)).softmax(dim=1)


def _rows(x: Tensor, rows: slice, height: int) -> Tensor:
    """Some rows of (1, K, h, w) interpolated to ``height`` rows, (1, K, rows, w): bilinear along one axis."""
    if x.shape[2] == height:
        return x[:, :, rows]
    centres = (torch.arange(rows.start, rows.stop, device=x.device) + 0.5) * (x.shape[2] / height) - 0.5
    centres = centres.clamp_min(0)
    above = centres.long().clamp_max(x.shape[2] - 1)
    below = (above + 1).clamp_max(x.shape[2] - 1)
    return torch.lerp(x[:, :, above], x[:, :, below], (centres - above).to(x.dtype)[:, None])


def whole(model: Any, image: Tensor) -> Tensor:
    """Logits of images (B, 3, h, w) at their size, in float32; sides that are not a multiple of 32 are padded."""
    height, width = image.shape[-2:]
    image = padded(image)
    return resize(model(image).float(), image)[..., :height, :width]


def slide(model: Any, image: Tensor, *, side: int, stride: int) -> Tensor:
    """Logits of an image (1, 3, h, w), averaged over overlapping windows; the last ones end at the edge."""
    height, width = image.shape[-2:]
    total: Any = None
    counts = image.new_zeros(1, 1, height, width)
    for top in _starts(height, side, stride):
        for left in _starts(width, side, stride):
            window = (..., slice(top, min(top + side, height)), slice(left, min(left + side, width)))
            logits = whole(model, image[window])
            if total is None:
                total = logits.new_zeros(1, logits.shape[1], height, width)
            total[window] += logits
            counts[window] += 1
    return total / counts


def _starts(length: int, side: int, stride: int) -> list[int]:
    """Where the windows along one side of an image begin."""
    count = -(-max(length - side, 0) // stride) + 1
    return sorted({max(min(i * stride, length - side), 0) for i in range(count)})
