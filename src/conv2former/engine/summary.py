"""What a training is about to do, in words."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from conv2former.engine.run_dir import RunDir
from conv2former.errors import plural
from conv2former.tasks import task_class

if TYPE_CHECKING:
    from conv2former.engine.trainer import Trainer


def best_weights(run: RunDir) -> str | None:
    """Which evaluation the best weights are of, where it was not the last one."""
    key = f"val_{task_class(run.recipe().task).monitor}"
    rows = [row for row in run.rows("epoch") if isinstance(row.get(key), int | float)]
    best = max(rows, key=lambda row: row[key], default=None)  # the first of equal ones, as in training
    if best is None or best is rows[-1]:
        return None
    if best["step"] == 0:
        return (
            "the best weights are those before the first step, the linear probe, and training made them no better: "
            "try a lower learning rate (--lr) or more --epochs"
        )
    return f"the best weights are those of epoch {best['epoch']:g}"


def summary(trainer: Trainer, out: Path) -> list[str]:
    """The first lines of a run in the folder ``out``."""
    recipe, model, optim = trainer.recipe, trainer.recipe.model, trainer.recipe.optim
    parameters = sum(p.numel() for p in trainer.model.parameters())
    start = f"from {model.weights}" if model.weights else "from random weights"
    source, per_epoch = trainer.splits.train, trainer.steps_per_epoch
    epochs = f"{trainer.steps / per_epoch:g}"
    plan = f"{plural(trainer.steps, 'step')}: {epochs} {'epoch' if epochs == '1' else 'epochs'} of {per_epoch}"
    operations = f", operations by {trainer.operations}" if trainer.operations else ""
    again = f"Ctrl-C stops it, and `conv2former train --out {shlex.quote(str(out))} --resume` goes on"
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
