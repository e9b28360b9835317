"""The contract: what the engine and the tools ask of a task. A new task is one class (docs/add_a_task.md)."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import numpy as np
import torch
from PIL import Image
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from conv2former.checkpoints.exported import ExportedNetwork
from conv2former.config import ModelSection, Recipe
from conv2former.data.loading import KeyedDataset, Normalizer
from conv2former.data.sources import Source, Splits
from conv2former.errors import UserError
from conv2former.tasks.exportable import Exportable


@dataclass(frozen=True)
class Evaluation:
    """What a model reaches on a set of images, over all processes.

    Attributes:
        metrics: The numbers that a run keeps; ``top1`` is the column ``val_top1``. ``loss`` first if there is one, then
            the monitored one. None where a number is not defined.
        line: The main ones in words.
        details: All that ``evaluation.json`` holds; ``images`` counts those that were evaluated.
        records: What the images of the report are drawn from.
        sound: Whether all that was computed was finite; weights of another evaluation are never the best.
        table: For people: the columns' names, then a row for each class, averages last.
        useless: What makes a model useless whose numbers may look fine, in words: it finds one class everywhere.
    """

    metrics: dict[str, float | None]
    line: str
    details: dict[str, Any]
    records: Any = None
    sound: bool = True
    table: list[list[str]] = field(default_factory=list)
    useless: str = ""


class Metric(Protocol):
    """Counts over images, in any order and any number of batches."""

    def to(self, device: torch.device) -> Any:
        """Moves the counts."""
        ...

    def result(self) -> Evaluation:
        """Of all that was counted, over all processes; to be called on all of them."""
        ...


class Prepared(NamedTuple):
    """An image as the network sees it.

    Attributes:
        pixels: (h, w, 3) of uint8.
        size: (H, W) of the image in its file.
    """

    pixels: np.ndarray
    size: tuple[int, int]


@dataclass(frozen=True)
class Line:
    """Something that was found on an image.

    Attributes:
        label: Of the class.
        value: Probability, score or fraction of the pixels, 0 to 1.
        colour: In which it is drawn, (red, green, blue); None where it is not.
        box: Where it is, x0, y0, x1, y1 in the pixels of the file.
        mask: Its pixels, as COCO's compressed run lengths (``size``, ``counts``).
    """

    label: str
    value: float
    colour: tuple[int, int, int] | None = None
    box: Sequence[float] | None = None
    mask: dict[str, Any] | None = None


@dataclass(frozen=True)
class Prediction:
    """What a model makes of an image.

    Attributes:
        fields: For the JSON line of ``conv2former predict``.
        draw: Turns the image into an annotated one.
        lines: What was found, the most important first, for the demo.
        plain: Whether ``draw`` adds nothing but the lines.
        mask: Makes an image of the classes of the pixels, of a segmentation model.
    """

    fields: dict[str, Any]
    draw: Callable[[Image.Image], Image.Image]
    lines: list[Line] = field(default_factory=list)
    plain: bool = False
    mask: Callable[[], Image.Image] | None = None


@dataclass(frozen=True)
class Reported:
    """A metric by which trained models are judged.

    Attributes:
        metric: The Hugging Face hub's name of it.
        title: Its name with its unit.
        keys: Where it stands in ``evaluation.json``.
    """

    metric: str
    title: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Words:
    """What a model card and the demo say of a task.

    Attributes:
        tags: Of the Hugging Face hub, the pipeline's first.
        purpose: What a model is for: "trained ... to say which ...".
        unknown: What happens to an image unlike those of the training.
        heading: Above what was found on an image.
        nothing: In its place.
    """

    tags: tuple[str, ...]
    purpose: str
    unknown: str
    heading: str
    nothing: str = "Nothing found."


class Task(nn.Module, ABC):
    """A network with all that is known of its task: data, loss, metric, predictions, files.

    Its state dict has the network under ``model`` and the moving average of its weights, if there is one, under
    ``average``.

    Attributes:
        name: Of the task, as recipes say it.
        config_class: The class of its recipes.
        monitor: The metric that is maximised.
        reported: The metrics of model cards and tables, the monitored one first.
        words: For model cards and the demo.
        options: Attributes that ``evaluate`` and ``predict`` may set.
        layers: What its predictions have in their lines: 'boxes', 'masks'; the demo draws these one by one.
        one_at_a_time: Whether evaluation and prediction take images one by one, because their sizes differ.
        assumed_classes: Classes of a dry run that knows no data; 1 where there is nothing to tell apart.
        model: The network.
        recipe: What it is trained with.
        classes: Names of the K classes; one name where there is nothing to tell apart.
        model_args: Arguments of ``timm.create_model`` that rebuild the backbone.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[Recipe]]
    monitor: ClassVar[str]
    reported: ClassVar[tuple[Reported, ...]]
    words: ClassVar[Words]
    options: ClassVar[frozenset[str]] = frozenset()
    layers: ClassVar[tuple[str, ...]] = ()
    one_at_a_time: ClassVar[bool] = True
    assumed_classes: ClassVar[int] = 1

    def __init__(
        self, model: nn.Module, recipe: Any, classes: Sequence[str], *, model_args: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.recipe, self.classes = recipe, list(classes)
        self.model_args = dict(recipe.model.args if model_args is None else model_args)
        self.normalizer = Normalizer(recipe.data.mean, recipe.data.std)
        self.average: ModelEmaV3 | None = None
        self.fused: tuple[Any, ...] = ()  # a copy of the network for evaluation; in a tuple, so that it is no child
        self.sharded_blocks: set[str] | None = None  # of the backbone, by FSDP; None for all
        # as it was built: FSDP and the compiler change the network's class; in a tuple, as above
        self._built = (copy.copy(model),)

    # --- the network -----------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def build(cls, recipe: Any, classes: Sequence[str], *, section: ModelSection | None = None) -> Self:
        """With new weights, or with those that ``model.weights`` names; raises UserError.

        Args:
            recipe: What it will be trained with.
            classes: K names.
            section: In the place of ``recipe.model``.
        """

    @classmethod
    @abstractmethod
    def load(cls, path: Path) -> Self:
        """A saved model, in evaluation mode; raises UserError."""

    @classmethod
    def of_exported(cls, network: ExportedNetwork) -> Self:
        """With an exported file in the place of the network, in evaluation mode; raises UserError."""
        raise UserError(f"{network.path} holds a {cls.name} model, which is not computed from a file: give the run")

    @abstractmethod
    def save(self, folder: Path, *, state: dict[str, Tensor], note: dict[str, Any]) -> None:
        """Writes weights with all that ``load`` needs, whole or not at all; ``note`` is kept beside them."""

    @property
    def built(self) -> Any:
        """The network as it was built."""
        return self._built[0]

    @property
    def backbone(self) -> Any:
        """timm's model in the network: what is frozen, fused, explained."""
        return self.model

    @property
    def trunk(self) -> nn.Module:
        """The part of the network that every image goes through first, up to its last map at least."""
        return self.model

    @property
    def evaluated(self) -> Any:
        """The network whose weights are evaluated and saved."""
        return self.fused[0] if self.fused else self.model if self.average is None else self.average.module

    def track_average(self, decay: float) -> None:
        """From now on there is a moving average of the weights, which the trainer updates."""
        self.average = ModelEmaV3(self.model, decay=decay, use_warmup=True).requires_grad_(False)

    def compile(self, *args: Any, **options: Any) -> None:
        """Has the network compiled, in place: the names in the state dict stay."""
        self.model.compile(*args, **options)

    # --- data ------------------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def open_splits(cls, recipe: Any, root: Path | None) -> Splits:
        """The training and the validation set; raises UserError."""

    @abstractmethod
    def eval_source(self, root: Path | None) -> Source:
        """Images of ``evaluate --data``, with the classes of the model in its order; raises UserError."""

    @abstractmethod
    def train_dataset(self, source: Any, *, on_bad_image: Literal["error", "replace"]) -> KeyedDataset:
        """Augmented images."""

    def train_options(self, on_bad_image: Literal["error", "replace"]) -> dict[str, Any]:
        """The recipe's options of a ``KeyedDataset`` to train on."""
        recipe = self.recipe
        return dict(seed=recipe.engine.seed, on_bad_image=on_bad_image, max_pixels=recipe.data.max_pixels)

    @abstractmethod
    def eval_dataset(self, source: Any, *, on_bad_image: Literal["error", "mask"], max_pixels: int) -> KeyedDataset:
        """Images as ``preprocess`` gives them."""

    @abstractmethod
    def preprocess(self, image: Image.Image) -> Prepared:
        """An image of Pillow's as the network sees it (see ``images.shown``); the processes that read images do it."""

    def prepared(self, images: Tensor) -> Tensor:
        """8-bit images (B, 3, H, W), normalised, in the memory layout that the recipe asks for."""
        images = self.normalizer(images)
        return images if self.recipe.engine.channels_last else images.contiguous()

    def inputs(self, pixels: np.ndarray) -> Tensor:
        """A view (h, w, 3) of uint8 as a batch of one, on the device of the model."""
        images = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]
        return self.prepared(images.to(self.normalizer.mean.device))

    # --- the head --------------------------------------------------------------------------------------------------

    def in_head(self, name: str) -> bool:
        """Whether a parameter of the network, by its name, belongs to what is new beside pretrained weights."""
        return False

    def cannot_fit_head(self) -> str | None:
        """Why the head cannot, or need not, be fitted to features before training; None if it can."""
        return f"{self.name} has no such head"

    def head_features(self, batch: Any) -> tuple[Tensor, Tensor]:
        """What goes into the head for a batch of ``eval_dataset``, (N, D), and what should come out, (N,)."""
        raise NotImplementedError

    def fit_head(self, features: Tensor, targets: Tensor, *, stopped: Callable[[], bool]) -> str:
        """Fits the head to all of them, or ends early if ``stopped``; returns a line that says how well it does."""
        raise NotImplementedError

    # --- learning and counting -------------------------------------------------------------------------------------

    @abstractmethod
    def example_batch(self, count: int) -> Any:
        """A batch of ``count`` blank images as in training; with it a network is tried before its first step."""

    @abstractmethod
    def training_step(self, batch: Any) -> Tensor:
        """The loss of a batch; random numbers come from the generators that the trainer has keyed."""

    @abstractmethod
    def metric(self, source: Any, *, distributed: bool = False) -> Metric:
        """A new one; if ``distributed``, all processes count parts of ``source``."""

    @abstractmethod
    def eval_step(self, batch: Any, metric: Any) -> None:
        """Counts a batch of ``eval_dataset``."""

    def count(self, batch: Any, metric: Callable[[], Any]) -> None:
        """``eval_step`` for the trainer: Lightning Fabric copies dictionaries and dataclasses among the arguments."""
        self.eval_step(batch, metric())

    def check_batch(self, per_process: int, world: int) -> None:
        """Refuses a batch that the network cannot be trained on; raises UserError."""
        return

    # --- results ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def predict(self, batch: Sequence[Prepared]) -> list[Prediction]:
        """One prediction for each preprocessed image."""

    def draw(self, evaluation: Evaluation, source: Any, folder: Path) -> None:
        """Draws the report's images, ``predictions.png`` and others; raises OSError."""
        return

    def scores(self) -> nn.Module | None:
        """Normalised images (1, 3, H, W) -> a score for each class (1, K), for class activation maps; None without."""
        return None

    @abstractmethod
    def exportable(self, size: tuple[int, int] | None = None) -> Exportable:
        """The part that can be exported, for images of ``size`` (H, W) or of the model's own; raises UserError."""
