"""One stage of the detector's second half: proposals are matched with ground truth, classified, corrected, masked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss

from conv2former.tasks.detection.config import DetectorSection
from conv2former.tasks.detection.model import box_head, mask_head
from conv2former.tasks.detection.model.box_ops import clip, decode, encode, match, sample

FRACTION = 0.25  # of the boxes that are learned from, most with an object
GIOU_WEIGHT = 10.0


class Target(NamedTuple):
    """What is in one image. Crowd regions are not in it.

    Attributes:
        boxes: (N, 4) float, x0, y0, x1, y1 in pixels of the network's input, of positive area, within the image.
        labels: (N,) long, classes from 0.
        masks: (N, h, w) uint8, of the size of the image without the batch's padding; none where no object has one.
        masked: (N,) bool, which objects have a mask; None for all.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor
    masked: Tensor | None = None


class StageSettings(NamedTuple):
    """What differs between stages."""

    iou_thr: float  # least IoU of a proposal with the object it has found
    deviations: tuple[float, float, float, float]  # unit of the offsets dx, dy, dw, dh
    weight: float  # of the losses
    match_low_quality: (
        bool  # whether an object gets the proposals that overlap it most, even those nearer to another object
    )


class Samples(NamedTuple):
    """Boxes that a stage learns from, those of all images in a row, in each image objects before background."""

    boxes: Tensor  # (S, 4)
    images: Tensor  # (S,) long
    labels: Tensor  # (S,) long; background is the number of classes
    gt_as_proposals: Tensor  # (S,) bool: the ground truth itself, which is among the proposals of each stage
    objects: Tensor  # (P,) long, index into the image's objects, of the P boxes with an object
    gt_boxes: Tensor  # (P, 4), box of that object


class CascadeStage(nn.Module):
    """A box head and perhaps a mask head with their losses."""

    def __init__(self, section: DetectorSection, num_classes: int, settings: StageSettings) -> None:
        super().__init__()
        self.settings = settings
        self.num_classes = num_classes
        self.rois = section.rois
        self.box_loss = section.box_loss
        self.box_head = box_head.BoxHead(
            section.channels, section.box_head_channels, num_classes, kind=section.box_head
        )
        self.mask_head = mask_head.MaskHead(section.channels, num_classes) if section.masks else None

    def boxes(self, maps: Sequence[Tensor], boxes: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, num_classes + 1) and offsets (N, num_classes, 4) of boxes (N, 4) of images (N,)."""
        return self.box_head(box_head.pool(maps, boxes, images, box_head.POOL))

    def masks(self, maps: Sequence[Tensor], boxes: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Logits (N, 28, 28) of the masks of boxes (N, 4) of images (N,) that show objects of classes (N,).

        Without a mask head (N, 0, 0).
        """
        if self.mask_head is None:
            return boxes.new_zeros(len(boxes), 0, 0)
        logits = self.mask_head(box_head.pool(maps, boxes, images, mask_head.POOL))
        return logits[torch.arange(len(labels), device=labels.device), labels].float()

    def corrected(self, boxes: Tensor, offsets: Tensor) -> Tensor:
        """(N, 4) boxes and (N, 4) offsets of their classes -> (N, 4) boxes, not clipped."""
        return decode(boxes, offsets, self.settings.deviations)

    @torch.no_grad()
    def refine(self, boxes: Tensor, logits: Tensor, offsets: Tensor, limits: Tensor, labels: Tensor | None) -> Tensor:
        """The boxes that the next stage starts from.

        Args:
            boxes: (N, 4).
            logits: (N, num_classes + 1).
            offsets: (N, num_classes, 4).
            limits: Height and width of each box's image, (N, 2).
            labels: True classes, (N,), the number of classes for background; None if unknown. Where there is none, a
                box is corrected for the likeliest class.

        Returns:
            (N, 4), clipped to the image.
        """
        chosen = logits[:, :-1].argmax(dim=1)
        if labels is not None:
            chosen = torch.where(labels < self.num_classes, labels, chosen)
        rows = torch.arange(len(boxes), device=boxes.device)
        return clip(self.corrected(boxes, offsets[rows, chosen]), limits)

    @torch.no_grad()
    def match_and_sample(self, proposals: Sequence[Tensor], targets: Sequence[Target]) -> Samples:
        """Compares the proposals of each image with its objects, and draws those to learn from."""
        parts = []
        iou_thr = self.settings.iou_thr
        for image, (boxes, target) in enumerate(zip(proposals, targets, strict=True)):
            count = len(target.boxes)
            matches = match(
                target.boxes,
                boxes,
                neg_iou_thr=iou_thr,
                pos_iou_thr=iou_thr,
                min_pos_iou=iou_thr if self.settings.match_low_quality else None,
            )
            matches = torch.cat([torch.arange(count, device=boxes.device), matches])
            found, background = sample(matches, self.rois, FRACTION)
            objects, drawn = matches[found], torch.cat([found, background])
            parts.append(
                Samples(
                    boxes=torch.cat([target.boxes, boxes])[drawn],
                    images=torch.full_like(drawn, image),
                    labels=F.pad(target.labels[objects], (0, len(background)), value=self.num_classes),
                    gt_as_proposals=drawn < count,
                    objects=objects,
                    gt_boxes=target.boxes[objects],
                )
            )
        return Samples(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def losses(
        self,
        maps: Sequence[Tensor],
        samples: Samples,
        logits: Tensor,
        offsets: Tensor,
        targets: Sequence[Target],
        padded: tuple[int, int],
    ) -> dict[str, Tensor]:
        """The weighted losses ``class``, ``box`` and ``mask``; 0, but with a gradient, where nothing was drawn.

        Without a mask head there is no ``mask``; with one, objects without a mask do not enter it.

        Args:
            maps: Of the pyramid, float32.
            samples: Of this stage.
            logits: The box head's for these samples, (S, num_classes + 1).
            offsets: Likewise, (S, num_classes, 4).
            targets: One for each image.
            padded: Height and width of the images in the batch.
        """
        count = max(len(samples.boxes), 1)
        rows = (samples.labels < self.num_classes).nonzero().squeeze(1)
        boxes, images, labels = samples.boxes[rows], samples.images[rows], samples.labels[rows]
        class_loss = F.cross_entropy(logits, samples.labels, reduction="sum") / count
        own = offsets[rows, labels]
        if self.box_loss == "giou":
            box_loss = generalized_box_iou_loss(self.corrected(boxes, own), samples.gt_boxes, reduction="sum")
            box_loss = box_loss * GIOU_WEIGHT
        else:
            box_loss = F.l1_loss(own, encode(boxes, samples.gt_boxes, self.settings.deviations), reduction="sum")
        terms = {"class": class_loss, "box": box_loss / count}
        if self.mask_head is not None:
            terms["mask"] = self._mask_loss(maps, boxes, images, labels, samples.objects, targets, padded)
        return {name: term * self.settings.weight for name, term in terms.items()}

    def _mask_loss(
        self,
        maps: Sequence[Tensor],
        boxes: Tensor,
        images: Tensor,
        labels: Tensor,
        objects: Tensor,
        targets: Sequence[Target],
        padded: tuple[int, int],
    ) -> Tensor:
        """Of boxes (P, 4) of images (P,) with objects (P,) of classes (P,); the mean over those that have a mask."""
        if any(target.masked is not None for target in targets):
            flags = [torch.ones_like(t.labels, dtype=torch.bool) if t.masked is None else t.masked for t in targets]
            masked = torch.cat([own[objects[images == image]] for image, own in enumerate(flags)])
            boxes, images, labels, objects = boxes[masked], images[masked], labels[masked], objects[masked]
        predicted = self.masks(maps, boxes, images, labels)
        mask_targets = [
            mask_head.mask_targets(target.masks, boxes[mine], objects[mine], padded)
            for target, mine in ((target, images == image) for image, target in enumerate(targets))
        ]
        mask_loss = F.binary_cross_entropy_with_logits(predicted, torch.cat(mask_targets), reduction="sum")
        return mask_loss / max(predicted.numel(), 1)
