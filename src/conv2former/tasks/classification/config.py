"""What a recipe for image classification may say beside what all recipes share."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from conv2former.config import Choices, ImagesSection, ModelSection, Recipe, Section, Start


class DataSection(ImagesSection):
    """Images in and how they are read."""

    source: Literal["folder", "tar", "wds", "hfds", "digits"] = Field(
        default="folder",
        description="'folder' for class folders, 'tar' for tar files of them, 'wds' for webdataset shards, 'hfds' for "
        "a Hugging Face dataset, 'digits' for the handwritten digits of the quick start",
    )
    input_size: int = Field(default=224, ge=8, description="side of the square that the network sees, pixels")
    val_fraction: float = Field(default=0.0, ge=0, lt=1, description="fraction held out where there is no val/ folder")
    crop_pct: float = Field(default=0.9, gt=0, le=1, description="fraction of the resized image kept in evaluation")
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"

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
    hflip: float = Field(default=0.5, ge=0, le=1)
    color_jitter: float = Field(default=0.0, ge=0, description="used where auto_augment is not")
    auto_augment: str | None = Field(default=None, description="timm's policy string, rand-m9-mstd0.5-inc1 for example")
    random_erasing: float = Field(default=0.0, ge=0, le=1)
    mixup: float = Field(default=0.0, ge=0, description="alpha of MixUp")
    cutmix: float = Field(default=0.0, ge=0, description="alpha of CutMix")
    mix_prob: float = Field(default=1.0, ge=0, le=1, description="probability that a batch is mixed at all")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


class ClassificationRecipe(Recipe):
    """One experiment in image classification; the monitored metric is top-1 accuracy."""

    task: Literal["classification"] = "classification"
    data: DataSection = DataSection()
    augment: AugmentSection = AugmentSection()

    @classmethod
    def choices(cls, start: Start) -> Choices:
        """By the number of training images (docs/log.md has the runs behind the numbers)."""
        n = start.images
        few, many = n < 1_000, n >= 50_000
        size = 16 if n < 200 else 32 if n < 2_000 else 64
        known = super().choices(start)
        found: Choices = {
            "data.val_fraction": ((0.2, "few images") if few else (0.02, "many images") if many else (0.1, "")),
            "optim.batch_size": (size, f"{n:,} training images make {n // size} steps an epoch"),
            "optim.base_lr": (2e-4, ""),
            "optim.layer_decay": (0.8, ""),
            "optim.head_lr": (1.0, ""),
            "schedule.epochs": (20, ""),
            "schedule.warmup_epochs": (2, ""),
            "model.fit_head": (start.weights, ""),
            "augment.scale": ((0.5, 1.0), ""),
            "augment.auto_augment": (None, ""),
            "augment.random_erasing": (0.0, ""),
            "augment.label_smoothing": (0.1, ""),
        }
        return known | found

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
