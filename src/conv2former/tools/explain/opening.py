"""Blocks of a trained model, chosen by stage and number; classes by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conv2former.checkpoints.exported import refuse_exported
from conv2former.engine.devices import pick_device
from conv2former.errors import UserError, nearest, some
from conv2former.models.conv2former import Conv2Former
from conv2former.tasks import load
from conv2former.tasks.base import Task


@dataclass(frozen=True)
class Explained:
    """A trained model in evaluation mode, and its name in messages."""

    name: str
    task: Task

    def class_index(self, name: str) -> int:
        """A class by its name, or by its number where none has that name; raises UserError."""
        classes = self.task.classes
        if name in classes:
            return classes.index(name)
        if name.isdecimal() and int(name) < len(classes):
            return int(name)
        hint = nearest(name, classes) or f": it knows {some(classes)}"
        raise UserError(f"{self.name} knows no class {name!r}{hint}")


def open_explained(checkpoint: Path, *, device: str = "auto") -> Explained:
    """The model of a run folder or a saved one, of any task; raises UserError."""
    refuse_exported(checkpoint)
    return Explained(str(checkpoint), load(checkpoint).to(pick_device(device)))


@dataclass(frozen=True)
class Block:
    """A block of a Conv2Former: its stage, its number in the stage (both from 1), and its modulation layer."""

    stage: int
    number: int
    mod: Any

    def __str__(self) -> str:
        return f"stage {self.stage}, block {self.number}"


def choose_blocks(model: Explained, stages: list[int] | None, blocks: list[int] | None) -> list[Block]:
    """Blocks of a Conv2Former, in order.

    Args:
        model: On a Conv2Former.
        stages: From 1; none for all.
        blocks: Of each of these stages, from 1, negative ones from its end; none for the last.

    Raises:
        UserError: Another network, or a stage or block that it does not have.
    """
    backbone = model.task.backbone
    if not isinstance(backbone, Conv2Former):
        name = type(backbone).__name__
        raise UserError(f"{model.name} holds a {name}, whose blocks have no modulation: give a Conv2Former")
    found = []
    for stage in sorted({*(stages or range(1, len(backbone.stages) + 1))}):
        if not 1 <= stage <= len(backbone.stages):
            raise UserError(f"{model.name} has no stage {stage}: use 1 to {len(backbone.stages)}")
        own = backbone.stages[stage - 1].blocks
        for block in blocks or [-1]:
            if block == 0 or abs(block) > len(own):
                raise UserError(f"stage {stage} of {model.name} has no block {block}: use 1 to {len(own)}, or -1")
        numbers = sorted({block if block > 0 else len(own) + 1 + block for block in blocks or [-1]})
        found += [Block(stage, number, own[number - 1].mod) for number in numbers]
    return found
