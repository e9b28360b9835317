"""What a training is about to do, in words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from conv2former.errors import plural, resume_command

if TYPE_CHECKING:
    from conv2former.engine.trainer import Trainer


def summary(trainer: Trainer, out: Path) -> list[str]:
    """The first lines of a run in the folder ``out``."""
    recipe, model, optim = trainer.recipe, trainer.recipe.model, trainer.recipe.optim
    parameters = sum(p.numel() for p in trainer.model.parameters())
    start = f"from {model.weights}" if model.weights else "from random weights"
    source, per_epoch = trainer.splits.train, trainer.steps_per_epoch
    epochs = f"{trainer.steps / per_epoch:g}"
    plan = f"{plural(trainer.steps, 'step')}: {epochs} {'epoch' if epochs == '1' else 'epochs'} of {per_epoch}"
    operations = f", operations by {trainer.operations}" if trainer.operations else ""
    again = f"Ctrl-C stops it, and `{resume_command(out)}` goes on"
    total = trainer.batch.total
    rate = f"{optim.base_lr:g} x {total:,} / {optim.base_batch:,} = {trainer.lr:.3g}"
    return [
        f"{recipe.name}: {recipe.task} with {model.name}, {parameters / 1e6:.2f}M parameters, {start}",
        f"{len(source):,} training, {len(trainer.splits.val):,} validation images, {len(source.classes)} classes",
        f"precision {recipe.engine.precision} on {trainer.fabric.device}{operations}",
        f"batch {trainer.batch}, learning rate {rate}",
        plan + (f", from step {trainer.state.step:,}" if trainer.state.step else ""),
        f"writes to {out}; {again}",
    ]
