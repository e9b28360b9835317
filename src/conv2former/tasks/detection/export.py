"""A whole detector for ONNX: what goes in, its detections compared with those of ``Detector``, and used for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import box_iou

from conv2former.checkpoints.exported import ExportedNetwork
from conv2former.errors import UserError
from conv2former.tasks.detection.config import DetectorSection
from conv2former.tasks.detection.data import fitted_into
from conv2former.tasks.detection.model.detector import Detections, Detector
from conv2former.tasks.detection.model.exported import OUTPUTS, WholeDetector
from conv2former.tasks.detection.model.mask_head import SIDE
from conv2former.tasks.exportable import Arrays, Exportable, OneImage

INPUTS = ["images", "size"]
SAME_IOU = 0.9  # from which two boxes of one class are the same detection


def whole(model: Detector, config: dict[str, Any], size: tuple[int, int]) -> Exportable:
    """Everything behind an image that fits into ``size`` (H, W), without a change of its proportions."""

    @torch.no_grad()
    def reference(images: np.ndarray, limits: np.ndarray) -> list[np.ndarray]:
        found: Any = model(torch.from_numpy(images), [(int(limits[0]), int(limits[1]))])
        return [column.numpy() for column in filled(found[0], model.section.max_detections)][: len(outputs)]

    def resize(image: Image.Image) -> Image.Image:
        return image.resize(fitted_into(image.size, size), Image.Resampling.BILINEAR)

    outputs = outputs_of(model.section)
    one = OneImage(
        INPUTS, lambda image: feed(image, size), reference, lambda ours, theirs: compare(ours, theirs, max(size))
    )
    return Exportable(WholeDetector(model).eval(), outputs, size, resize, config, one=one)


def feed(image: np.ndarray, size: tuple[int, int]) -> list[np.ndarray]:
    """A normalised image (3, h, w) -> the inputs of a file that takes ``size`` (H, W)."""
    pixels = np.zeros((1, 3, *size), np.float32)
    pixels[0, :, : image.shape[1], : image.shape[2]] = image
    return [pixels, np.array(image.shape[1:], np.int64)]


def outputs_of(section: DetectorSection) -> list[str]:
    """With masks or without."""
    return OUTPUTS if section.masks else OUTPUTS[:3]


class ExportedDetector(nn.Module):
    """An exported file in the place of a ``Detector``.

    Args:
        network: The file.
        section: Of the recipe; ``max_detections`` and ``score_threshold`` are the file's.

    Raises:
        UserError: The file holds a part of a detector.
    """

    def __init__(self, network: ExportedNetwork, section: DetectorSection) -> None:
        super().__init__()
        self.network, self.section, self.num_classes = network, section, network.num_classes
        if network.facts["outputs"] != outputs_of(section):
            raise UserError(
                f"{network.path} holds a part of a detector: give the file of --format onnx or openvino, or the run"
            )

    def forward(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """As ``Detector`` in evaluation, one image after the other, computed on the CPU."""
        return [self._found(image[:, :height, :width]) for image, (height, width) in zip(images, sizes, strict=True)]

    def _found(self, image: Tensor) -> Detections:
        count = self.section.max_detections
        shapes = [(count, 4), (count,), (count,), (count, SIDE, SIDE)][: len(outputs_of(self.section))]
        inputs = feed(image.float().cpu().numpy(), self.network.size)
        boxes, scores, labels, *masks = self.network.compute(*inputs, shapes=shapes)
        # -1 in rows that hold nothing; the rest is no detector's of ours
        kept = (labels >= 0) & (labels < self.num_classes) & boxes.isfinite().all(dim=1)
        shown = masks[0][kept] if masks else boxes.new_zeros(int(kept.sum()), 0, 0)
        parts = (boxes[kept], scores[kept], labels[kept].long(), shown)
        return Detections(*(part.to(image.device) for part in parts))


def filled(found: Detections, count: int) -> list[Tensor]:
    """Boxes, scores, labels and masks with rows that hold nothing up to ``count``, as ``WholeDetector`` gives them."""
    columns = []
    for column, filler in zip(found, (0, 0, -1, 0), strict=True):
        rest = column.new_full((count - len(column), *column.shape[1:]), filler)
        columns.append(torch.cat([column, rest]))
    return columns


def compare(ours: Arrays, theirs: Arrays, side: int) -> tuple[float, int, int]:
    """Compares detections as ``OneImage.compare`` says, matched by class and IoU.

    The difference is the largest of scores, of mask probabilities, and of the corners of boxes in units of ``side``.
    """
    for one, other in zip(ours, theirs, strict=True):
        if one.shape != other.shape or not (np.isfinite(one).all() and np.isfinite(other).all()):
            return float("inf"), 0, 1
    kept = [[column[parts[2] >= 0] for column in parts] for parts in (ours, theirs)]
    (boxes, _, labels, *_), (other_boxes, _, other_labels, *_) = kept
    overlaps = box_iou(torch.from_numpy(boxes), torch.from_numpy(other_boxes)).numpy()
    overlaps = np.where(labels[:, None] == other_labels, overlaps, 0)
    pairs = []
    for row in range(len(boxes)):  # the surest first
        if len(other_boxes) and overlaps[row].max() >= SAME_IOU:
            column = int(overlaps[row].argmax())
            pairs.append((row, column))
            overlaps[:, column] = 0
    rows, columns = (np.array([pair[i] for pair in pairs], int) for i in (0, 1))
    largest = 0.0
    for number, unit in ((0, side), (1, 1), (3, 1)):
        if number < len(ours) and len(pairs):
            difference = np.abs(kept[0][number][rows] - kept[1][number][columns]).max()
            largest = max(largest, float(difference) / unit)
    return largest, len(pairs), len(boxes) + len(other_boxes) - len(pairs)
