"""What a recipe for semantic segmentation may say beside what all recipes share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from conv2former.config import MOST_SIDE, AnnotatedSection, Choices, Recipe, Section, Side, Start, Width
from conv2former.tasks.segmentation.values import canonical


class SegmentationDataSection(AnnotatedSection):
    """Images with a map of labels each."""

    source: Literal["ade20k", "pairs"] = Field(
        default="ade20k",
        description="'ade20k' for images/ and annotations/ with training/ and validation/ in each, 'pairs' for images/ "
        "and masks/ alone or in train/ and val/",
    )
    val_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="fraction held out where there is no validation set"
    )
    classes: Width | None = Field(
        default=None, description="number of classes; needed where no classes.txt (or ADE20K's list) names them"
    )
    reduce_zero_label: bool = Field(
        default=False, description="label 0 is no class and is ignored, label 1 is the first class (ADE20K)"
    )
    mask_values: dict[str, str | int | None] | None = Field(
        default=None,
        description="class of each value in the masks, by name or number: {0: background, 255: crack}, or of each "
        "colour: {0 0 0: road, 255 0 0: car}; 'ignore' for no class",
    )
    mask_nearest: bool = Field(
        default=False,
        description="whether a value that mask_values does not name stands for the nearest one (soft edges); always so "
        "in JPEG masks",
    )
    short_side: Side = Field(default=512, description="of an image before the random scale, and in evaluation")
    long_side: Side = Field(default=2048, description="most that the long side may then have, pixels")
    crop_size: int = Field(
        default=512, ge=32, le=MOST_SIDE, description="side of the square that is trained on, pixels"
    )
    window: Literal["whole", "slide"] = Field(
        default="whole", description="evaluation of the whole image at once, or by windows of crop_size"
    )
    stride: PositiveInt | None = Field(
        default=None, description="from window to window, pixels; two thirds of crop_size unless given"
    )

    @field_validator("mask_values", mode="before")
    @classmethod
    def _keys_are_values(cls, value: Any) -> Any:
        return canonical(value)

    @model_validator(mode="after")
    def _one_meaning_of_zero(self) -> SegmentationDataSection:
        if self.mask_nearest and not self.mask_values:
            raise ValueError("data.mask_nearest needs data.mask_values, which says what the values mean")
        if self.mask_values and self.reduce_zero_label:
            raise ValueError("data.mask_values says what 0 means: set data.reduce_zero_label=false")
        return self

    @model_validator(mode="after")
    def _windows_overlap(self) -> SegmentationDataSection:
        if self.stride is not None and self.window != "slide":
            raise ValueError("data.stride requires data.window=slide")
        if self.step > self.crop_size:
            raise ValueError(f"data.stride ({self.stride}) would leave gaps between windows of {self.crop_size}")
        return self

    @property
    def step(self) -> int:
        """From window to window, pixels."""
        return self.stride or 2 * self.crop_size // 3


class SegmentationAugmentSection(Section):
    """Random scale, crop, flip and photometric distortion (Sec. 4.5, mmseg's)."""

    scale: tuple[float, float] = Field(default=(0.5, 2.0), description="range of the random scale")
    max_class_share: float = Field(
        default=0.75, gt=0, le=1, description="most of a crop that one class may fill; ten crops are tried"
    )
    hflip: float = Field(default=0.5, ge=0, le=1, description="probability of a mirrored image")
    photometric: float = Field(
        default=0.5, ge=0, le=1, description="probability of each change of brightness, contrast, saturation and hue"
    )

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> SegmentationAugmentSection:
        if not 0 < self.scale[0] <= self.scale[1] < 100:
            raise ValueError(f"augment.scale {self.scale} must be the least and the most, above 0 and below 100")
        return self


class SegmenterSection(Section):
    """What stands on the backbone: UperNet with an auxiliary FCN head, the paper's toolbox's settings as defaults."""

    channels: Width = Field(default=512, description="width of the decoder")
    pool_scales: list[Annotated[int, Field(ge=1, le=64)]] = Field(
        default=[1, 2, 3, 6], description="of the pyramid pooling"
    )
    aux_channels: Width = Field(default=256, description="width of the auxiliary head, on the stage-3 map")
    aux_weight: float = Field(default=0.4, ge=0, description="of its loss; 0 leaves it out")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="of channels, before both classifiers")


class SegmentationRecipe(Recipe):
    """One experiment in semantic segmentation; the monitored metric is mIoU."""

    task: Literal["segmentation"] = "segmentation"
    data: SegmentationDataSection = SegmentationDataSection()
    augment: SegmentationAugmentSection = SegmentationAugmentSection()
    segmenter: SegmenterSection = SegmenterSection()

    @classmethod
    def choices(cls, start: Start) -> Choices:
        """By the number of training images and the machine (docs/log.md has the runs behind the numbers)."""
        n, weights = start.images, start.weights
        epochs = (80 if n < 200 else 40 if n < 2_000 else 20) if start.gpu else 30 if n < 200 else 12
        machine = "a GPU: the paper's" if start.gpu else "a CPU: a fraction of the paper's, so that it takes minutes"
        begin = "pretrained backbone" if weights else "random weights"
        batch = -(-min(8, max(n, 2)) // start.world) * start.world
        found: Choices = {
            "optim.batch_size": (min(8, max(n, 2)), f"{n:,} training images"),
            "optim.global_batch": (batch, f"{n:,} training images"),
            "data.short_side": (512 if start.gpu else 320, machine),
            "data.long_side": (2048 if start.gpu else 1280, machine),
            "data.crop_size": (512 if start.gpu else 256, machine),
            "segmenter.channels": (512 if start.gpu else 128, machine),
            "segmenter.aux_channels": (256 if start.gpu else 64, machine),
            "model.freeze_batchnorm": (weights, f"{begin}, small batches"),
            "optim.base_lr": (4e-4, begin),
            "optim.layer_decay": (0.9 if weights else None, begin),
            "optim.head_lr": (3.0 if weights else 1.0, begin),
        }
        return super().choices(start) | start.schedule(epochs, evaluations=4) | found
