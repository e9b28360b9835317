"""The region proposal network (Ren et al., "Faster R-CNN", arXiv:1506.01497) in the paper's toolbox's variant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import batched_nms

from conv2former.tasks.detection.model.box_ops import clip, decode, encode, has_area, match, sample
from conv2former.tasks.detection.model.fpn import STRIDES

RATIOS = (0.5, 1.0, 2.0)  # height over width of an anchor
SCALE = 8  # side of a square anchor in strides of its map
DEVIATIONS = (1.0, 1.0, 1.0, 1.0)
NEG_IOU_THR, POS_IOU_THR = (
    0.3,
    0.7,
)  # IoU of an anchor: below the one with all objects background, from the other with one found
SAMPLES, FRACTION = 256, 0.5  # anchors of an image that are learned from, and most of them with an object
NMS = 0.7
CANDIDATES = {True: 2000, False: 1000}  # of each map before NMS, by whether it is training
TEST_PROPOSALS = 1000  # of each image after it
BETA = 1 / 9  # offset where the smooth L1 loss turns from square to linear


def anchors(shape: tuple[int, int], stride: int, device: torch.device) -> Tensor:
    """The anchors of one map, not rounded, centred on the corners of its cells.

    Args:
        shape: Height and width of the map.
        stride: Of the map, pixels.
        device: Where they shall be.

    Returns:
        (h * w * 3, 4) in the order row, column, ratio.
    """
    sides = torch.tensor([(1 / math.sqrt(ratio), math.sqrt(ratio)) for ratio in RATIOS], device=device)
    half = sides * (SCALE * stride / 2)
    rows, columns = (torch.arange(n, device=device) * float(stride) for n in shape)
    centres = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).unsqueeze(2)
    return torch.cat([centres - half, centres + half], dim=-1).view(-1, 4)


def is_valid(shape: tuple[int, int], stride: int, size: tuple[int, int], device: torch.device) -> Tensor:
    """(h * w * 3,) bool: which anchors of a map lie on an image of ``size``, padded to a multiple of 32.

    In a batch images are padded further, to the largest. Anchors out there are neither object nor background.
    """
    rows, columns = (
        torch.arange(n, device=device) < math.ceil(math.ceil(pixels / 32) * 32 / stride)
        for n, pixels in zip(shape, size, strict=True)
    )
    return (rows[:, None] & columns).flatten().repeat_interleave(len(RATIOS))


def highest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest scores of each image, best first; of equal ones, which rounding makes of many, the first go first.

    ``topk`` alone leaves their order open, a stable sort of all takes ten times as long on a large map.

    Args:
        scores: (B, N) float32, not negative.
        count: At most so many.

    Returns:
        Scores and their indices, (B, min(count, N)).
    """
    # the bits of such numbers, read as integers, have their order; below them the place, earlier ones higher
    keys = (scores.view(torch.int32).long() << 32) - torch.arange(scores.shape[1], device=scores.device)
    index = keys.topk(min(count, scores.shape[1]), dim=1).indices
    return scores.gather(1, index), index


class RPN(nn.Module):
    """Says for every anchor whether there is an object and where exactly; proposes the best of these boxes.

    Args:
        channels: Width of the pyramid, and of the network's one convolution.
        loss: Of the offsets: L1, or smooth L1 with ``BETA``.
        train_proposals: Boxes proposed for each image in training.
        allowed_border: Whether anchors that cross the border of their image are learned from.
    """

    def __init__(
        self, channels: int, *, loss: Literal["l1", "smooth_l1"], train_proposals: int, allowed_border: bool
    ) -> None:
        super().__init__()
        self.head = RPNHead(channels, len(RATIOS))  # as it initialises itself: normal of deviation 0.01, bias 0
        self.beta = BETA if loss == "smooth_l1" else 0.0
        self.train_proposals = train_proposals
        self.allowed_border = allowed_border

    def forward(
        self, maps: list[Tensor], sizes: Sequence[tuple[int, int]], gt_boxes: Sequence[Tensor] | None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposes boxes, and learns where ground truth is given.

        Args:
            maps: Of the pyramid, (B, channels, H / s, W / s) each.
            sizes: Height and width of each image without padding.
            gt_boxes: Boxes of each image's objects, (K, 4); None for no losses.

        Returns:
            Proposals of each image, (at most ``train_proposals`` or ``TEST_PROPOSALS``, 4), best first and without
            gradient, and the losses ``rpn_class`` and ``rpn_box``.
        """
        logits, offsets, grids = self.predicted(maps)
        proposals = self._propose(logits, offsets, grids, sizes)
        if gt_boxes is None:
            return proposals, {}
        grid = torch.cat(grids)
        usable = [self._usable(grid, [_shape(x) for x in maps], size) for size in sizes]
        return proposals, self._losses(torch.cat(logits, 1), torch.cat(offsets, 1), grid, usable, gt_boxes)

    def predicted(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Of each map the logits (B, N) and offsets (B, N, 4) of its N anchors, and these, (N, 4), in their order."""
        logits, offsets = self.head(maps)
        logits = [x.float().permute(0, 2, 3, 1).flatten(1) for x in logits]
        offsets = [x.float().permute(0, 2, 3, 1).reshape(len(x), -1, 4) for x in offsets]
        return logits, offsets, [anchors(_shape(x), stride, x.device) for x, stride in zip(maps, STRIDES, strict=True)]

    def _usable(self, grid: Tensor, shapes: Sequence[tuple[int, int]], size: tuple[int, int]) -> Tensor:
        """Indices of the anchors that an image of ``size`` can be learned from."""
        valid = torch.cat(
            [is_valid(shape, stride, size, grid.device) for shape, stride in zip(shapes, STRIDES, strict=True)]
        )
        if not self.allowed_border:
            limits = grid.new_tensor([size[1], size[0]])
            valid &= ((grid[:, :2] >= 0) & (grid[:, 2:] < limits)).all(dim=1)
        return valid.nonzero().squeeze(1)

    @torch.no_grad()
    def _propose(
        self, logits: list[Tensor], offsets: list[Tensor], grids: list[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        limits = torch.tensor(sizes, device=grids[0].device).unsqueeze(1)
        scores, boxes, levels = [], [], []
        for level, (level_logits, level_offsets, grid) in enumerate(zip(logits, offsets, grids, strict=True)):
            count = CANDIDATES[self.training]
            best, index = highest(level_logits.sigmoid(), count)
            chosen = level_offsets.gather(1, index.unsqueeze(2).expand(-1, -1, 4))
            scores.append(best)
            boxes.append(clip(decode(grid[index], chosen, DEVIATIONS), limits))
            levels.append(torch.full_like(index, level))
        count = self.train_proposals if self.training else TEST_PROPOSALS
        images = zip(torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(levels, 1), strict=True)
        return [_best(*image, count) for image in images]

    def _losses(
        self, logits: Tensor, offsets: Tensor, grid: Tensor, usable: list[Tensor], gt_boxes: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        objects, backgrounds, wanted, count = [], [], [], 0
        for image, (rows, gt) in enumerate(zip(usable, gt_boxes, strict=True)):
            boxes = grid[rows]
            matches = match(gt, boxes, neg_iou_thr=NEG_IOU_THR, pos_iou_thr=POS_IOU_THR, min_pos_iou=NEG_IOU_THR)
            found, background = sample(matches, SAMPLES, FRACTION)
            objects.append(rows[found] + image * len(grid))
            backgrounds.append(rows[background] + image * len(grid))
            wanted.append(encode(boxes[found], gt[matches[found]], DEVIATIONS))
            count += max(len(found), 1) + max(len(background), 1)  # the toolbox's count: none is one
        positive, drawn = torch.cat(objects), torch.cat(objects + backgrounds)
        is_object = torch.zeros(len(drawn), device=logits.device)
        is_object[: len(positive)] = 1
        class_loss = F.binary_cross_entropy_with_logits(logits.flatten()[drawn], is_object, reduction="sum")
        box_loss = F.smooth_l1_loss(offsets.flatten(0, 1)[positive], torch.cat(wanted), reduction="sum", beta=self.beta)
        return {"rpn_class": class_loss / count, "rpn_box": box_loss / count}


def _best(boxes: Tensor, scores: Tensor, levels: Tensor, count: int) -> Tensor:
    """The ``count`` boxes of highest score that are left of one image after NMS on each map."""
    real = has_area(boxes)  # without area: all that lies in the padding
    boxes, scores, levels = boxes[real], scores[real], levels[real]
    return boxes[batched_nms(boxes, scores, levels, NMS)[:count]]


def _shape(x: Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]
