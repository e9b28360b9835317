"""What a run leaves at its end: the best weights evaluated as they lie on the disk, learning curves, the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from conv2former.checkpoints.hub import saved_config
from conv2former.engine.devices import for_inference
from conv2former.engine.evaluate import evaluate_task, write_report
from conv2former.engine.model_card import write_card
from conv2former.engine.run_dir import RunDir
from conv2former.errors import UserError, or_left_out
from conv2former.tasks import load
from conv2former.tasks.base import Evaluation
from conv2former.viz import plots

SAMPLES = 8  # held-out images that a recipe with data of its own leaves as files


def write_final_report(run: RunDir, source: Any, *, batch_size: int, device: torch.device) -> Evaluation:
    """Evaluates ``best/`` on the validation set and draws.

    Raises:
        UserError: The folder cannot be written, or no evaluation had finite numbers.
    """
    if not run.best.is_dir():
        raise UserError(f"no evaluation of {run.path} had finite numbers: there are no best weights to report on")
    task, recipe = for_inference(load(run.best), device), run.recipe()
    data = recipe.data
    options: Any = dict(workers=data.workers, on_bad_image=data.on_bad_image, max_pixels=data.max_pixels)
    evaluation = evaluate_task(task, source, batch_size=batch_size, **options)
    write_report(task, evaluation, source, run.path)
    if recipe.brings_data:
        with or_left_out("samples"):
            _write_samples(run, source)
    with or_left_out("learning curves"):
        plots.draw_curves({run.title(): run.rows()}, run.path / "learning_curves.png", "epoch")
    with or_left_out("the model card"):
        write_card(run.best, run.best, run)
    return evaluation


def best_weights(run: RunDir) -> str | None:
    """Which evaluation the best weights are of, where it was not the last one."""
    epoch, rows = saved_config(run.best)["conv2former"]["epoch"], run.rows("epoch")
    if not rows or epoch == rows[-1]["epoch"]:
        return None
    if epoch:
        return f"the best weights are those of epoch {epoch:g}"
    return (
        "the best weights are those before the first step, and training made them no better: try a lower learning rate "
        "(--lr) or more --epochs"
    )


def _write_samples(run: RunDir, source: Any) -> None:
    """A few held-out images as files, to try ``predict`` on."""
    folder = run.path / "samples"
    folder.mkdir(exist_ok=True)
    for index in range(0, len(source), -(-len(source) // SAMPLES)):
        loaded = source.load(index)
        image = loaded[0] if isinstance(loaded, tuple) else loaded
        image.save(folder / Path(source.name(index)).name)
