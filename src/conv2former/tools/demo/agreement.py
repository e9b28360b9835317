"""Where two models of one task say the same of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torchvision.ops import box_iou

from conv2former.data.rle import decode_mask
from conv2former.tasks.base import Line, Task
from conv2former.tools.demo.about import readable

MATCHED = 0.5  # intersection over union of boxes that mean the same object

Kind = Literal["classes", "pixels", "objects"]


@dataclass(frozen=True)
class Agreement:
    """Counts, so that those of several images add up.

    Attributes:
        kind: What is counted.
        same: How many of them the two say the same of.
        total: How many there are.
    """

    kind: Kind
    same: int
    total: int

    def __str__(self) -> str:
        if self.kind == "classes":
            if self.total == 1:
                return "The two models name the same top class." if self.same else "The two top classes differ."
            return f"Same top class: {self.same} of {self.total} images."
        if self.kind == "pixels":
            return f"Same class: {self.same / self.total:.1%} of the pixels."
        if not self.total:
            return "Neither model finds an object."
        return f"Matched objects: {self.same} of {self.total} (same class, boxes with IoU {MATCHED:g} or more)."


def kind_of(task: Task) -> Kind | None:
    """What the agreement of two models of a task is counted in; None where it is not."""
    if "boxes" in task.layers:
        return "objects"
    if "masks" in task.layers:
        return "pixels"
    return "classes" if "top_k" in task.options else None


def agreement(kind: Kind, first: Sequence[Line], second: Sequence[Line]) -> Agreement:
    """Of what two models found on one image."""
    if kind == "classes":
        return Agreement(kind, int(readable(first[0].label) == readable(second[0].label)), 1)
    if kind == "pixels":
        return _pixels(first, second)
    same = _matched(first, second)
    return Agreement(kind, same, len(first) + len(second) - same)


def total(agreements: Sequence[Agreement]) -> Agreement | None:
    """Of several images."""
    if not agreements:
        return None
    same, count = sum(one.same for one in agreements), sum(one.total for one in agreements)
    return Agreement(agreements[0].kind, same, count)


def _pixels(first: Sequence[Line], second: Sequence[Line]) -> Agreement:
    others = {readable(line.label): line.mask for line in second}
    same, size = 0, (1, 1)
    for line in first:
        if not line.mask:  # a task of somebody else
            continue
        size = line.mask["size"]
        if other := others.get(readable(line.label)):
            same += int((decode_mask(line.mask) & decode_mask(other)).sum())
    return Agreement("pixels", same, size[0] * size[1])


def _matched(first: Sequence[Line], second: Sequence[Line]) -> int:
    """Pairs, each object in at most one: the most certain choose first."""
    if not first or not second:
        return 0
    overlaps = box_iou(*(torch.tensor([line.box for line in lines], dtype=torch.float) for lines in (first, second)))
    free = set(range(len(second)))
    for row, line in zip(overlaps.tolist(), first, strict=True):
        own = [
            index for index in free if readable(second[index].label) == readable(line.label) and row[index] >= MATCHED
        ]
        if own:
            free.remove(max(own, key=row.__getitem__))
    return len(second) - len(free)
