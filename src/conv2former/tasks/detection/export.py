"""A whole detector for ONNX: what goes in, and its detections compared with those of ``Detector``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from conv2former.config import AnnotatedSection
from conv2former.tasks.detection.model.detector import Detections, Detector
from conv2former.tasks.detection.model.exported import OUTPUTS, WholeDetector
from conv2former.tasks.exportable import Arrays, Exportable, OneImage

INPUTS = ["images", "size"]
SAME_IOU = 0.9  # from which two boxes of one class are the same detection


def whole(model: Detector, data: AnnotatedSection, size: tuple[int, int]) -> Exportable:
    """Everything behind an image that fits into ``size`` (H, W), without a change of its proportions."""

    def feed(image: np.ndarray) -> list[np.ndarray]:
        pixels = np.zeros((1, 3, *size), np.float32)
        pixels[0, :, : image.shape[1], : image.shape[2]] = image
        return [pixels, np.array(image.shape[1:], np.int64)]

    @torch.no_grad()
    def reference(images: np.ndarray, limits: np.ndarray) -> list[np.ndarray]:
        found: Any = model(torch.from_numpy(images), [(int(limits[0]), int(limits[1]))])
        return [column.numpy() for column in filled(found[0], model.section.max_detections)][: len(outputs)]

    def resize(image: Image.Image) -> Image.Image:
        return image.resize(fitted_into(image.size, size), Image.Resampling.BILINEAR)

    outputs = OUTPUTS if model.section.masks else OUTPUTS[:3]
    one = OneImage(INPUTS, feed, reference, lambda ours, theirs: compare(ours, theirs, max(size)))
    config = dict(interpolation="bilinear", mean=data.mean, std=data.std)
    return Exportable(WholeDetector(model).eval(), outputs, size, resize, config, one=one)


def fitted_into(given: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of an image -> the largest (width, height) of its proportions within ``size`` (H, W)."""
    factor = min(size[1] / given[0], size[0] / given[1])
    return max(round(given[0] * factor), 1), max(round(given[1] * factor), 1)


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
