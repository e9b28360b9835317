"""Accuracies: exact counts over all images, and what single images got."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_confusion_matrix

from conv2former.data.sources import Source
from conv2former.errors import percent
from conv2former.tasks.base import Evaluation

SHEET_IMAGES = 16  # in each block of the sheet of predictions
Shown = tuple[Any, str, bool]  # an image, its caption, and whether the prediction is right


@dataclass(frozen=True)
class Records:
    """What a classifier made of N images.

    Attributes:
        indices: Number of every image in its source, (N,).
        targets: Index of its true class, (N,).
        predicted: Index of its top class, (N,).
        confidence: Probability of the top class, (N,).
        true_probability: Probability of the true class, (N,).
    """

    indices: np.ndarray
    targets: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    true_probability: np.ndarray

    def mistakes(self) -> np.ndarray:
        """Rows of what was wrong, those with the least probability of the true class first."""
        wrong = np.flatnonzero(self.predicted != self.targets)
        return wrong[np.argsort(self.true_probability[wrong], kind="stable")]

    def list_mistakes(self, classes: Sequence[str], source: Source, path: Path) -> None:
        """Writes a CSV file with a line for each mistake."""
        head = ["file", "true", "predicted", "confidence", "probability of true"]
        with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
            writer = csv.writer(file)
            writer.writerow(head)
            for row in self.mistakes():
                labels = [classes[self.targets[row]], classes[self.predicted[row]]]
                probabilities = [f"{column[row]:.4f}" for column in (self.confidence, self.true_probability)]
                writer.writerow([source.name(int(self.indices[row])), *labels, *probabilities])

    def sheet(self, classes: Sequence[str], source: Source) -> tuple[list[Shown], ...]:
        """Images of the worst mistakes, and of others, spread over all classes."""
        worst = self.mistakes()[:SHEET_IMAGES]
        rest = np.setdiff1d(np.arange(len(self.targets)), worst)
        others = rest[:: max(1, math.ceil(len(rest) / SHEET_IMAGES))]
        return tuple([self._shown(row, classes, source) for row in rows] for rows in (worst, others))

    def _shown(self, row: int, classes: Sequence[str], source: Source) -> Shown:
        predicted, target = self.predicted[row], self.targets[row]
        image = source.load(int(self.indices[row]), sys.maxsize)  # it was read before
        image.thumbnail((160, 160))
        caption = f"{classes[predicted]} {self.confidence[row]:.0%}"
        if predicted != target:
            caption += f"\ntrue: {classes[target]}"
        return image, caption, bool(predicted == target)

    def matrix(self, num_classes: int) -> np.ndarray:
        """The confusion matrix: counts (K, K), rows true, columns predicted."""
        predicted, targets = torch.from_numpy(self.predicted), torch.from_numpy(self.targets)
        return multiclass_confusion_matrix(predicted, targets, num_classes, validate_args=False).numpy()


class ClassificationMetric(Metric):
    """Counts over all images seen, summed over processes: nothing is averaged before the end.

    Args:
        classes: K names. Top-5 is top-K where there are fewer than five.
        distributed: Whether all processes count, each a part of the images; what single images got is then not kept.
    """

    full_state_update = False
    seen: Tensor
    correct: Tensor
    predicted: Tensor
    correct_top5: Tensor
    loss_sum: Tensor

    def __init__(self, classes: Sequence[str], *, distributed: bool = False) -> None:
        super().__init__(sync_on_compute=distributed)
        self.classes, self.distributed = list(classes), distributed
        self.top_k = min(5, len(classes))
        self.rows: list[tuple[Tensor, ...]] = []
        per_class = torch.zeros(len(classes), dtype=torch.long)
        self.add_state("seen", per_class.clone(), dist_reduce_fx="sum")
        self.add_state("correct", per_class.clone(), dist_reduce_fx="sum")
        self.add_state("predicted", per_class.clone(), dist_reduce_fx="sum")
        self.add_state("correct_top5", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("loss_sum", torch.zeros((), dtype=torch.double), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor, indices: Tensor | None = None) -> None:
        """Logits (B, K), targets (B,) and numbers of the images (B,); targets below 0 are not counted."""
        counted = (targets >= 0).nonzero().squeeze(1)  # once: it waits for a GPU
        logits, targets = logits[counted].float(), targets[counted]
        top = logits.topk(self.top_k, dim=1).indices
        hits = top == targets[:, None]
        self.seen += torch.bincount(targets, minlength=len(self.seen))
        self.correct += torch.bincount(targets[hits[:, 0]], minlength=len(self.correct))
        self.predicted += torch.bincount(top[:, 0], minlength=len(self.predicted))
        self.correct_top5 += hits.any(dim=1).sum()
        self.loss_sum += F.cross_entropy(logits, targets, reduction="none").double().sum()
        if indices is not None and not self.distributed:
            probabilities = logits.softmax(dim=1)
            confidence, predicted = probabilities.max(dim=1)
            true_probability = probabilities.gather(1, targets[:, None])[:, 0]
            self.rows.append((indices[counted], targets, predicted, confidence, true_probability))

    def compute(self) -> dict[str, Any]:
        """Accuracies in percent, the mean loss and the counts behind them.

        A class without images has no recall, one that was never predicted no precision (None). Balanced accuracy is the
        mean of the recalls, macro F1 that of the F1 scores of the classes that have images.
        """
        seen = int(self.seen.sum())
        correct, correct_top5 = int(self.correct.sum()), int(self.correct_top5)
        scale = 100 / max(seen, 1)
        counts = zip(self.classes, *(x.tolist() for x in (self.correct, self.seen, self.predicted)), strict=True)
        per_class = {name: _scores(*of_class) for name, *of_class in counts}
        known = [scores for scores in per_class.values() if scores["images"]]
        return dict(
            images=seen,
            correct=correct,
            correct_top5=correct_top5,
            top1=correct * scale,
            top5=correct_top5 * scale,
            loss=float(self.loss_sum) / max(seen, 1),
            balanced_accuracy=_mean([scores["top1"] for scores in known]),
            macro_f1=_mean([scores["f1"] for scores in known]),
            per_class=per_class,
        )

    def result(self) -> Evaluation:
        counts = self.compute()
        line = f"top-1 {counts['top1']:.2f}% ({counts['correct']} of {counts['images']} images)"
        if len(self.classes) > 5:  # of five classes, all are among the first five
            line += f", top-5 {counts['top5']:.2f}%"
        metrics = {key: counts[key] for key in ("loss", "top1", "top5")}
        columns = zip(*self.rows, strict=True)
        records = Records(*(torch.cat(column).cpu().numpy() for column in columns)) if self.rows else None
        found = [name for name, scores in counts["per_class"].items() if scores["precision"] is not None]
        true = [name for name, scores in counts["per_class"].items() if scores["images"]]
        useless = f"all images were taken for {found[0]!r}" if len(found) == 1 < len(true) else ""
        sound = math.isfinite(counts["loss"])
        return Evaluation(metrics, line, counts, records, sound=sound, table=_table(counts), useless=useless)


def _scores(correct: int, images: int, predicted: int) -> dict[str, Any]:
    """Of a class: counts, and recall (``top1``), precision and F1 in percent."""
    return dict(
        correct=correct,
        images=images,
        top1=100 * correct / images if images else None,
        precision=100 * correct / predicted if predicted else None,
        f1=200 * correct / (images + predicted) if images + predicted else None,
    )


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _table(counts: dict[str, Any]) -> list[list[str]]:
    keys = ("precision", "top1", "f1")
    rows = [
        [name, *(percent(scores[key]) for key in keys), str(scores["images"])]
        for name, scores in counts["per_class"].items()
    ]
    known = [scores for scores in counts["per_class"].values() if scores["images"]]
    means = [_mean([scores[key] or 0.0 for scores in known]) for key in keys]  # a class never predicted counts as 0
    rows.append(
        ["macro average (of the recalls: balanced accuracy)", *(percent(mean) for mean in means), str(counts["images"])]
    )
    return [["class", "precision", "recall", "F1", "images"], *rows]
