"""What a recipe for image classification may say beside what all recipes share."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from conv2former.config import MOST_SIDE, Choices, ImagesSection, ModelSection, Recipe, Section, Start
from conv2former.errors import plural


class DataSection(ImagesSection):
    """Images in and how they are read."""

    source: Literal["folder", "tar", "wds", "hfds", "digits"] = Field(
        default="folder",
        description="'folder' for class folders, 'tar' for tar files of them, 'wds' for webdataset shards, 'hfds' for "
        "a Hugging Face dataset, 'digits' for the handwritten digits of the quick start",
    )
    input_size: int = Field(
        default=224, ge=8, le=MOST_SIDE // 2, description="side of the square that the network sees, pixels"
    )
    val_fraction: float = Field(default=0.0, ge=0, lt=1, description="fraction held out where there is no val/ folder")
    crop_pct: float = Field(default=0.9, gt=0, le=1, description="fraction of the resized image kept in evaluation")
    interpolation: Literal["bilinear", "bicubic"] = Field(default="bicubic", description="how images are resized")

    @model_validator(mode="after")
    def _few_pixels(self) -> DataSection:
        if (side := self.input_size / self.crop_pct) > MOST_SIDE:
            raise ValueError(
                f"data.crop_pct={self.crop_pct:g} would enlarge images to {side:,.0f} pixels, more than {MOST_SIDE:,}"
            )
        return self

    def timm_config(self) -> dict[str, Any]:
        """How images are to be prepared for evaluation, in timm's words."""
        return dict(
            input_size=(3, self.input_size, self.input_size),
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode="center",
        )


class AugmentSection(Section):
    """Training augmentation, all of timm's. The defaults leave everything off but the crop and the flip."""

    scale: tuple[float, float] = Field(default=(0.08, 1.0), description="area of the random crop")
    ratio: tuple[float, float] = Field(default=(0.75, 1.3333333), description="aspect ratio of the random crop")
    hflip: float = Field(default=0.5, ge=0, le=1, description="probability of a mirrored image")
    color_jitter: float = Field(default=0.0, ge=0, description="used where auto_augment is not")
    auto_augment: str | None = Field(default=None, description="timm's policy string, rand-m9-mstd0.5-inc1 for example")
    random_erasing: float = Field(default=0.0, ge=0, le=1, description="probability that a rectangle is erased")
    mixup: float = Field(default=0.0, ge=0, description="alpha of MixUp")
    cutmix: float = Field(default=0.0, ge=0, description="alpha of CutMix")
    mix_prob: float = Field(default=1.0, ge=0, le=1, description="probability that a batch is mixed at all")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="fraction of the target that all classes share")

    @model_validator(mode="after")
    def _crops_are_ranges(self) -> AugmentSection:
        for name, (least, most), limit in (("scale", self.scale, 1), ("ratio", self.ratio, 100)):
            if not 0 < least <= most <= limit:
                raise ValueError(f"augment.{name} {(least, most)} must be (least, most), above 0 and up to {limit}")
        return self

    @model_validator(mode="after")
    def _policy_is_read_whole(self) -> AugmentSection:
        _, *settings = (self.auto_augment or "").split("-")  # timm passes over what it does not know
        if wrong := [part for part in settings if not re.fullmatch(r"[a-z]+[0-9.]+|t(weights|3aw?)", part)]:
            raise ValueError(f"augment.auto_augment: {wrong[0]!r} is no setting such as m9, mstd0.5 or inc1")
        return self


class ClassificationRecipe(Recipe):
    """One experiment in image classification; the monitored metric is top-1 accuracy."""

    task: Literal["classification"] = "classification"
    data: DataSection = DataSection()
    augment: AugmentSection = AugmentSection()

    @classmethod
    def choices(cls, start: Start) -> Choices:
        """By the number of training images (docs/log.md has the runs behind the numbers)."""
        n, weights = start.images, start.weights
        images, begin = f"{n:,} training images", "from pretrained weights" if weights else "from random weights"
        few, many = n < 2_000, n >= 50_000
        # of few images a batch that does not divide them leaves out many: 8 of 24, for 16
        fitting = max((16, 14, 12, 10, 8), key=lambda size: n - n % (size * start.world))
        largest = fitting if n < 200 else 32 if few else 64
        size = min(largest, max(n // start.world, 1))
        epochs = 60 if n < 200 else 30 if few else 10 if many else 20
        if not weights:
            epochs *= 2
        held = 0.02 if many else 0.1 if n >= 1_000 else 0.2
        ema = (None, "there is none with FSDP") if start.sharded else (0.98 if few else 0.999, images)
        found: Choices = {
            "data.val_fraction": (held, f"{images}: {round(held * n):,} are enough to tell models apart"),
            "model.fit_head": (weights, begin),
            "model.freeze_batchnorm": (weights and few, f"{begin}, {images}"),
            "model.drop_path_rate": (0.2 if many else 0.0 if few else 0.1, images),
            "optim.batch_size": (size, f"{images} make {plural(n // (size * start.world), 'step')} an epoch"),
            "optim.base_lr": (5e-4 if weights else 1e-3, begin),
            "optim.layer_decay": (0.9 if weights and not few else None, images),
            "optim.head_lr": (1.0, "the classifier is fitted before" if weights else begin),
            "optim.ema_decay": ema,
            "augment.scale": ((0.35, 1.0), "milder than ImageNet's"),
            "augment.auto_augment": ("rand-m9-mstd0.5-inc1" if many else "rand-m5-mstd0.5-inc1", images),
            "augment.random_erasing": (0.0 if few else 0.1, images),
            "augment.label_smoothing": (0.1, "keeps the network from becoming too sure"),
        }
        return super().choices(start) | start.schedule(epochs, evaluations=epochs) | found

    @property
    def pairs(self) -> bool:
        """MixUp and CutMix mix the images of a forward pass in pairs."""
        return bool(self.augment.mixup or self.augment.cutmix)

    @property
    def brings_data(self) -> bool:
        """The quick start's digits are in the package."""
        return self.data.source == "digits"

    @classmethod
    def around(cls, architecture: str) -> Self:
        """For a classifier of which nothing but its architecture is known."""
        return cls(name=architecture, model=ModelSection(name=architecture))

    @model_validator(mode="after")
    def _mixing_needs_pairs(self) -> ClassificationRecipe:
        if self.pairs and self.optim.batch_size % 2:
            raise ValueError(f"optim.batch_size ({self.optim.batch_size}) must be even with augment.mixup or cutmix")
        return self
