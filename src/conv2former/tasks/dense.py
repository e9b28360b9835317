"""What tasks on a ``Backbone`` share: building, files, images of any size one at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from conv2former import config
from conv2former.checkpoints import folder as folders
from conv2former.checkpoints.exported import ExportedNetwork
from conv2former.checkpoints.weights import copy_weights, open_weights
from conv2former.config import ModelSection
from conv2former.errors import UserError, say_once
from conv2former.models.meta import SkipFilling, bounded
from conv2former.tasks.base import Exportable, Task

DIVISOR = 32  # of the sides that the networks take


class DenseTask(Task):
    """A task whose network is an ``OnBackbone``.

    Attributes:
        split: Which part of the images is evaluated: 'train', 'val', 'test'; None for what is validated on, or all.
    """

    options = frozenset({"settings", "split"})
    split: str | None = None

    @classmethod
    @abstractmethod
    def network(cls, recipe: Any, section: ModelSection, classes: Sequence[str]) -> nn.Module:
        """The network with new weights; raises UserError."""

    @classmethod
    def build(cls, recipe: Any, classes: Sequence[str], *, section: ModelSection | None = None) -> Self:
        """The task; it says what of ``model.weights`` was loaded."""
        section = section or recipe.model
        if weights := open_weights(section):
            if weights.task not in ("classification", cls.name):
                raise UserError(
                    f"{weights.origin} holds a {weights.task} model: {cls.name} starts from one, or a classifier"
                )
            section = section.model_copy(update=dict(args=weights.args | section.args))
        with bounded(f"the recipe {recipe.name}"):
            model = cls.network(recipe, section, classes)
        if weights:
            prefix = "backbone.model." if weights.task == "classification" else ""
            others = weights.task == cls.name and weights.classes != list(classes)
            new = (
                dict.fromkeys(cls._for_classes(model, recipe, section, classes), "for other classes") if others else {}
            )
            say_once(copy_weights(weights, model, prefix=prefix, needed="backbone.", new=new))
        return cls(model, recipe, classes, model_args=section.args)

    @classmethod
    def _for_classes(cls, model: nn.Module, recipe: Any, section: ModelSection, classes: Sequence[str]) -> list[str]:
        """Names of the tensors that hold something for each class: with one more class they have another shape."""
        with torch.device("meta"), SkipFilling():
            larger = cls.network(recipe, section, [*classes, "one more"]).state_dict()
        return [name for name, tensor in model.state_dict().items() if larger[name].shape != tensor.shape]

    @classmethod
    def load(cls, path: Path) -> Self:
        """A model that ``save`` has written; raises UserError."""
        saved = folders.read_dense(path, cls.name)
        recipe = config.validated(cls.config_class, saved.recipe, str(saved.config_file))
        model = folders.load_dense(saved, lambda: cls.network(recipe, recipe.model, saved.classes))
        return cls(model, recipe, saved.classes).eval()

    @classmethod
    def of_exported(cls, network: ExportedNetwork) -> Self:
        path, raw, classes = network.path, network.facts["recipe"], network.facts["labels"]
        if raw is None or not classes or len({*classes}) < len(classes):
            raise UserError(f"{path} does not say of its model what predict and evaluate need: export the run again")
        return cls(network, config.validated(cls.config_class, raw, str(path)), classes).eval()

    def save(self, folder: Path, *, state: dict[str, Tensor], note: dict[str, Any]) -> None:
        """Our folder for networks that timm does not know."""
        args = self.model_args
        folders.save_dense(folder, self.recipe, state=state, classes=self.classes, model_args=args, note=note)

    @property
    def backbone(self) -> Any:
        """timm's model under the rest; an exported file is one piece."""
        return getattr(self.trunk, "model", self.trunk)

    @property
    def trunk(self) -> nn.Module:
        """The part that gives the four maps."""
        return getattr(self.model, "backbone", self.model)

    def in_head(self, name: str) -> bool:
        """All that stands on the backbone."""
        return not name.startswith("backbone.")

    def inputs(self, pixels: np.ndarray) -> Tensor:
        """A view (h, w, 3) as a batch of one, padded at the right and below with zeros, the mean colour."""
        return padded(super().inputs(pixels))

    def exported(self, network: nn.Module, outputs: list[str], size: tuple[int, int], **options: Any) -> Exportable:
        """An export whose images are brought to a size, whatever their sides; ``options`` are ``part`` and ``note``."""

        data = self.recipe.data
        recipe = folders.portable(self.recipe, self.model_args)
        config = dict(interpolation="bilinear", mean=data.mean, std=data.std, recipe=recipe)

        def squeeze(image: Image.Image) -> Image.Image:
            return image.resize((size[1], size[0]), Image.Resampling.BILINEAR)

        return Exportable(network, outputs, size, squeeze, config, **options)


def fitted(size: tuple[int, int], *, short: float, long: float) -> tuple[int, int]:
    """(width, height) scaled so that neither side exceeds its limit, as the paper's toolboxes do."""
    factor = min(long / max(size), short / min(size))
    return max(int(size[0] * factor + 0.5), 1), max(int(size[1] * factor + 0.5), 1)


def padded_with_mean(images: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Normalised images (B, 3, H, W) with zeros, the mean colour, outside of each one's (h, w)."""
    for image, (height, width) in zip(images, sizes, strict=True):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return images


def padded(images: Tensor) -> Tensor:
    """Normalised images (B, 3, h, w), padded with zeros at the right and below to multiples of ``DIVISOR``."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % DIVISOR, 0, -height % DIVISOR))


def to_multiple(side: int) -> int:
    """The next multiple of ``DIVISOR``."""
    return -(-side // DIVISOR) * DIVISOR


def stacked(views: Sequence[np.ndarray]) -> Tensor:
    """Views (h, w, 3) as one tensor (B, 3, H, W), channels last, sides the next multiples of ``DIVISOR``."""
    height, width = (to_multiple(max(view.shape[axis] for view in views)) for axis in (0, 1))
    pixels = np.zeros((len(views), height, width, 3), np.uint8)
    for row, view in zip(pixels, views, strict=True):
        row[: view.shape[0], : view.shape[1]] = view
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)
