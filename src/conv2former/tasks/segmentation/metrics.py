"""mIoU and accuracies: exact counts of pixels over all images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_confusion_matrix

from conv2former.errors import percent, some
from conv2former.tasks.base import Evaluation
from conv2former.tasks.segmentation.masks import IGNORED

UNSEEN = 0.001  # of the pixels of a class, below which it counts as not found


class SegmentationMetric(Metric):
    """Pixels by true and predicted class over all images, summed over processes.

    Args:
        classes: K names.
        distributed: Whether all processes count, each a part of the images.
        multi_scale: Whether every image was seen at several scales and mirrored.
    """

    full_state_update = False
    pixels: Tensor
    images: Tensor
    loss_sum: Tensor

    def __init__(self, classes: Sequence[str], *, distributed: bool = False, multi_scale: bool = False) -> None:
        super().__init__(sync_on_compute=distributed)
        self.classes, self.multi_scale = list(classes), multi_scale
        num_classes = len(classes)
        self.add_state("pixels", torch.zeros(num_classes, num_classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("loss_sum", torch.zeros((), dtype=torch.double), dist_reduce_fx="sum")

    def update(self, bands: Iterable[tuple[slice, Tensor]], masks: Tensor) -> None:
        """Counts an image: its probabilities by bands of rows (1, K, h, W), and classes (1, H, W), 255 for none."""
        self.images += int((masks != IGNORED).any())
        for rows, probabilities in bands:
            targets = masks[:, rows].long()
            counted = targets != IGNORED
            predicted = probabilities.argmax(dim=1)
            self.pixels += multiclass_confusion_matrix(
                predicted, targets, len(self.classes), ignore_index=IGNORED, validate_args=False
            )
            likely = probabilities.gather(1, targets.masked_fill(~counted, 0)[:, None])[:, 0][counted]
            self.loss_sum -= likely.clamp_min(1e-12).log().sum().double()

    def compute(self) -> dict[str, Any]:
        """mIoU, accuracies (percent), the mean loss, and the counts behind them.

        mIoU is the mean over the classes that occur in the ground truth or the prediction, as in mmseg.
        """
        pixels = self.pixels.double()
        hits, targets, predicted = pixels.diag(), pixels.sum(1), pixels.sum(0)
        iou, accuracy = hits / (targets + predicted - hits), hits / targets  # NaN where a class does not occur
        seen = float(pixels.sum())
        per_class = {
            name: dict(iou=_percent(one), accuracy=_percent(other))
            for name, one, other in zip(self.classes, iou, accuracy, strict=True)
        }
        return dict(
            images=int(self.images),
            pixels=int(seen),
            miou=_percent(iou.nanmean()),
            mean_accuracy=_percent(accuracy.nanmean()),
            pixel_accuracy=_percent(hits.sum() / max(seen, 1)),
            loss=float(self.loss_sum) / max(seen, 1),
            matrix=self.pixels.tolist(),
            multi_scale=self.multi_scale,
            per_class=per_class,
        )

    def result(self) -> Evaluation:
        counts = self.compute()
        names = ("loss", "miou", "mean_accuracy", "pixel_accuracy")
        miou, mean, pixel = (math.nan if counts[name] is None else counts[name] for name in names[1:])
        line = f"{'multi-scale ' if self.multi_scale else ''}mIoU {miou:.2f}%, mean accuracy {mean:.2f}%, "
        line += f"pixel accuracy {pixel:.2f}% ({counts['images']} images)"
        metrics = {name: counts[name] for name in names}
        matrix = np.array(counts["matrix"])
        found, true = (np.flatnonzero(matrix.sum(axis)) for axis in (0, 1))
        unseen = [index for index in true if matrix[index, index] < UNSEEN * matrix[index].sum()]
        useless = ""
        if len(found) == 1 < len(true):
            useless = f"all pixels were taken for {self.classes[found[0]]!r}"
        elif len(unseen) == len(true) - 1 > 0:
            useless = f"next to no pixel of {some([repr(self.classes[index]) for index in unseen])} was found"
        sound = math.isfinite(counts["loss"])
        return Evaluation(metrics, line, counts, sound=sound, table=_table(counts), useless=useless)


def _table(counts: dict[str, Any]) -> list[list[str]]:
    matrix = counts["matrix"]
    total = max(counts["pixels"], 1)
    rows = [
        [name, percent(one["iou"]), percent(one["accuracy"]), percent(100 * sum(matrix[index]) / total)]
        for index, (name, one) in enumerate(counts["per_class"].items())
    ]
    rows.append(["mean", percent(counts["miou"]), percent(counts["mean_accuracy"]), "100.0"])
    return [["class", "IoU", "accuracy", "% of the pixels"], *rows]


def _percent(value: Tensor) -> float | None:
    return None if math.isnan(float(value)) else 100 * float(value)
