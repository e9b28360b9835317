"""Mask R-CNN (He et al., arXiv:1703.06870) and Cascade Mask R-CNN (Cai and Vasconcelos, arXiv:1906.09756).

The arithmetic is that of the paper's toolbox, mmdetection; ``docs/parity.md`` compares the two number by number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from conv2former.config import ModelSection
from conv2former.errors import UserError
from conv2former.tasks.backbone import Backbone, OnBackbone
from conv2former.tasks.detection.config import DetectorSection
from conv2former.tasks.detection.model.box_ops import clip
from conv2former.tasks.detection.model.fpn import FPN
from conv2former.tasks.detection.model.roi_heads import CascadeStage, StageSettings, Target
from conv2former.tasks.detection.model.rpn import RPN

STAGES: dict[str, tuple[StageSettings, ...]] = {
    "mask_rcnn": (StageSettings(0.5, (0.1, 0.1, 0.2, 0.2), 1.0, match_low_quality=True),),
    "cascade_mask_rcnn": (
        StageSettings(0.5, (0.1, 0.1, 0.2, 0.2), 1.0, match_low_quality=False),
        StageSettings(0.6, (0.05, 0.05, 0.1, 0.1), 0.5, match_low_quality=False),
        StageSettings(0.7, (0.033, 0.033, 0.067, 0.067), 0.25, match_low_quality=False),
    ),
}


class Detections(NamedTuple):
    """What was found in one image, surest first.

    Attributes:
        boxes: (N, 4), x0, y0, x1, y1 in pixels of the network's input.
        scores: (N,), probability of the class.
        labels: (N,) long, classes from 0.
        masks: (N, 28, 28), probability that a position in the box belongs to the object; see ``paste_masks``. (N, 0, 0)
            of a detector without mask heads.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor


class Detector(OnBackbone):
    """Backbone, pyramid, region proposals and one stage (Mask R-CNN) or three (Cascade Mask R-CNN).

    Without masks it is a Faster R-CNN, or a Cascade R-CNN.

    Boxes are drawn for the losses with the default random generator of the device.

    Args:
        backbone: Images (B, 3, H, W) -> four maps of stride 4, 8, 16 and 32.
        widths: Channels of these maps.
        section: Settings.
        num_classes: Classes of objects, without background.
    """

    def __init__(
        self, backbone: nn.Module, *, widths: Sequence[int], section: DetectorSection, num_classes: int
    ) -> None:
        super().__init__()
        self.section = section
        self.backbone, self.num_classes = backbone, num_classes
        self.pyramid = FPN(widths, section.channels)
        self.rpn = RPN(
            section.channels,
            loss=section.rpn_loss,
            train_proposals=section.train_proposals,
            allowed_border=section.kind == "mask_rcnn",  # the one difference of the toolbox's cascade before its stages
        )
        self.stages = nn.ModuleList(CascadeStage(section, num_classes, settings) for settings in STAGES[section.kind])

    def forward(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """Losses in training mode, detections otherwise.

        Args:
            images: (B, 3, H, W), normalised, then padded with zeros on the right and below to a multiple of 32.
            sizes: Height and width of each image without padding.
            targets: What each image shows; only for training.

        Returns:
            Terms of the loss, weighted, to be summed: rpn_class, rpn_box, class, box and mask, the last three of the
            cascade as stage1_class to stage3_mask. Or what was found in each image.

        Raises:
            UserError: In training without a target for each image, or the numbers of images and sizes differ.
        """
        if len(sizes) != len(images) or (self.training and (targets is None or len(targets) != len(images))):
            raise UserError("give the detector one size for each image, and in training one target for each as well")
        maps = self.pyramid(self.backbone(images))
        gt_boxes = [target.boxes for target in targets] if self.training and targets is not None else None
        proposals, losses = self.rpn(maps, sizes, gt_boxes)
        # Boxes need the precision; the heads choose their own under autocast.
        maps = [x.float() for x in maps]
        limits = torch.tensor(sizes, device=images.device)
        if targets is None or not self.training:
            return self._detect(maps, proposals, limits)
        return losses | self._learn(maps, proposals, limits, targets, (images.shape[2], images.shape[3]))

    def _learn(
        self,
        maps: list[Tensor],
        proposals: list[Tensor],
        limits: Tensor,
        targets: Sequence[Target],
        padded: tuple[int, int],
    ) -> dict[str, Tensor]:
        losses = {}
        stage: Any
        for number, stage in enumerate(self.stages, 1):
            samples = stage.match_and_sample(proposals, targets)
            logits, offsets = stage.boxes(maps, samples.boxes, samples.images)
            terms = stage.losses(maps, samples, logits, offsets, targets, padded)
            prefix = f"stage{number}_" if len(self.stages) > 1 else ""
            losses.update({prefix + name: term for name, term in terms.items()})
            if number < len(self.stages):
                refined = stage.refine(samples.boxes, logits, offsets, limits[samples.images], samples.labels)
                # Without the ground truth itself, which every stage adds anew.
                proposals = [refined[(samples.images == i) & ~samples.gt_as_proposals] for i in range(len(targets))]
        return losses

    @torch.no_grad()
    def _detect(self, maps: list[Tensor], proposals: list[Tensor], limits: Tensor) -> list[Detections]:
        boxes, images = torch.cat(proposals), _owners(proposals)
        total = torch.zeros((), device=boxes.device)
        stages: list[Any] = list(self.stages)
        for number, stage in enumerate(stages, 1):
            logits, offsets = stage.boxes(maps, boxes, images)
            total = total + logits
            if number < len(stages):
                boxes = stage.refine(boxes, logits, offsets, limits[images], None)
        scores = (total / len(stages)).softmax(dim=1)[:, :-1]
        rows, labels = (scores > self.section.score_threshold).nonzero(as_tuple=True)
        images = images[rows]
        boxes = clip(stages[-1].corrected(boxes[rows], offsets[rows, labels]), limits[images])
        scores = scores[rows, labels]
        kept = [self._best(boxes, scores, labels, (images == i).nonzero().squeeze(1)) for i in range(len(limits))]
        rows = torch.cat(kept)
        boxes, scores, labels, images = boxes[rows], scores[rows], labels[rows], images[rows]
        masks = torch.stack([stage.masks(maps, boxes, images, labels).sigmoid() for stage in stages]).mean(dim=0)
        counts = [len(rows) for rows in kept]
        columns = (column.split(counts) for column in (boxes, scores, labels, masks))
        return [Detections(*parts) for parts in zip(*columns, strict=True)]

    def _best(self, boxes: Tensor, scores: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """Of the given rows those that are left after NMS in each class, best first."""
        keep = batched_nms(boxes[rows], scores[rows], labels[rows], self.section.nms_threshold)
        return rows[keep[: self.section.max_detections]]


def build_on_backbone(model: ModelSection, section: DetectorSection, *, num_classes: int) -> Detector:
    """From a recipe, on a timm backbone; raises UserError where that does not fit."""
    backbone = Backbone(model)
    return Detector(backbone, widths=backbone.widths, section=section, num_classes=num_classes)


def _owners(parts: Sequence[Tensor]) -> Tensor:
    """(N,) long: for each row of all the parts together the part that it is of."""
    return torch.cat([torch.full((len(part),), i, device=part.device) for i, part in enumerate(parts)])
