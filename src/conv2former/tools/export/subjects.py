"""What is exported: a task's exportable part, its inputs, and what a user of the file has to know."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from conv2former.checkpoints.exported import refuse_exported, torch_runtime
from conv2former.engine.devices import for_inference
from conv2former.errors import UserError
from conv2former.tasks.base import Task
from conv2former.tasks.exportable import Exportable
from conv2former.tools.naming import open_task
from conv2former.version import __version__


@dataclass
class Subject:
    """A model ready to be exported."""

    task: Task
    part: Exportable  # what of it is exported, in evaluation mode
    dynamic_size: bool  # whether the file takes any size
    random: bool  # whether the weights are, and top classes mean nothing
    images: Sequence[np.ndarray] = ()  # prepared images (3, H, W) to compare on
    calibration: Sequence[np.ndarray] = ()  # likewise, for formats with fewer bits; none for those that are compared

    @property
    def note(self) -> str:
        """What the user should know."""
        return "random weights" if self.random else self.part.note

    @property
    def metadata(self) -> dict[str, Any]:
        """What travels in the file."""
        task = self.task
        facts = dict(architecture=task.recipe.model.name, task=task.name, labels=task.classes, conv2former=__version__)
        facts |= dict(input_size=(3, *self.part.size), outputs=self.part.outputs) | self.part.config
        return facts | dict(dynamic_size=self.dynamic_size)

    def prepare(self, image: Image.Image) -> np.ndarray:
        """(3, H, W) of float32, as the network takes it, or its ``OneImage.feed``."""
        pixels = torch.from_numpy(np.array(self.part.resize(image.convert("RGB")))).permute(2, 0, 1)[None]
        return self.task.normalizer(pixels)[0].contiguous().numpy()

    def reference(self, batch: np.ndarray) -> list[np.ndarray]:
        """What PyTorch makes of a batch (B, 3, H, W)."""
        return torch_runtime(self.part.network)(batch)

    @functools.cached_property
    def in_onnx(self) -> Subject:
        """The same model with all of it that ONNX can take; itself where that is no more."""
        return replace(self, part=self.part.in_onnx) if self.part.in_onnx else self


def open_subject(
    named: tuple[str, dict[str, Any]] | Path,
    source: str,
    *,
    size: tuple[int, int] | None,
    fuse: bool,
    dynamic_size: bool,
) -> Subject:
    """The model of a run folder or saved model, or a timm model: ``named`` by ``read_name``, ``source`` by the user.

    ``size`` is (H, W), None for the model's own. ``fuse`` re-parameterizes the backbone.

    Raises:
        UserError: No such checkpoint or model, or one that cannot be exported.
    """
    if isinstance(named, Path):
        refuse_exported(named)
    task, random = open_task(named, source)
    for_inference(task.requires_grad_(False), "cpu", fuse=fuse)
    part = task.exportable(size)
    if dynamic_size and not part.any_size:
        raise UserError(f"--dynamic-size: a file of a {task.name} model takes one size, name it with --size H W")
    part.network.eval()
    return Subject(task, part, dynamic_size, random)
