"""Arithmetic on boxes: offsets between boxes, matching with ground truth, drawing a sample.

A box is x0, y0, x1, y1 in pixels of the network's input, float32; its area is (x1 - x0) (y1 - y0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

BACKGROUND, IGNORED = -1, -2  # what a box is matched with where that is no object

# A decoded box is at most 1000 / 16 times as wide and high as the box it is decoded from, and at least 16 / 1000.
MAX_LOG_SCALE = math.log(1000 / 16)


def encode(boxes: Tensor, gt_boxes: Tensor, deviations: Sequence[float]) -> Tensor:
    """The offsets that ``decode`` turns back into ``gt_boxes``.

    Args:
        boxes: Where the offsets start, (N, 4), of positive area.
        gt_boxes: Where they lead, (N, 4), of positive area.
        deviations: The unit of the offsets dx, dy, dw, dh: their standard deviations over a data set.

    Returns:
        (N, 4): shift of the centre in sides of ``boxes``, and logarithm of the ratio of the sides.
    """
    sides, gt_sides = _sides(boxes), _sides(gt_boxes)
    shift = (_centres(gt_boxes) - _centres(boxes)) / sides
    return torch.cat([shift, torch.log(gt_sides / sides)], dim=-1) / boxes.new_tensor(deviations)


def decode(boxes: Tensor, offsets: Tensor, deviations: Sequence[float]) -> Tensor:
    """(..., 4) boxes and (..., 4) offsets in units of ``deviations`` -> (..., 4) boxes."""
    shift, log_scale = (offsets * offsets.new_tensor(deviations)).split(2, dim=-1)
    sides = _sides(boxes)
    centres = _centres(boxes) + sides * shift
    half = sides * log_scale.clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp() * 0.5
    return torch.cat([centres - half, centres + half], dim=-1)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Cuts boxes off at the border of their image: (..., 4) boxes and (..., 2) heights and widths -> (..., 4)."""
    limits = sizes.flip(-1).to(boxes.dtype)
    return boxes.clamp(min=0).minimum(torch.cat([limits, limits], dim=-1))


def has_area(boxes: Tensor) -> Tensor:
    """(..., 4) -> (...) bool: whether both sides are longer than nothing."""
    return (_sides(boxes) > 0).all(dim=-1)


def match(
    gt_boxes: Tensor, boxes: Tensor, *, neg_iou_thr: float, pos_iou_thr: float, min_pos_iou: float | None = None
) -> Tensor:
    """Gives every box the object that it overlaps most, if it overlaps it enough.

    Args:
        gt_boxes: Boxes of the objects, (K, 4); K may be 0.
        boxes: (N, 4).
        neg_iou_thr: Boxes that overlap every object by an IoU below this are background.
        pos_iou_thr: Boxes that overlap one by at least this have found it. Those in between are ignored.
        min_pos_iou: If given, the boxes that overlap an object most belong to that object from this IoU on, whatever
            else they overlap; where that holds for several objects, to the last one.

    Returns:
        (N,) long: index into ``gt_boxes``, ``BACKGROUND`` or ``IGNORED``.
    """
    if not len(gt_boxes) or not len(boxes):
        return boxes.new_full((len(boxes),), BACKGROUND, dtype=torch.long)
    overlaps = box_iou(gt_boxes, boxes)
    best, matches = overlaps.max(dim=0)
    matches = torch.where(best >= pos_iou_thr, matches, IGNORED)
    matches = torch.where(best < neg_iou_thr, BACKGROUND, matches)
    if min_pos_iou is not None:
        peaks = overlaps.max(dim=1, keepdim=True).values
        objects, found = ((overlaps == peaks) & (peaks >= min_pos_iou)).nonzero(as_tuple=True)
        low_quality = torch.full_like(matches, BACKGROUND).scatter_reduce(0, found, objects, "amax")
        matches = torch.where(low_quality >= 0, low_quality, matches)
    return matches


def sample(matches: Tensor, count: int, fraction: float) -> tuple[Tensor, Tensor]:
    """Draws boxes to learn from.

    Args:
        matches: What ``match`` returns, (N,).
        count: Boxes to draw; fewer where there are not as many.
        fraction: Most of them that have found an object.

    Returns:
        Indices of drawn boxes with an object and of drawn background.
    """
    objects = _draw((matches >= 0).nonzero().squeeze(1), int(count * fraction))
    return objects, _draw((matches == BACKGROUND).nonzero().squeeze(1), count - len(objects))


def _draw(indices: Tensor, count: int) -> Tensor:
    """At most ``count`` of the indices, each as likely as any other; in their order."""
    if len(indices) <= count:
        return indices
    return indices[torch.randperm(len(indices), device=indices.device)[:count].sort().values]


def _sides(boxes: Tensor) -> Tensor:
    return boxes[..., 2:] - boxes[..., :2]


def _centres(boxes: Tensor) -> Tensor:
    return (boxes[..., :2] + boxes[..., 2:]) * 0.5
