"""Evaluation of trained models, whatever their task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conv2former import checkpoints
from conv2former.evaluation.common import EvaluateOptions

__all__ = ["EvaluateOptions", "evaluate"]


def evaluate(checkpoint: Path, **options: Any) -> tuple[Any, Path | None]:
    """Evaluates a run (its best weights) or a saved model on a folder of images.

    Args:
        checkpoint: Run folder, folder with ``config.json`` and ``model.safetensors``, or the latter file.
        **options: See ``EvaluateOptions``.

    Returns:
        The evaluation, of the kind that goes with the model's task, and the folder of its report if one was written.

    Raises:
        UserError: Anything wrong with what was given.
    """
    checkpoint, chosen = Path(checkpoint), EvaluateOptions(**options)
    task = checkpoints.saved_task(checkpoint)
    chosen.check(task)
    if task == "detection":
        from conv2former.evaluation.detection import evaluate_detector

        return evaluate_detector(checkpoint, chosen)
    if task == "segmentation":
        from conv2former.evaluation.segmentation import evaluate_segmenter

        return evaluate_segmenter(checkpoint, chosen)
    from conv2former.evaluation.classification import evaluate_classifier

    return evaluate_classifier(checkpoint, chosen)
