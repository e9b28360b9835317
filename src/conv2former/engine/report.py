"""What a run leaves at its end: the best weights evaluated as they lie on the disk, learning curves, the model card."""

from __future__ import annotations

from typing import Any

from conv2former.engine.model_card import write_card
from conv2former.engine.run_dir import RunFolder
from conv2former.errors import UserError
from conv2former.viz import plots
from conv2former.workflows import AnyEvaluation, Workflow


def write_final_report(
    run: RunFolder, workflow: Workflow, source: Any, *, batch_size: int, device: str
) -> AnyEvaluation:
    """Evaluates ``best/`` on the validation set and draws.

    Raises:
        UserError: The folder cannot be written, or no evaluation had a finite loss.
    """
    if not run.best.is_dir():
        raise UserError(f"no evaluation of {run.path} had a finite loss: there are no best weights to report on")
    evaluation = workflow.report(run, source, batch_size=batch_size, device=device)
    plots.learning_curves(run.rows(), run.path / "learning_curves.png")
    write_card(run.best, run.best, run)
    return evaluation
