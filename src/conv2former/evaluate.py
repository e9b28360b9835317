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

from conv2former import plots
from conv2former.checkpoints import load_pretrained
from conv2former.data.classification import ImageDataset, Normalizer, checked, eval_loader, eval_transform
from conv2former.data.images import MAX_PIXELS
from conv2former.data.sampling import EvalSampler
from conv2former.data.sources import ImageSource
from conv2former.data.splits import open_eval_source, open_splits
from conv2former.errors import UserError, one_line
from conv2former.files import replace_text
from conv2former.labels import class_names
from conv2former.resuming import recorded_data
from conv2former.run import RunFolder
from conv2former.tasks.classification import ClassificationCounts

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

    def to_json(self) -> dict[str, Any]:
        """The figures, with accuracy per class by name."""
        per_class = {
            name: dict(correct=correct, images=images, top1=100 * correct / images if images else None)
            for name, (correct, images) in zip(self.classes, self.counts["per_class"], strict=True)
        }
        return {key: value for key, value in self.counts.items() if key != "per_class"} | dict(per_class=per_class)


def pick_device(name: str = "auto") -> torch.device:
    """'auto' is the GPU where there is one.

    Raises:
        UserError: A device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"device {name!r} is not there: use --device cpu") from None
    return device


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
    for batch in loader:
        images, targets, indices, bad = checked(batch)
        for error in bad:
            print(f"skipping: {error}", file=sys.stderr, flush=True)
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


def evaluate(
    checkpoint: Path,
    *,
    data: Path | None,
    out: Path | None = None,
    batch_size: int = 64,
    workers: int = 2,
    device: str = "auto",
    source: str = "folder",
    on_bad_image: Literal["error", "skip"] = "error",
) -> tuple[Evaluation, Path | None]:
    """Evaluates a run (its best weights) or a saved model on a folder of images.

    Args:
        checkpoint: Run folder, folder with ``config.json`` and ``model.safetensors``, or the latter file.
        data: Folder with ``val/`` or class folders; None for what the run itself was validated on.
        out: Where the report goes; None for the run folder (``evaluations/NAME`` in it where ``data`` is given), or
            nowhere for a saved model.
        batch_size: Images per forward pass; the counts do not depend on it.
        workers: Processes that read images.
        device: 'auto', 'cpu', 'cuda', ...
        source: How ``data`` lies there: 'folder', 'tar', 'wds' or 'hfds'.
        on_bad_image: 'error', or 'skip' to leave out what cannot be read.

    Returns:
        The evaluation, and the folder of its report if one was written.

    Raises:
        UserError: Anything wrong with what was given.
    """
    model = load_pretrained(checkpoint)
    run = RunFolder(Path(checkpoint))
    folder, max_pixels = out, MAX_PIXELS
    if data is None and run.exists():
        images, folder, max_pixels = _validation_set(run), out or run.path, run.recipe().data.max_pixels
    else:
        images = open_eval_source(data, class_names(model), kind=source)
        if data and run.exists():
            folder = out or run.path / "evaluations" / data.resolve().name
    evaluation = evaluate_source(
        model,
        images,
        batch_size=batch_size,
        workers=workers,
        device=device,
        on_bad_image=on_bad_image,
        max_pixels=max_pixels,
    )
    if folder:
        write_report(evaluation, images, folder, checkpoint=str(checkpoint), data=str(data) if data else None)
    return evaluation, folder


def _validation_set(run: RunFolder) -> ImageSource:
    """What the run was validated on; refuses a folder that has changed since, whose split would be another one."""
    recipe, facts = run.recipe(), run.facts()
    splits = open_splits(recipe.data, recorded_data(facts), seed=recipe.engine.seed)
    if facts.get("images_hash") != splits.digest():
        raise UserError(f"the images in {facts['data']} are not those of the run: name a folder with --data")
    return splits.val


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
