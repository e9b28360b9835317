"""What detection and segmentation share in the engine's terms: a head on a backbone, and its files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from conv2former.checkpoints.dense import save_dense, start_from, with_saved_args
from conv2former.config import ModelSection
from conv2former.data.loading import KeyedDataset
from conv2former.engine.distributed import say_once
from conv2former.workflows.base import Workflow


class DenseWorkflow(Workflow):
    """A task whose network stands on a ``Backbone``.

    Attributes:
        train_dataset: Augmented images, called with a source, the recipe's ``data`` and ``augment``, and options of
            ``KeyedDataset``.
        val_dataset: Whole images, called with a source, the recipe's ``data``, and such options.
    """

    train_dataset: ClassVar[Any]
    val_dataset: ClassVar[Any]

    @abstractmethod
    def network(self, section: ModelSection, *, num_classes: int) -> Any:
        """The network with new weights; raises UserError."""

    def build(self, section: ModelSection, *, classes: Sequence[str]) -> tuple[Any, dict[str, Any]]:
        """The network; of the weights it says what was loaded."""
        section = with_saved_args(section)
        model = self.network(section, num_classes=len(classes))
        if section.weights:
            say_once(start_from(section.weights, model, task=self.recipe.task))
        return model, dict(section.args)

    def train_data(self, source: Any, *, on_bad_image: Literal["error", "replace"]) -> KeyedDataset:
        """Augmented images."""
        recipe = self.recipe
        options = dict(seed=recipe.engine.seed, on_bad_image=on_bad_image, max_pixels=recipe.data.max_pixels)
        return self.train_dataset(source, recipe.data, recipe.augment, **options)

    def val_data(self, source: Any, *, on_bad_image: Literal["error", "mask"]) -> KeyedDataset:
        """Whole images at one scale."""
        data = self.recipe.data
        return self.val_dataset(source, data, on_bad_image=on_bad_image, max_pixels=data.max_pixels)

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
        """Our folder for detectors and segmenters."""
        save_dense(folder, self.recipe, state=state, classes=classes, model_args=model_args, note=note)
