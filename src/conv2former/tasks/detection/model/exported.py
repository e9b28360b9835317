"""A whole detector for one image, in a form without sizes that depend on the image: for exporters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms, roi_align

from conv2former.tasks.detection.model import box_head, mask_head
from conv2former.tasks.detection.model.box_ops import clip, decode, has_area
from conv2former.tasks.detection.model.detector import Detector
from conv2former.tasks.detection.model.fpn import STRIDES
from conv2former.tasks.detection.model.rpn import CANDIDATES, DEVIATIONS, NMS, TEST_PROPOSALS

OUTPUTS = ["boxes", "scores", "labels", "masks"]
NONE = -1.0  # score of a row that holds no box; a real one's is 0 at least


@torch.library.custom_op(
    "conv2former::grouped_nms",
    mutates_args=(),
    schema="(Tensor boxes, Tensor scores, float iou_thr, float least, int count) -> Tensor",
)
def grouped_nms(boxes: Tensor, scores: Tensor, iou_thr: float, least: float, count: int) -> Tensor:
    """Non-maximum suppression within each group; the result has as many rows whatever the boxes are.

    PyTorch's exporter follows an operator of our own without looking into it.

    Args:
        boxes: (G, N, 4), N of each group.
        scores: (G, N).
        iou_thr: Of two boxes that overlap by more than this the one with the lower score goes.
        least: Boxes whose score is not above this go first.
        count: At most so many are kept of a group.

    Returns:
        (G * min(count, N),) long: those that are kept, as index g * N + n, in any order; -1 in the rows that are left.
    """
    groups, number = scores.shape
    found = []
    for group in range(groups):
        rows = (scores[group] > least).nonzero().squeeze(1)
        kept = nms(boxes[group][rows], scores[group][rows], iou_thr)[:count]
        found.append(rows[kept] + group * number)
    kept = torch.cat(found)
    return F.pad(kept, (0, groups * min(count, number) - len(kept)), value=-1)


@grouped_nms.register_fake
def _(boxes: Tensor, scores: Tensor, iou_thr: float, least: float, count: int) -> Tensor:
    return scores.new_empty(scores.shape[0] * min(count, scores.shape[1]), dtype=torch.long)


class WholeDetector(nn.Module):
    """What ``Detector`` finds on one image, as tensors whose shapes are the same for every image.

    Args:
        model: In evaluation mode; its modules are shared.
    """

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.backbone, self.pyramid, self.rpn, self.stages = model.backbone, model.pyramid, model.rpn, model.stages
        self.section, self.num_classes = model.section, model.num_classes

    def forward(self, images: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        """Detections, best first.

        Args:
            images: (1, 3, H, W), normalised, with zeros to the right of the image and below.
            size: (2,) long, height and width of the image without them.

        Returns:
            boxes (D, 4), scores (D,), labels (D,), D = ``max_detections``, and of a detector with mask heads masks
            (D, 28, 28). A row that holds nothing has the label -1 and zeros.
        """
        maps = self.pyramid(self.backbone(images))
        proposals, real = self._proposals(maps, size)
        boxes, scores = self._classified(maps, proposals, size)
        scores = torch.where(real.unsqueeze(1), scores, NONE)
        # classes are the groups, so that a box of one class never drives out that of another
        boxes, scores = boxes.transpose(0, 1), scores.transpose(0, 1)
        section = self.section
        count = section.max_detections
        kept = grouped_nms(boxes, scores, section.nms_threshold, section.score_threshold, count)
        rows, best = _best(kept, scores, count)
        boxes = boxes.flatten(0, 1)[rows]
        labels = rows // scores.shape[1]
        found = best > NONE
        outputs = [torch.where(found.unsqueeze(1), boxes, 0.0), torch.where(found, best, 0.0)]
        outputs.append(torch.where(found, labels, -1))
        if section.masks:
            outputs.append(torch.where(found.view(-1, 1, 1), self._masks(maps, boxes, labels), 0.0))
        return tuple(outputs)

    def _proposals(self, maps: list[Tensor], size: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (P, 4), and which of them are more than a filler, (P,) bool."""
        rows = []
        for logits, offsets, grid in zip(*self.rpn.predicted(maps), strict=True):
            # of equal scores the first go first in ONNX, as in ``rpn.highest``
            scores, index = logits[0].sigmoid().topk(min(CANDIDATES[False], logits.shape[1]))
            boxes = clip(decode(grid[index], offsets[0][index], DEVIATIONS), size)
            rows.append((boxes, torch.where(has_area(boxes), scores, NONE)))
        longest = max(len(scores) for _, scores in rows)
        boxes = torch.stack([F.pad(boxes, (0, 0, 0, longest - len(boxes))) for boxes, _ in rows])
        scores = torch.stack([F.pad(scores, (0, longest - len(scores)), value=NONE) for _, scores in rows])
        kept = grouped_nms(boxes, scores, NMS, NONE, TEST_PROPOSALS)
        index, best = _best(kept, scores, min(TEST_PROPOSALS, sum(len(scores) for _, scores in rows)))
        return boxes.flatten(0, 1)[index], best > NONE

    def _classified(self, maps: list[Tensor], boxes: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Proposals (P, 4) -> boxes (P, classes, 4) and scores (P, classes)."""
        total = torch.zeros(len(boxes), self.num_classes + 1)
        stages: list[Any] = list(self.stages)
        for number, stage in enumerate(stages, 1):
            logits, offsets = stage.box_head(_pool(maps, boxes, box_head.POOL))
            total = total + logits
            if number < len(stages):
                boxes = stage.refine(boxes, logits, offsets, size, None)
        scores = (total / len(stages)).softmax(dim=1)[:, :-1]
        return clip(stages[-1].corrected(boxes.unsqueeze(1), offsets), size), scores

    def _masks(self, maps: list[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """(D, 28, 28), probabilities."""
        features, rows = _pool(maps, boxes, mask_head.POOL), torch.arange(len(boxes))
        stages: list[Any] = list(self.stages)
        return torch.stack([stage.mask_head(features)[rows, labels].sigmoid() for stage in stages]).mean(dim=0)


def _best(kept: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of what ``grouped_nms`` kept the ``count`` best rows, and their scores: ``NONE`` where there are no more."""
    best = torch.where(kept >= 0, scores.flatten()[kept.clamp(min=0)], NONE)
    missing = max(count - len(best), 0)
    best, order = F.pad(best, (0, missing), value=NONE).topk(count)
    return F.pad(kept, (0, missing)).clamp(min=0)[order], best


def _pool(maps: Sequence[Tensor], boxes: Tensor, side: int) -> Tensor:
    """``box_head.pool`` of one image: each map sees the boxes of the others as points, whose features are not taken."""
    level = box_head.levels(boxes)
    pooled = torch.zeros(())
    for number, stride in enumerate(STRIDES[: box_head.LEVELS]):
        own = level == number
        rois = F.pad(torch.where(own.unsqueeze(1), boxes, 0.0), (1, 0))  # before each box the index of the image
        found = roi_align(maps[number], rois, side, spatial_scale=1 / stride, sampling_ratio=0, aligned=True)
        pooled = torch.where(own.view(-1, 1, 1, 1), found, pooled)  # a runtime may give NaN for a point
    return pooled
