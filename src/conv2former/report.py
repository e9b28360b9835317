"""What a run leaves at its end: the best weights evaluated as they lie on the disk, pictures, samples to try."""

from __future__ import annotations

from conv2former import checkpoints, plots
from conv2former.data.splits import Splits
from conv2former.errors import UserError
from conv2former.evaluate import Evaluation, evaluate_source, write_report
from conv2former.recipes.schema import Recipe
from conv2former.run import RunFolder

SAMPLES = 8  # held-out pictures that the quick start leaves as files


def write_final_report(run: RunFolder, recipe: Recipe, splits: Splits, *, batch_size: int, device: str) -> Evaluation:
    """Evaluates ``best/`` and draws.

    Raises:
        UserError: The folder cannot be written, or no evaluation had a finite loss.
    """
    if not run.best.is_dir():
        raise UserError(f"no evaluation of {run.path} had a finite loss: there are no best weights to report on")
    evaluation = evaluate_source(
        checkpoints.load_pretrained(run.best),
        splits.val,
        batch_size=batch_size,
        workers=recipe.data.workers,
        device=device,
        on_bad_image=recipe.data.on_bad_image,
        max_pixels=recipe.data.max_pixels,
    )
    write_report(evaluation, splits.val, run.path)
    plots.learning_curves(run.rows(), run.path / "learning_curves.png")
    if recipe.data.source == "digits":
        _write_samples(run, splits)
    return evaluation


def _write_samples(run: RunFolder, splits: Splits) -> None:
    """A few held-out pictures as files, to try ``predict`` on where the data brings none."""
    folder, source = run.path / "samples", splits.val
    folder.mkdir(exist_ok=True)
    for index in range(0, len(source), -(-len(source) // SAMPLES)):
        source.load(index).save(folder / source.name(index))
