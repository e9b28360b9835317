"""What a recipe for object detection and instance segmentation may say beside what all recipes share."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from conv2former.config import MOST_SIDE, AnnotatedSection, Choices, Recipe, Section, Side, Start, Width


class DetectionDataSection(AnnotatedSection):
    """Images with COCO annotations. Paths are below the folder given with ``--data``."""

    train_images: str = Field(default="train2017", description="folder of the training images, below --data")
    train_annotations: str = Field(
        default="annotations/instances_train2017.json", description="their annotations in COCO's format"
    )
    val_images: str = Field(default="val2017", description="folder of the validation images")
    val_annotations: str = Field(default="annotations/instances_val2017.json", description="their annotations")
    val_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="fraction held out where there is no validation set"
    )
    short_side: int = Field(
        default=800, ge=32, le=MOST_SIDE, description="short side of an image in evaluation, pixels"
    )
    long_side: int = Field(default=1333, ge=32, le=MOST_SIDE, description="most that the long side may then have")
    keep_empty: bool = Field(default=False, description="whether images without objects are trained on")


class DetectionAugmentSection(Section):
    """Multi-scale training with resize-crop-resize and flips (Sec. 4.5, Swin's and DETR's)."""

    short_sides: list[Side] = Field(
        default=[480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800], description="of which one is drawn, pixels"
    )
    long_side: Side = Field(default=1333, description="most that the long side may then have, pixels")
    crop_prob: float = Field(default=0.5, ge=0, le=1, description="images that are first resized, and cropped")
    crop_short_sides: list[Side] = Field(default=[400, 500, 600], description="of which that resize draws one")
    crop_sizes: tuple[Side, Side] = Field(
        default=(384, 600), description="least and most height and width of that crop, pixels"
    )
    hflip: float = Field(default=0.5, ge=0, le=1, description="probability of a mirrored image")

    @model_validator(mode="after")
    def _there_are_sizes(self) -> DetectionAugmentSection:
        if not self.short_sides or not self.crop_short_sides:
            raise ValueError("augment.short_sides and augment.crop_short_sides need at least one size")
        if self.crop_sizes[0] > self.crop_sizes[1]:
            raise ValueError(f"augment.crop_sizes {self.crop_sizes} must be the least and the most")
        return self


class DetectorSection(Section):
    """What stands on the backbone; the defaults are those of Mask R-CNN in the paper's toolbox."""

    kind: Literal["mask_rcnn", "cascade_mask_rcnn"] = Field(
        default="mask_rcnn", description="one box head, or three that refine boxes one after the other"
    )
    masks: bool = Field(
        default=True,
        description="whether objects get masks; without them it is a Faster R-CNN or its cascade ('auto', and where "
        "nothing is said: whether the training images have any)",
    )
    channels: Width = Field(default=256, description="width of the pyramid, the RPN and the heads' convolutions")
    box_head: Literal["2fc", "4conv1fc"] = Field(
        default="2fc", description="two linear layers, or four convolutions with batch norm and one linear layer"
    )
    box_head_channels: Width = Field(default=1024, description="width of the linear layers")
    box_loss: Literal["l1", "giou"] = Field(
        default="l1", description="of the box heads: L1 on deltas, or GIoU (weight 10) on decoded boxes"
    )
    rpn_loss: Literal["l1", "smooth_l1"] = Field(default="l1", description="of the RPN's boxes; smooth with beta 1/9")
    train_proposals: Width = Field(default=1000, description="boxes of the RPN for each image in training")
    rois: Width = Field(default=512, description="boxes of each image that the heads are trained on")
    score_threshold: float = Field(default=0.05, ge=0, lt=1, description="less certain boxes are no detections")
    nms_threshold: float = Field(default=0.5, gt=0, le=1, description="of two boxes that overlap more one is dropped")
    max_detections: Width = Field(default=100, description="for each image")


class DetectionRecipe(Recipe):
    """One experiment in detection and instance segmentation; the monitored metric is box AP."""

    task: Literal["detection"] = "detection"
    data: DetectionDataSection = DetectionDataSection()
    augment: DetectionAugmentSection = DetectionAugmentSection()
    detector: DetectorSection = DetectorSection()
    left_open: ClassVar[tuple[str, ...]] = (*Recipe.left_open, "detector.masks")
    later: ClassVar[dict[str, dict[str, Any]]] = Recipe.later | dict(
        data=Recipe.later["data"] | dict(val_fraction=0.0), detector=dict(masks=True)
    )

    @classmethod
    def choices(cls, start: Start) -> Choices:
        """By the number of training images and the machine (docs/log.md has the runs behind the numbers)."""
        n, weights = start.images, start.weights
        epochs = (60 if n < 200 else 24 if n < 20_000 else 12) if start.gpu else 24 if n < 200 else 12
        batch = min(4 if n < 1_000 else 8, n)
        machine = "a GPU: the paper's" if start.gpu else "a CPU: a fraction of the paper's, so that it takes minutes"
        own = 800 if start.gpu else 320
        short, side = start.short_side or own, f"data.short_side={start.short_side}" if start.short_side else machine

        def scaled(*sides: int) -> list[int]:
            return [min(max(round(one * short / own), 32), MOST_SIDE) for one in sides]

        sizes = scaled(*range(480, 801, 32)) if start.gpu else scaled(256, 288, 320)
        (long,) = scaled(1333 if start.gpu else 512)
        begin = "pretrained backbone" if weights else "random weights"
        why = "objects have masks" if start.masks else "no object has a mask: trained and evaluated for boxes"
        found: Choices = {
            "detector.masks": (start.masks, why),
            "data.short_side": (short, machine),
            "data.long_side": (long, side),
            "augment.short_sides": (sizes, side),
            "augment.long_side": (long, side),
            "augment.crop_short_sides": (scaled(400, 500, 600) if start.gpu else scaled(288, 352), side),
            "augment.crop_sizes": (tuple(scaled(384, 600) if start.gpu else scaled(224, 352)), side),
            "detector.channels": (256 if start.gpu else 96, machine),
            "detector.box_head_channels": (1024 if start.gpu else 256, machine),
            "detector.train_proposals": (1000 if start.gpu else 300, machine),
            "detector.rois": (512 if start.gpu else 128, machine),
            "model.freeze_batchnorm": (weights, f"{begin}, small batches"),
            "optim.global_batch": (-(-batch // start.world) * start.world, f"{n:,} training images"),
            "optim.base_lr": (4e-4, begin),
            "optim.layer_decay": (0.9 if weights else None, begin),
            "optim.head_lr": (3.0 if weights else 1.0, begin),
        }
        return super().choices(start) | start.schedule(epochs, evaluations=6) | found
