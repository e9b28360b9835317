"""What trained models find on picture files, whatever their task."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conv2former import checkpoints
from conv2former.data.images import BadImage
from conv2former.errors import UserError
from conv2former.prediction.common import Finding, Predictor, findings, row, write_findings

__all__ = ["Finding", "Predictor", "open_predictor", "predict", "run_predict"]


def open_predictor(
    checkpoint: Path, *, top_k: int | None = None, threshold: float | None = None, device: str = "auto"
) -> Any:
    """The model of a run folder or a saved model's, of any task, ready to look at pictures.

    Args:
        checkpoint: Run folder, saved model folder, or its ``model.safetensors``.
        top_k: Classes that a classifier names; None for 5.
        threshold: Least score of what a detector shows; None for 0.3.
        device: 'auto', 'cpu', 'cuda', ...

    Raises:
        UserError: The checkpoint cannot be used, or an option is for another task.
    """
    task = checkpoints.saved_task(checkpoint)
    for option, kind, value in (("--top-k", "classification", top_k), ("--threshold", "detection", threshold)):
        if value is not None and task != kind:
            raise UserError(f"{option} is for {kind}, {checkpoint} holds a {task} model: leave it out")
    if task == "detection":
        from conv2former.prediction.detection import ObjectFinder

        return ObjectFinder(checkpoint, threshold=0.3 if threshold is None else threshold, device=device)
    if task == "segmentation":
        from conv2former.prediction.segmentation import Segmenter

        return Segmenter(checkpoint, device=device)
    from conv2former.prediction.classification import Classifier

    return Classifier(checkpoint, top_k=5 if top_k is None else top_k, device=device)


def predict(checkpoint: Path, inputs: list[Path], **options: Any) -> Iterator[dict[str, Any]]:
    """One dictionary per input file, in order: ``file``, ``ok`` and what the task gives, or ``error``.

    A classifier gives ``top``, a detector ``objects``, a segmenter ``classes``.

    Args:
        checkpoint: Run folder, saved model folder, or its ``model.safetensors``.
        inputs: Picture files, and folders that are searched for them.
        **options: ``batch_size`` and ``workers``, and those of ``open_predictor``.

    Raises:
        UserError: The checkpoint cannot be used, or there is no picture in the inputs.
    """
    for file, found in _findings(checkpoint, inputs, **options):
        yield row(file, found)


def run_predict(checkpoint: Path, inputs: list[Path], *, out: Path | None = None, **options: Any) -> int:
    """Prints the predictions as JSON lines, draws them into ``out``; returns the exit status, 1 if a file failed."""
    return write_findings(_findings(checkpoint, inputs, **options), out=out)


def _findings(
    checkpoint: Path, inputs: list[Path], *, batch_size: int | None = None, workers: int = 0, **options: Any
) -> Iterator[tuple[Path, Finding | BadImage]]:
    predictor = open_predictor(checkpoint, **options)
    most = predictor.most_at_once  # whole pictures may be large
    if batch_size is not None and batch_size > most:
        raise UserError(f"--batch-size is for classification, {checkpoint} takes one picture at a time: leave it out")
    return findings(predictor, inputs, batch_size=batch_size or min(most, 16), workers=workers)
