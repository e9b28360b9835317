"""Evaluation of a trained classifier: exact counts, a confusion matrix, the worst mistakes."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from timm.data import resolve_model_data_config

from conv2former.checkpoints import load_pretrained
from conv2former.data.images import MAX_PIXELS
from conv2former.data.loading import Normalizer, eval_loader
from conv2former.data.sampling import EvalSampler
from conv2former.engine.devices import pick_device
from conv2former.engine.run_dir import RunFolder
from conv2former.errors import UserError, one_line
from conv2former.evaluation.common import EvaluateOptions, announced, report_folder, validation_set
from conv2former.files import replace_text
from conv2former.tasks.classification.data import ImageDataset, eval_transform
from conv2former.tasks.classification.names import class_names
from conv2former.tasks.classification.sources import ImageSource
from conv2former.tasks.classification.splits import open_eval_source
from conv2former.tasks.classification.task import ClassificationCounts
from conv2former.viz import plots

MAX_MATRIX_CLASSES = 2000  # beyond this the matrix neither fits a picture nor, at 21,841 classes, the memory
SHEET_IMAGES = 16  # pictures in each block of the sheet of predictions


@dataclass(frozen=True)
class Evaluation:
    """What a classifier made of a set of N images in K classes.

    Attributes:
        counts: ``ClassificationCounts.compute``.
        classes: K names.
        indices: Number of every image in its source, (N,).
        targets: Index of the true class of every image, (N,).
        predicted: Index of the top class of every image, (N,).
        confidence: Its probability, (N,).
        true_probability: Probability of the true class, (N,).
    """

    counts: dict[str, Any]
    classes: list[str]
    indices: np.ndarray
    targets: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    true_probability: np.ndarray

    def matrix(self) -> np.ndarray:
        """The confusion matrix: counts (K, K), rows true, columns predicted."""
        counts = np.zeros((len(self.classes), len(self.classes)), np.int64)
        np.add.at(counts, (self.targets, self.predicted), 1)
        return counts

    def figures(self) -> dict[str, Any]:
        """What goes into the run's history, percent."""
        return dict(top1=self.counts["top1"])

    def line(self) -> str:
        """The figures in words."""
        counts = self.counts
        share = f"{counts['correct']} of {counts['images']} images"
        return f"top-1 {counts['top1']:.2f}% ({share}), top-5 {counts['top5']:.2f}%"

    def to_json(self) -> dict[str, Any]:
        """The figures, with accuracy per class by name."""
        per_class = {
            name: dict(correct=correct, images=images, top1=100 * correct / images if images else None)
            for name, (correct, images) in zip(self.classes, self.counts["per_class"], strict=True)
        }
        return {key: value for key, value in self.counts.items() if key != "per_class"} | dict(per_class=per_class)


@torch.inference_mode()
def evaluate_source(
    model: Any,
    source: ImageSource,
    *,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "auto",
    on_bad_image: Literal["error", "skip"] = "error",
    max_pixels: int = MAX_PIXELS,
) -> Evaluation:
    """Runs the model over every image once; with ``on_bad_image='skip'`` leaves out those that cannot be read.

    Raises:
        UserError: An image that cannot be read.
    """
    place = pick_device(device)
    model.eval().to(place)
    config = resolve_model_data_config(model)
    masking: Any = "mask" if on_bad_image == "skip" else "error"
    dataset = ImageDataset(source, eval_transform(config), on_bad_image=masking, max_pixels=max_pixels)
    normalizer = Normalizer(config["mean"], config["std"]).to(place)
    loader = eval_loader(dataset, EvalSampler(len(dataset)), batch_size=batch_size, workers=workers, place=place)
    counts = ClassificationCounts(model.num_classes, sync_on_compute=False).to(place)
    parts: list[list[np.ndarray]] = []
    for images, targets, indices, _ in announced(loader):
        counted = targets >= 0
        if not counted.any():
            continue
        logits, truth = model(normalizer(images[counted].to(place))), targets[counted].to(place)
        counts.update(logits, truth)
        probabilities = logits.float().softmax(dim=1)
        confidence, predicted = probabilities.max(dim=1)
        true_probability = probabilities.gather(1, truth[:, None])[:, 0]
        columns = (indices[counted], truth, predicted, confidence, true_probability)
        parts.append([column.cpu().numpy() for column in columns])
    if not parts:
        raise UserError("none of the images can be read: nothing was evaluated")
    return Evaluation(
        counts.compute(), list(source.classes), *(np.concatenate(column) for column in zip(*parts, strict=True))
    )


def evaluate_classifier(checkpoint: Path, options: EvaluateOptions) -> tuple[Evaluation, Path | None]:
    """``conv2former.evaluation.evaluate`` for a classifier."""
    model = load_pretrained(checkpoint)
    run, data = RunFolder(checkpoint), options.data
    folder, max_pixels = report_folder(run, options), MAX_PIXELS
    if data is None and run.exists():
        images, max_pixels = validation_set(run).val, run.recipe().data.max_pixels
    else:
        images = open_eval_source(data, class_names(model), kind=options.source or "folder")
    evaluation = evaluate_source(
        model,
        images,
        batch_size=options.batch_size or 64,
        workers=options.workers,
        device=options.device,
        on_bad_image=options.on_bad_image,
        max_pixels=max_pixels,
    )
    if folder:
        write_report(evaluation, images, folder, checkpoint=str(checkpoint), data=str(data) if data else None)
    return evaluation, folder


def write_report(evaluation: Evaluation, source: ImageSource, folder: Path, **facts: str | None) -> None:
    """``evaluation.json`` (with ``facts``), ``confusion_matrix.png`` and ``predictions.png``.

    Raises:
        UserError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "evaluation.json", json.dumps(facts | evaluation.to_json(), indent=2) + "\n")
        if len(evaluation.classes) <= MAX_MATRIX_CLASSES:
            plots.confusion_matrix(evaluation.matrix(), evaluation.classes, folder / "confusion_matrix.png")
        _draw_sheet(evaluation, source, folder / "predictions.png")
    except OSError as error:
        raise UserError(f"cannot write the report to {folder}: {one_line(error)}") from None


def _draw_sheet(evaluation: Evaluation, source: ImageSource, path: Path) -> None:
    targets = evaluation.targets
    wrong = np.flatnonzero(evaluation.predicted != targets)
    worst = wrong[np.argsort(evaluation.true_probability[wrong], kind="stable")][:SHEET_IMAGES]
    # spread evenly over the set, so that every class has its turn
    others = np.linspace(0, len(targets) - 1, min(SHEET_IMAGES, len(targets))).astype(int)

    def entry(row: int) -> tuple[Any, str, bool]:
        predicted, target = evaluation.predicted[row], targets[row]
        picture = source.load(int(evaluation.indices[row]), sys.maxsize)  # it was read before
        picture.thumbnail((160, 160))
        caption = f"{evaluation.classes[predicted]} {evaluation.confidence[row]:.0%}"
        if predicted != target:
            caption += f"\nis {evaluation.classes[target]}"
        return picture, caption, bool(predicted == target)

    plots.prediction_sheet([entry(i) for i in worst], [entry(i) for i in others], path)
