"""Semantic segmentation: losses, exact counts, inference on whole images and by windows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from conv2former.tasks.base import Result, Task
from conv2former.tasks.segmentation.config import SegmentationDataSection, SegmentationRecipe
from conv2former.tasks.segmentation.data import SegmentationBatch
from conv2former.tasks.segmentation.masks import IGNORED
from conv2former.tasks.segmentation.upernet import pixel_loss, resize

BAND = 2**24  # numbers of a map that are made at a time, 4 bytes each


class SegmentationCounts(Metric):
    """Pixels by true and predicted class over all images, summed over processes.

    Args:
        num_classes: Classes K.
        **kwargs: Of torchmetrics, ``sync_on_compute=False`` for the counts of one process.
    """

    full_state_update = False
    pixels: Tensor
    images: Tensor
    loss_sum: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.add_state("pixels", torch.zeros(num_classes, num_classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("loss_sum", torch.zeros((), dtype=torch.double), dist_reduce_fx="sum")

    def update(self, bands: Iterable[tuple[slice, Tensor]], labels: Tensor) -> None:
        """Counts an image: its probabilities by bands of rows (1, K, h, W), and classes (1, H, W), 255 for none."""
        self.images += int((labels != IGNORED).any())
        for rows, probabilities in bands:
            truth = labels[:, rows].long()
            counted = truth != IGNORED
            cells = (truth * self.num_classes + probabilities.argmax(dim=1))[counted]
            found = torch.bincount(cells, minlength=self.num_classes**2)
            self.pixels += found.view(self.num_classes, self.num_classes)
            likely = probabilities.gather(1, truth.masked_fill(~counted, 0)[:, None])[:, 0][counted]
            self.loss_sum -= likely.clamp_min(1e-12).log().sum().double()

    def compute(self) -> dict[str, Any]:
        """mIoU, accuracies (percent), the mean loss, and the counts behind them.

        mIoU is the mean over the classes that occur in truth or prediction, as in mmseg.
        """
        pixels = self.pixels.double()
        hits, truth, predicted = pixels.diag(), pixels.sum(1), pixels.sum(0)
        iou, accuracy = hits / (truth + predicted - hits), hits / truth  # NaN where a class does not occur
        seen = float(pixels.sum())
        return dict(
            images=int(self.images),
            pixels=int(seen),
            miou=_percent(iou.nanmean()),
            mean_accuracy=_percent(accuracy.nanmean()),
            pixel_accuracy=_percent(hits.sum() / max(seen, 1)),
            loss=float(self.loss_sum) / max(seen, 1),
            iou=[_percent(value) for value in iou],
            accuracy=[_percent(value) for value in accuracy],
            matrix=self.pixels.tolist(),
        )


def _percent(value: Tensor) -> float | None:
    return None if math.isnan(float(value)) else 100 * float(value)


class SegmentationTask(Task):
    """A segmenter with its recipe.

    Args:
        model: A ``heads.upernet.UperNet``.
        recipe: Gives the losses' weights, the optimizer and the schedule.
        num_classes: Classes K.
    """

    def __init__(self, model: Any, recipe: SegmentationRecipe, *, num_classes: int) -> None:
        super().__init__(model, recipe)
        self.counts = SegmentationCounts(num_classes)

    def training_step(self, batch: SegmentationBatch, batch_idx: int) -> Tensor:
        """The decoder's loss and the weighted auxiliary one."""
        images, labels = padded_with_mean(self.prepared(batch.images[0]), batch.sizes), batch.labels.long()
        return weighted_loss(self.model(images), labels, aux_weight=self.recipe.segmenter.aux_weight)

    def on_validation_epoch_start(self) -> None:
        """Counts start anew with every pass."""
        self.counts.reset()

    def validation_step(self, batch: SegmentationBatch, batch_idx: int) -> None:
        """Adds an image to ``counts``."""
        images = [self.prepared(view) for view in batch.images]
        size: Any = batch.labels.shape[-2:]
        self.counts.update(probability_bands(self.validated, images, self.recipe.data, size=size), batch.labels)

    def result(self) -> Result:
        """mIoU and accuracies."""
        counts = self.counts.compute()
        figures = {f"val_{key}": counts[key] for key in ("loss", "miou", "mean_accuracy", "pixel_accuracy")}
        line = (
            f"validation loss {counts['loss']:.4f}, mIoU {counts['miou'] or 0:.2f}%, pixel accuracy "
            f"{counts['pixel_accuracy'] or 0:.2f}% ({counts['images']} images)"
        )
        return Result(counts["miou"] or 0.0, figures, line, sound=math.isfinite(counts["loss"]))


def weighted_loss(outputs: tuple[Tensor, Tensor | None], labels: Tensor, *, aux_weight: float) -> Tensor:
    """The loss of what ``UperNet`` gives in training, against classes (B, H, W)."""
    logits, auxiliary = outputs
    loss = pixel_loss(logits, labels, ignore=IGNORED)
    if auxiliary is not None:
        loss = loss + aux_weight * pixel_loss(auxiliary, labels, ignore=IGNORED)
    return loss


def padded_with_mean(images: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Normalised images (B, 3, H, W) with zeros, the mean colour, outside of each one's (h, w)."""
    for image, (height, width) in zip(images, sizes, strict=True):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return images


def probability_bands(
    model: Any, images: Sequence[Tensor], data: SegmentationDataSection, *, size: tuple[int, int], mirror: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """Probabilities at the size of the picture in its file, averaged over views, by bands of rows.

    With one view no more than ``BAND`` numbers are made at a time, whatever the size of the picture; several are added
    up at its full size.

    Args:
        model: A segmenter in evaluation mode.
        images: One normalised view (1, 3, h, w) for each scale.
        data: Says whether whole images are taken or windows.
        size: (H, W).
        mirror: Whether each view is taken mirrored, too.

    Yields:
        The rows of a band, and (1, K, rows, W).
    """
    flips = (False, True) if mirror else (False,)
    views = [(image, flip) for image in images for flip in flips]
    if len(views) == 1:
        yield from _bands(_logits(model, *views[0], data), size)
        return
    total: Any = None
    for view in views:
        for rows, probabilities in _bands(_logits(model, *view, data), size):
            if total is None:
                total = probabilities.new_zeros(1, probabilities.shape[1], *size)
            total[:, :, rows] += probabilities
    yield slice(0, size[0]), total / len(views)


def class_probabilities(model: Any, images: Sequence[Tensor], data: SegmentationDataSection, **options: Any) -> Tensor:
    """``probability_bands`` put together, (1, K, H, W)."""
    return torch.cat([part for _, part in probability_bands(model, images, data, **options)], dim=2)


def _logits(model: Any, image: Tensor, mirrored: bool, data: SegmentationDataSection) -> Tensor:
    """Logits of a view (1, K, h, w) at its own size, the right way round."""
    view = image.flip(3) if mirrored else image
    sliding = data.window == "slide"
    logits = slide(model, view, side=data.crop_size, stride=data.step) if sliding else whole(model, view)
    return logits.flip(3) if mirrored else logits


def _bands(logits: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Probabilities of logits (1, K, h, w) brought to (H, W) by bilinear interpolation, some rows at a time."""
    height, width = size
    step = max(BAND // (logits.shape[1] * width), 1)
    for start in range(0, height, step):
        rows = slice(start, min(start + step, height))
        yield rows, resize(_rows(logits, rows, height), (rows.stop - rows.start, width)).softmax(dim=1)


def _rows(x: Tensor, rows: slice, height: int) -> Tensor:
    """Some rows of (1, K, h, w) interpolated to ``height`` rows, (1, K, rows, w): bilinear along one axis."""
    if x.shape[2] == height:
        return x[:, :, rows]
    places = (torch.arange(rows.start, rows.stop, device=x.device) + 0.5) * (x.shape[2] / height) - 0.5
    places = places.clamp_min(0)
    above = places.long().clamp_max(x.shape[2] - 1)
    below = (above + 1).clamp_max(x.shape[2] - 1)
    return torch.lerp(x[:, :, above], x[:, :, below], (places - above).to(x.dtype)[:, None])


def whole(model: Any, image: Tensor) -> Tensor:
    """Logits of images (B, 3, h, w) at their size, in float32; sides that are not a multiple of 32 are padded."""
    height, width = image.shape[-2:]
    padded = F.pad(image, (0, -width % 32, 0, -height % 32))
    return resize(model(padded).float(), padded)[..., :height, :width]


def slide(model: Any, image: Tensor, *, side: int, stride: int) -> Tensor:
    """Logits of an image (1, 3, h, w), averaged over overlapping windows; the last ones end at the edge."""
    height, width = image.shape[-2:]
    total: Any = None
    counts = image.new_zeros(1, 1, height, width)
    for top in _starts(height, side, stride):
        for left in _starts(width, side, stride):
            place = (..., slice(top, min(top + side, height)), slice(left, min(left + side, width)))
            logits = whole(model, image[place])
            if total is None:
                total = logits.new_zeros(1, logits.shape[1], height, width)
            total[place] += logits
            counts[place] += 1
    return total / counts


def _starts(length: int, side: int, stride: int) -> list[int]:
    """Where the windows along one side of an image begin."""
    count = -(-max(length - side, 0) // stride) + 1
    return sorted({max(min(i * stride, length - side), 0) for i in range(count)})
