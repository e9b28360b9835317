"""What the engine asks of a task: its data, its network, its files, its report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from conv2former import checkpoints
from conv2former.config import ModelSection
from conv2former.data.loading import KeyedDataset
from conv2former.engine.run_dir import RunFolder
from conv2former.errors import UserError
from conv2former.tasks.base import Task
from conv2former.tasks.classification.splits import AnySplits


class AnyEvaluation(Protocol):
    """The figures of a trained model on a set of images, of any task."""

    def figures(self) -> dict[str, Any]:
        """What goes into the run's history, percent."""
        ...

    def line(self) -> str:
        """The figures in words."""
        ...

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        ...


class Workflow(ABC):
    """One task with one recipe.

    Args:
        recipe: Of the task.

    Attributes:
        headline: The column of the metrics that is maximised.
    """

    headline: ClassVar[str]

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe

    @abstractmethod
    def open_splits(self, root: Path | None) -> AnySplits:
        """The training and the validation set; raises UserError."""

    @abstractmethod
    def build(self, section: ModelSection, *, classes: Sequence[str]) -> tuple[Any, dict[str, Any]]:
        """The network and the arguments of its backbone that rebuild it; raises UserError."""

    @abstractmethod
    def try_out(self, model: Any) -> None:
        """Runs the network once at the size of the recipe, so that what it refuses shows before the first step."""

    @abstractmethod
    def task(self, model: Any, splits: Any) -> Task:
        """The LightningModule, for the sets of ``open_splits``."""

    @abstractmethod
    def train_data(self, source: Any, *, on_bad_image: Literal["error", "replace"]) -> KeyedDataset:
        """Training samples under their keys."""

    @abstractmethod
    def val_data(self, source: Any, *, on_bad_image: Literal["error", "mask"]) -> KeyedDataset:
        """Validation samples."""

    @abstractmethod
    def at_size(self) -> str:
        """``at data.KEY=SIZE``: the size that ``try_out`` takes."""

    @abstractmethod
    def train_shape(self) -> tuple[int, int]:
        """Height and width of a training image, as far as it is fixed."""

    @abstractmethod
    def trial_loss(self, model: Any, images: Tensor) -> Tensor:
        """A number through all of the network that holds activations, of images (B, 3, H, W) and no targets."""

    @abstractmethod
    def counts(self, model: Any, *, classes: int) -> list[str]:
        """Parameters and multiply-adds in words, of the network on the meta device."""

    def count_lines(self, model: Any, *, image: tuple[int, int], parts: Sequence[str]) -> list[str]:
        """What ``counts`` says of a network with a backbone, which is evaluated on an image (H, W)."""
        sizes = {
            part: sum(p.numel() for p in getattr(model, part).parameters())
            for part in parts
            if getattr(model, part, None)
        }
        total = sum(p.numel() for p in model.parameters())
        own = ", ".join(f"{part} {size:,}" for part, size in sizes.items())
        lines = [f"{self.recipe.model.name}: {total:,} parameters ({own})"]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.run_for_counts(model.eval(), torch.empty(1, 3, *image, device="meta"))
        macs = counter.get_total_flops() / 2e9
        return [*lines, f"{macs:.1f} G multiply-adds for an image of {image[0]} x {image[1]} pixels"]

    def run_for_counts(self, model: Any, images: Tensor) -> None:
        """The forward pass whose multiply-adds are counted."""
        model(images)

    @property
    def brings_data(self) -> bool:
        """Whether the recipe needs no ``--data``."""
        return False

    def check_batch(self, per_process: int, world: int) -> None:
        """Refuses a batch that the network cannot be trained on; raises UserError."""
        return

    def compile(self, model: Any) -> None:
        """Has the network compiled, in place: the names in the state dict stay."""
        model.compile(**self.compile_options)

    @property
    def compile_options(self) -> dict[str, Any]:
        """What ``torch.compile`` is told."""
        return dict(mode=self.recipe.engine.compile_mode)

    def val_batch(self, per_process: int) -> int:
        """Images of a forward pass in validation, where training takes ``per_process``."""
        return 1

    @abstractmethod
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
        """Writes the weights with all that is needed to build the network again."""

    @abstractmethod
    def report(self, run: RunFolder, source: Any, *, batch_size: int, device: str) -> AnyEvaluation:
        """Evaluates the run's best weights as they lie on the disk, and draws."""

    def check_weights(self) -> None:
        """Refuses weights that were trained on images normalised in another way."""
        weights = self.recipe.model.weights
        for key, wanted in checkpoints.saved_normalisation(str(weights)).items():
            given = tuple(getattr(self.recipe.data, key))
            if wanted != given:
                raise UserError(
                    f"model.weights ({weights}) expects images of {key} {wanted}, the recipe gives {given}: "
                    f"add --set data.{key}={list(wanted)}"
                )
