"""What is exported: a task's exportable part, its inputs, and what a user of the file has to know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.utils.model import reparameterize_model

from conv2former.errors import UserError
from conv2former.tasks import load
from conv2former.tasks.base import Exportable, Task
from conv2former.tasks.classification.task import ClassificationTask
from conv2former.tools.naming import built_untrained
from conv2former.version import __version__


@dataclass
class Subject:
    """A model ready to be exported.

    Attributes:
        task: The model.
        part: What of it is exported, in evaluation mode.
        note: What the user should know.
    """

    task: Task
    part: Exportable
    note: str = ""

    @property
    def metadata(self) -> dict[str, Any]:
        """What travels in the file."""
        task = self.task
        facts = dict(architecture=task.recipe.model.name, task=task.name, labels=task.classes, conv2former=__version__)
        return facts | dict(input_size=(3, *self.part.size)) | self.part.config

    def prepare(self, image: Image.Image) -> np.ndarray:
        """(3, H, W) of float32, as the network takes it."""
        pixels = torch.from_numpy(np.array(self.part.resize(image.convert("RGB")))).permute(2, 0, 1)[None]
        return self.task.normalizer(pixels)[0].contiguous().numpy()

    @torch.no_grad()
    def reference(self, batch: np.ndarray) -> list[np.ndarray]:
        """What PyTorch makes of a batch (B, 3, H, W)."""
        found = self.part.network(torch.from_numpy(batch))
        return [part.numpy() for part in (found if isinstance(found, tuple) else (found,))]


def open_subject(
    named: tuple[str, dict[str, Any]] | Path,
    source: str,
    *,
    size: tuple[int, int] | None,
    fuse: bool,
    dynamic_size: bool,
) -> Subject:
    """The model of a run folder or saved model, or a timm model.

    Args:
        named: As ``read_name`` has it.
        source: As the user named it.
        size: (H, W); None for the model's own.
        fuse: Re-parameterize its backbone.
        dynamic_size: Whether the file is to take other sizes.

    Raises:
        UserError: No such checkpoint or model, or one that cannot be exported.
    """
    note = ""
    if isinstance(named, Path):
        task: Task = load(named)
    else:
        task = ClassificationTask.of(built_untrained(source, *named), name=source)
        note = "" if named[1].get("pretrained") else "random weights"
    if dynamic_size and task.one_at_a_time:  # whose decoders and pyramids take multiples of 32 alone
        raise UserError(f"--dynamic-size is for classification, {source} holds a {task.name} model: leave it out")
    task.eval().requires_grad_(False)
    if fuse:
        reparameterize_model(task.backbone, inplace=True)
    part = task.exportable(size)
    part.network.eval()
    return Subject(task, part, note or part.note)
