"""Image classification in the engine's terms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conv2former import checkpoints
from conv2former.config import ModelSection
from conv2former.engine.run_dir import RunFolder
from conv2former.evaluation.classification import Evaluation, evaluate_source, write_report
from conv2former.models import zoo
from conv2former.tasks.classification.data import ImageDataset, eval_transform, train_transform
from conv2former.tasks.classification.sources import ImageSource
from conv2former.tasks.classification.splits import Splits, open_splits
from conv2former.tasks.classification.task import ClassificationTask, build_model
from conv2former.workflows.base import Workflow

SAMPLES = 8  # held-out pictures that the quick start leaves as files


class ClassificationWorkflow(Workflow):
    """Classifiers in timm's layout."""

    headline = "val_top1"

    def open_splits(self, root: Path | None) -> Splits:
        """Class folders, archives, datasets: see ``data.splits``."""
        return open_splits(self.recipe.data, root, seed=self.recipe.engine.seed)

    def build(self, section: ModelSection, *, classes: Sequence[str]) -> tuple[Any, dict[str, Any]]:
        """A timm classifier."""
        return build_model(section, classes=list(classes))

    def try_out(self, model: Any) -> None:
        """One image of the training size."""
        size = self.recipe.data.input_size
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, size, size))

    def at_size(self) -> str:
        """Where the size stands."""
        return f"at data.input_size={self.recipe.data.input_size}"

    def task(self, model: Any, splits: Splits) -> ClassificationTask:
        """The LightningModule."""
        return ClassificationTask(model, self.recipe)

    def train_shape(self) -> tuple[int, int]:
        """The square that the network sees."""
        return self.recipe.data.input_size, self.recipe.data.input_size

    def trial_loss(self, model: Any, images: Tensor) -> Tensor:
        """The cross entropy, which keeps as much as any of the losses."""
        return classification_loss(model, images)

    def counts(self, model: Any, *, classes: int) -> list[str]:
        """As the paper counts."""
        section, size = self.recipe.model, self.recipe.data.input_size
        params, macs = zoo.count(section.name, image_size=size, **section.args, num_classes=classes)
        return [
            f"{section.name}: {params:,} parameters, {macs / 1e9:.3f} G multiply-adds for an image of {size} pixels"
        ]

    @property
    def brings_data(self) -> bool:
        """Only scikit-learn's digits do."""
        return self.recipe.data.source == "digits"

    def train_data(self, source: ImageSource, *, on_bad_image: Literal["error", "replace"]) -> ImageDataset:
        """Augmented images."""
        recipe = self.recipe
        return ImageDataset(
            source,
            train_transform(recipe.data, recipe.augment),
            seed=recipe.engine.seed,
            on_bad_image=on_bad_image,
            max_pixels=recipe.data.max_pixels,
        )

    def val_data(self, source: ImageSource, *, on_bad_image: Literal["error", "mask"]) -> ImageDataset:
        """The middle of each image."""
        limit = self.recipe.data.max_pixels
        return ImageDataset(source, eval_transform(self.data_config), on_bad_image=on_bad_image, max_pixels=limit)

    def val_batch(self, per_process: int) -> int:
        """As many as in training."""
        return per_process

    @property
    def data_config(self) -> dict[str, Any]:
        """timm's words for how the recipe's images are to be prepared."""
        data = self.recipe.data
        return dict(
            input_size=(3, data.input_size, data.input_size),
            interpolation=data.interpolation,
            mean=data.mean,
            std=data.std,
            crop_pct=data.crop_pct,
            crop_mode="center",
        )

    def save(
        self,
        model: nn.Module,
        folder: Path,
        *,
        state: dict[str, Tensor],
        classes: list[str],
        model_args: dict[str, Any],
        note: dict[str, Any],
    ) -> None:
        """A folder for timm's ``local-dir:``."""
        checkpoints.save_pretrained(
            model,
            folder,
            state_dict=state,
            label_names=classes,
            model_args=model_args,
            pretrained_cfg=self.data_config,
            extra={"conv2former": note},
        )

    def report(self, run: RunFolder, source: ImageSource, *, batch_size: int, device: str) -> Evaluation:
        """Counts, confusion matrix, a sheet of predictions; the quick start's sample pictures."""
        data = self.recipe.data
        evaluation = evaluate_source(
            checkpoints.load_pretrained(run.best),
            source,
            batch_size=batch_size,
            workers=data.workers,
            device=device,
            on_bad_image=data.on_bad_image,
            max_pixels=data.max_pixels,
        )
        write_report(evaluation, source, run.path)
        if data.source == "digits":
            _write_samples(run, source)
        return evaluation


def classification_loss(model: Any, images: Tensor) -> Tensor:
    """The cross entropy of a classifier's output with nothing."""
    logits = model(images)
    return F.cross_entropy(logits, torch.zeros_like(logits))


def _write_samples(run: RunFolder, source: ImageSource) -> None:
    """A few held-out pictures as files, to try ``predict`` on where the data brings none."""
    folder = run.path / "samples"
    folder.mkdir(exist_ok=True)
    for index in range(0, len(source), -(-len(source) // SAMPLES)):
        source.load(index).save(folder / source.name(index))
