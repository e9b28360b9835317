"""Trained models of any task as what is explained: the network, its backbone, and pictures as it sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from conv2former import checkpoints
from conv2former.data.loading import Normalizer
from conv2former.errors import UserError, nearest, some
from conv2former.models.conv2former import Conv2Former
from conv2former.prediction import open_predictor
from conv2former.tasks.detection.data import eval_view
from conv2former.tasks.segmentation.data import views

DIVISOR = 32  # of the sides that detectors and segmenters take


@dataclass(frozen=True)
class Explained:
    """A trained model.

    Attributes:
        checkpoint: As the user named it.
        task: 'classification', 'segmentation' or 'detection'.
        network: All of it, in evaluation mode.
        backbone: timm's model; the network itself of a classifier.
        classes: K names.
        view: A picture as the network sees it, (h, w, 3) of uint8.
        normalizer: 8-bit pictures to what it expects.
        place: Where it computes.
    """

    checkpoint: Path
    task: str
    network: Any
    backbone: Any
    classes: list[str]
    view: Callable[[Image.Image], np.ndarray]
    normalizer: Normalizer
    place: torch.device

    def tensor(self, view: np.ndarray) -> Tensor:
        """A view as a batch of one, (1, 3, H, W); dense models get it padded with the mean at the right and below."""
        image = self.normalizer(torch.tensor(view).permute(2, 0, 1)[None].to(self.place))
        if self.task == "classification":
            return image
        height, width = view.shape[:2]
        return F.pad(image, (0, -width % DIVISOR, 0, -height % DIVISOR))

    @property
    def trunk(self) -> Any:
        """What a batch goes through first: a classifier whole, else the part that gives the four maps."""
        return self.network if self.task == "classification" else self.network.backbone

    def class_index(self, name: str) -> int:
        """A class by its name, or by its number where none is called so; raises UserError."""
        if name in self.classes:
            return self.classes.index(name)
        if name.isdecimal() and int(name) < len(self.classes):
            return int(name)
        hint = nearest(name, self.classes) or f": it knows {some(self.classes)}"
        raise UserError(f"{self.checkpoint} knows no class {name!r}{hint}")


def open_explained(checkpoint: Path, *, device: str = "auto") -> Explained:
    """The model of a run folder or a saved one, of any task.

    Raises:
        UserError: The checkpoint cannot be used.
    """
    return as_explained(checkpoint, checkpoints.saved_task(checkpoint), open_predictor(checkpoint, device=device))


def as_explained(checkpoint: Path, task: str, predictor: Any) -> Explained:
    """A model that is open already.

    Args:
        checkpoint: What messages call it.
        task: Of the model.
        predictor: ``open_predictor``'s.
    """
    if task == "classification":
        network = backbone = predictor.model
        classes, view, normalizer = predictor.labels, predictor.prepare, predictor.normalizer
    else:
        network, data, classes = predictor.model, predictor.saved.recipe.data, predictor.saved.classes
        backbone, normalizer = network.backbone.model, Normalizer(data.mean, data.std)

        def view(image: Image.Image) -> np.ndarray:
            return eval_view(image, data).picture(image) if task == "detection" else views(image, data, (1.0,))[0]

    place = next(network.parameters()).device
    return Explained(checkpoint, task, network, backbone, classes, view, normalizer.to(place), place)


@dataclass(frozen=True)
class Place:
    """A block of a Conv2Former.

    Attributes:
        stage: From 1.
        block: Of the stage, from 1.
        mod: Its modulation layer.
    """

    stage: int
    block: int
    mod: Any

    def __str__(self) -> str:
        return f"stage {self.stage}, block {self.block}"


def choose_blocks(model: Explained, stages: list[int] | None, blocks: list[int] | None) -> list[Place]:
    """Blocks of a Conv2Former, in order.

    Args:
        model: On a Conv2Former.
        stages: From 1; none for all.
        blocks: Of each of these stages, from 1, negative ones from its end; none for the last.

    Raises:
        UserError: Another network, or a stage or block that it does not have.
    """
    if not isinstance(model.backbone, Conv2Former):
        name = type(model.backbone).__name__
        raise UserError(f"{model.checkpoint} holds a {name}, whose blocks have no modulation: give a Conv2Former")
    found = []
    for stage in sorted({*(stages or range(1, len(model.backbone.stages) + 1))}):
        if not 1 <= stage <= len(model.backbone.stages):
            raise UserError(f"{model.checkpoint} has no stage {stage}: use 1 to {len(model.backbone.stages)}")
        own = model.backbone.stages[stage - 1].blocks
        for block in blocks or [-1]:
            if block == 0 or abs(block) > len(own):
                raise UserError(f"stage {stage} of {model.checkpoint} has no block {block}: use 1 to {len(own)}, or -1")
        numbers = sorted({block if block > 0 else len(own) + 1 + block for block in blocks or [-1]})
        found += [Place(stage, number, own[number - 1].mod) for number in numbers]
    return found
