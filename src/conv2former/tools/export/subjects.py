"""What is exported: the network of a checkpoint, its inputs, and what a user of the file has to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from conv2former import checkpoints
from conv2former.data.loading import Normalizer
from conv2former.errors import UserError
from conv2former.tasks.classification.data import eval_transform
from conv2former.tasks.classification.names import class_names
from conv2former.tasks.segmentation.upernet import resize
from conv2former.tools.naming import built_untrained
from conv2former.version import __version__

DETECTOR_NOTE = (
    "of a detector the backbone and the pyramid alone: torch.export cannot follow torchvision's non-maximum "
    "suppression, which branches on how many boxes there are"
)


@dataclass
class Subject:
    """A network ready to be exported.

    Attributes:
        network: Normalised images (B, 3, H, W) of float32 -> one tensor of ``outputs`` each; in evaluation mode.
        outputs: Names of what it gives.
        size: (H, W) that it takes.
        resize: Picture to picture of that size.
        metadata: What travels in the file.
        task: Of the checkpoint.
        labels: Names of the classes.
        note: What of the checkpoint is not exported.
    """

    network: nn.Module
    outputs: list[str]
    size: tuple[int, int]
    resize: Any
    metadata: dict[str, Any]
    task: str
    labels: list[str]
    note: str = ""

    def prepare(self, picture: Image.Image) -> np.ndarray:
        """(3, H, W) of float32, as the network takes it."""
        pixels = torch.from_numpy(np.array(self.resize(picture.convert("RGB")))).permute(2, 0, 1)[None]
        normalizer = Normalizer(tuple(self.metadata["mean"]), tuple(self.metadata["std"]))
        return normalizer(pixels)[0].contiguous().numpy()

    @torch.no_grad()
    def reference(self, batch: np.ndarray) -> list[np.ndarray]:
        """What PyTorch makes of a batch (B, 3, H, W)."""
        found = self.network(torch.from_numpy(batch))
        return [part.numpy() for part in (found if isinstance(found, tuple) else (found,))]


class _WholeSize(nn.Module):
    """A segmenter whose logits have the size of its images."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone, self.decoder, self.classifier = model.backbone, model.decoder, model.classifier

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, K, H, W)."""
        return resize(self.classifier(self.decoder(self.backbone(images))), images)


class _Maps(nn.Module):
    """The part of a detector that comes before its proposals."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone, self.pyramid = model.backbone, model.pyramid

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> five maps (B, C, H / s, W / s), s = 4, 8, 16, 32, 64."""
        return tuple(self.pyramid(self.backbone(images)))


def open_subject(
    named: tuple[str, dict[str, Any]] | Path,
    source: str,
    *,
    size: tuple[int, int] | None,
    fuse: bool,
    dynamic_size: bool,
) -> Subject:
    """The network of a run folder or saved model, or a timm model.

    Args:
        named: As ``read_name`` has it.
        source: As the user named it.
        size: (H, W); None for the network's own.
        fuse: Re-parameterize it.
        dynamic_size: Whether the file is to take other sizes.

    Raises:
        UserError: No such checkpoint or model, or one that cannot be exported.
    """
    if not isinstance(named, Path):
        subject = _classifier(built_untrained(source, *named), size)
        subject.note = "" if named[1].get("pretrained") else "random weights"
    else:
        task = checkpoints.saved_task(named)
        if dynamic_size and task != "classification":
            raise UserError(f"--dynamic-size is for classification, {source} holds a {task} model: leave it out")
        opened = dict(classification=_saved_classifier, segmentation=_segmenter, detection=_detector)[task]
        subject = opened(named, size)
    network: Any = subject.network.eval().requires_grad_(False)
    if fuse:
        holder, name = (subject, "network") if subject.task == "classification" else (network, "backbone")
        setattr(holder, name, reparameterize_model(getattr(holder, name), inplace=True))
    return subject


def _saved_classifier(path: Path, size: tuple[int, int] | None) -> Subject:
    return _classifier(checkpoints.load_pretrained(path), size)


def _classifier(model: Any, size: tuple[int, int] | None) -> Subject:
    if not model.num_classes:
        raise UserError("the model has no classifier: give one that was trained with classes")
    config = resolve_model_data_config(model)
    if size:
        if size[0] != size[1]:
            raise UserError(
                f"--size {size[0]} {size[1]}: a classifier's preprocessing makes squares, give one number twice"
            )
        config["input_size"] = (3, *size)
    own = {key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")}
    labels = class_names(model)
    metadata = _metadata(model.pretrained_cfg.get("architecture", ""), "classification", labels) | own
    return Subject(
        model, ["logits"], config["input_size"][1:], eval_transform(config), metadata, "classification", labels
    )


def _segmenter(path: Path, size: tuple[int, int] | None) -> Subject:
    from conv2former.evaluation.segmentation import load_segmenter

    model, saved = load_segmenter(path)
    crop = saved.recipe.data.crop_size
    return _dense(_WholeSize(model), saved, ["logits"], size or (crop, crop))


def _detector(path: Path, size: tuple[int, int] | None) -> Subject:
    from conv2former.evaluation.detection import load_detector

    model, saved = load_detector(path)
    height, width = size or (_multiple(saved.recipe.data.short_side), _multiple(saved.recipe.data.long_side))
    if height % 32 or width % 32:
        raise UserError(f"--size {height} {width}: a detector takes multiples of 32")
    subject = _dense(_Maps(model), saved, ["p2", "p3", "p4", "p5", "p6"], (height, width))
    subject.note = DETECTOR_NOTE
    return subject


def _multiple(side: int) -> int:
    return -(-side // 32) * 32


def _dense(network: nn.Module, saved: Any, outputs: list[str], size: tuple[int, int]) -> Subject:
    recipe = saved.recipe
    metadata = _metadata(recipe.model.name, recipe.task, saved.classes)
    metadata |= dict(input_size=(3, *size), interpolation="bilinear", mean=recipe.data.mean, std=recipe.data.std)

    def squeeze(picture: Image.Image) -> Image.Image:
        return picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)

    return Subject(network, outputs, size, squeeze, metadata, recipe.task, saved.classes)


def _metadata(architecture: str, task: str, labels: Sequence[str]) -> dict[str, Any]:
    return dict(architecture=architecture, task=task, labels=list(labels), conv2former=__version__)
