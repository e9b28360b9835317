"""Images with objects: augmentation and batches.

All that augmentation does to an image is to cut out a box, bring it to a size and perhaps mirror it. It is done in one
step from the original (one resampling, one rasterisation of the polygons), so that boxes and masks fit the image.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from conv2former.data.images import BadImage
from conv2former.data.loading import KeyedDataset
from conv2former.data.rle import decode_mask, polygons_to_mask
from conv2former.tasks.dense import DIVISOR, fitted, stacked
from conv2former.tasks.detection.config import DetectionAugmentSection, DetectionDataSection
from conv2former.tasks.detection.model.detector import Target

NO_LIMIT = 1e9


class DetectionBatch(NamedTuple):
    """Images that travel together.

    Attributes:
        images: 8-bit images (B, 3, H, W), channels last, each at the upper left; sides are multiples of 32.
        sizes: (h, w) of each without the padding.
        targets: Objects of each, in its pixels; none in evaluation.
        originals: (h, w) of each image in its file.
        indices: Numbers of the images in their source (B,).
        bad: Images that could not be read, and whose place others have taken.
    """

    images: Tensor
    sizes: list[tuple[int, int]]
    targets: list[Target]
    originals: list[tuple[int, int]]
    indices: Tensor
    bad: tuple[BadImage, ...] = ()


@dataclass(frozen=True)
class View:
    """What augmentation does to an image.

    Attributes:
        box: Left, top, right, bottom of what is taken, pixels of the original.
        size: (width, height) that it is brought to.
        mirrored: Whether left and right change places.
    """

    box: tuple[float, float, float, float]
    size: tuple[int, int]
    mirrored: bool = False

    def pixels(self, image: Image.Image) -> np.ndarray:
        """(h, w, 3)."""
        return np.ascontiguousarray(
            self._turn(np.asarray(image.resize(self.size, Image.Resampling.BILINEAR, self.box)))
        )

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """A mask (H, W) of the original as one of the view, (h, w)."""
        return self._turn(np.asarray(Image.fromarray(mask).resize(self.size, Image.Resampling.NEAREST, self.box)))

    def _turn(self, pixels: np.ndarray) -> np.ndarray:
        return pixels[:, ::-1] if self.mirrored else pixels

    def points(self, points: np.ndarray) -> np.ndarray:
        """Points (N, 2) of the original in the view."""
        left, top, right, bottom = self.box
        scale = np.array([self.size[0] / (right - left), self.size[1] / (bottom - top)])
        moved = (points - np.array([left, top])) * scale
        if self.mirrored:
            moved[:, 0] = self.size[0] - moved[:, 0]
        return moved

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (N, 4) as x, y, width, height of the original as corners in the view, cut off at its edges."""
        corners = np.stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).reshape(-1, 2)
        moved = self.points(corners).reshape(-1, 2, 2)
        limits = np.array(self.size)
        low, high = moved.min(axis=1).clip(0, limits), moved.max(axis=1).clip(0, limits)
        return np.concatenate([low, high], axis=1)


def draw_view(size: tuple[int, int], augment: DetectionAugmentSection) -> View:
    """A random view of an image (width, height): perhaps resize and crop, then multi-scale resize and flip."""
    box: tuple[float, float, float, float] = (0, 0, *size)
    taken: tuple[float, float] = size
    if random.random() < augment.crop_prob:
        resized = fitted(size, short=random.choice(augment.crop_short_sides), long=NO_LIMIT)
        least, most = augment.crop_sizes
        crop = [random.randint(min(side, least), min(side, most)) for side in resized]
        left, top = (random.randint(0, side - part) for side, part in zip(resized, crop, strict=True))
        across, down = size[0] / resized[0], size[1] / resized[1]
        box = (left * across, top * down, (left + crop[0]) * across, (top + crop[1]) * down)
        taken = (crop[0], crop[1])
    final = fitted((int(taken[0]), int(taken[1])), short=random.choice(augment.short_sides), long=augment.long_side)
    return View(box, final, random.random() < augment.hflip)


def view_objects(objects: Sequence[dict[str, Any]], view: View, labels: dict[Any, int]) -> Target:
    """The objects that a view shows, without crowds and those of which less than a pixel is left.

    Args:
        objects: COCO's annotations.
        view: Of their image.
        labels: Class of each category id.

    Returns:
        With blank masks for objects without one, or none at all where no object has one.
    """
    single = [entry for entry in objects if not entry.get("iscrowd")]
    boxes = view.boxes(np.array([entry["bbox"] for entry in single], float).reshape(-1, 4))
    left = np.flatnonzero(((boxes[:, 2:] - boxes[:, :2]) >= 1).all(axis=1))
    width, height = view.size
    given = [single[i].get("segmentation") for i in left]
    blank = np.zeros((height, width), np.uint8)
    masks = [object_mask(mask, view) if mask else blank for mask in given] if any(given) else []
    return Target(
        torch.from_numpy(boxes[left]).float(),
        torch.tensor([labels[single[i]["category_id"]] for i in left], dtype=torch.long),
        torch.from_numpy(np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)),
        None if all(given) else torch.tensor([bool(mask) for mask in given]),
    )


def object_mask(segmentation: Any, view: View) -> np.ndarray:
    """COCO's polygons or run lengths as a mask (h, w) of uint8 in a view."""
    width, height = view.size
    if isinstance(segmentation, dict):
        return view.mask(decode_mask(segmentation))
    polygons = [view.points(np.array(polygon, float).reshape(-1, 2)).ravel().tolist() for polygon in segmentation]
    return polygons_to_mask(polygons, height, width)


class TrainObjects(KeyedDataset):
    """Augmented images with their objects."""

    def __init__(
        self, source: Any, data: DetectionDataSection, augment: DetectionAugmentSection, **options: Any
    ) -> None:
        super().__init__(source, **options)
        self.data, self.augment = data, augment
        self.labels = {number: label for label, number in enumerate(source.category_ids)}

    def prepare(self, content: Any, index: int, *, counted: bool) -> tuple[np.ndarray, Target, tuple[int, int]]:
        """Image (h, w, 3), objects, (h, w) of the original."""
        image, objects = content
        view = draw_view(image.size, self.augment)
        target = view_objects(objects, view, self.labels)
        return view.pixels(image), target, (image.height, image.width)

    def join(self, samples: Sequence[Any], indices: Tensor, bad: tuple[BadImage, ...]) -> DetectionBatch:
        """A batch of the largest sides."""
        arrays, targets, originals = zip(*samples, strict=True)
        return _batch(arrays, list(targets), list(originals), indices, bad)


class EvalObjects(KeyedDataset):
    """Whole images at the size of evaluation, as ``eval_view`` says; their objects stay in the source."""

    def __init__(
        self, source: Any, data: DetectionDataSection, *, within: tuple[int, int] | None = None, **options: Any
    ) -> None:
        super().__init__(source, **options)
        self.data, self.within = data, within

    def prepare(self, content: Any, index: int, *, counted: bool) -> tuple[np.ndarray, tuple[int, int]]:
        """Image (h, w, 3), (h, w) of the original; (0, 0) for one that does not count."""
        if content is None or not counted:
            return np.zeros((DIVISOR, DIVISOR, 3), np.uint8), (0, 0)
        image, _ = content
        return eval_view(image, self.data, self.within).pixels(image), (image.height, image.width)

    def join(self, samples: Sequence[Any], indices: Tensor, bad: tuple[BadImage, ...]) -> DetectionBatch:
        """A batch of the largest sides."""
        arrays, originals = zip(*samples, strict=True)
        return _batch(arrays, [], list(originals), indices, bad)


def eval_view(image: Image.Image, data: DetectionDataSection, within: tuple[int, int] | None = None) -> View:
    """The whole image at the size of evaluation, or as large as it fits ``within`` (H, W)."""
    size = fitted(image.size, short=data.short_side, long=data.long_side)
    return View((0, 0, *image.size), size if within is None else fitted_into(image.size, within))


def fitted_into(given: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of an image -> the largest (width, height) of its proportions within ``size`` (H, W)."""
    factor = min(size[1] / given[0], size[0] / given[1])
    return max(round(given[0] * factor), 1), max(round(given[1] * factor), 1)


def _batch(
    arrays: Sequence[np.ndarray],
    targets: list[Target],
    originals: list[tuple[int, int]],
    indices: Tensor,
    bad: tuple[BadImage, ...],
) -> DetectionBatch:
    sizes = [(array.shape[0], array.shape[1]) for array in arrays]
    return DetectionBatch(stacked(arrays), sizes, targets, originals, indices, bad)
