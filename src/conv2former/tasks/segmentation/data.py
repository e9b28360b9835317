"""Images with masks: augmentation and batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from conv2former.data.images import BadImage
from conv2former.data.loading import KeyedDataset
from conv2former.tasks.dense import fitted
from conv2former.tasks.segmentation.config import SegmentationAugmentSection, SegmentationDataSection
from conv2former.tasks.segmentation.masks import IGNORED

CROP_TRIES = 10
BLANK = 32  # side of what stands for an image that cannot be read
Views = list[np.ndarray]


class SegmentationBatch(NamedTuple):
    """Images that travel together.

    Attributes:
        images: 8-bit images (B, 3, H, W) of one size, channels last; in evaluation one for each scale (B = 1).
        sizes: (h, w) of each without the padding at the right and below.
        masks: Classes (B, H, W) of uint8, 255 for none; in evaluation of the image as it is in its file.
        indices: Numbers of the images in their source (B,).
        bad: Images that could not be read, and whose place others have taken.
    """

    images: list[Tensor]
    sizes: list[tuple[int, int]]
    masks: Tensor
    indices: Tensor
    bad: tuple[BadImage, ...] = ()


class TrainPairs(KeyedDataset):
    """Augmented crops: random scale, crop that no class fills, flip, photometric distortion."""

    def __init__(
        self, source: Any, data: SegmentationDataSection, augment: SegmentationAugmentSection, **options: Any
    ) -> None:
        super().__init__(source, **options)
        self.data, self.augment = data, augment
        self.colours = photometric(augment.photometric)

    def prepare(self, content: Any, index: int, *, counted: bool) -> tuple[np.ndarray, np.ndarray]:
        """Image (h, w, 3) and classes (h, w), at most of the crop's size."""
        image, labels = content
        data, augment = self.data, self.augment
        scale = random.uniform(*augment.scale)
        size = fitted(image.size, short=data.short_side * scale, long=data.long_side * scale)
        image = image.resize(size, Image.Resampling.BILINEAR)
        labels = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
        left, top, right, bottom = crop_box(labels, data.crop_size, max_share=augment.max_class_share)
        image, labels = image.crop((left, top, right, bottom)), labels[top:bottom, left:right]
        if random.random() < augment.hflip:
            image, labels = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), labels[:, ::-1]
        return np.asarray(self.colours(image)), labels

    def join(self, samples: Sequence[Any], indices: Tensor, bad: tuple[BadImage, ...]) -> SegmentationBatch:
        """A batch of the crop's size; smaller images lie at its upper left."""
        side = self.data.crop_size
        images = np.zeros((len(samples), side, side, 3), np.uint8)
        labels = np.full((len(samples), side, side), IGNORED, np.uint8)
        for row, (image, classes) in enumerate(samples):
            height, width = classes.shape
            images[row, :height, :width], labels[row, :height, :width] = image, classes
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        sizes = [classes.shape for _, classes in samples]
        return SegmentationBatch([pixels], sizes, torch.from_numpy(labels), indices, bad)


def photometric(probability: float) -> Any:
    """Brightness by 32 of 255, contrast and saturation by half, hue by 18 degrees, each with a probability.

    mmseg's ranges; brightness is torchvision's factor where mmseg adds.
    """
    changes = [dict(brightness=32 / 255), dict(contrast=0.5), dict(saturation=0.5), dict(hue=18 / 360)]
    return v2.Compose([v2.RandomApply([v2.ColorJitter(**change)], p=probability) for change in changes])


def crop_box(labels: np.ndarray, side: int, *, max_share: float) -> tuple[int, int, int, int]:
    """A random square (left, top, right, bottom) of a map in which one class fills at most ``max_share``.

    After ten tries the last one is taken; pixels without class are not counted.
    """
    height, width = labels.shape
    box = (0, 0, width, height)
    for _ in range(CROP_TRIES):
        top, left = random.randint(0, max(height - side, 0)), random.randint(0, max(width - side, 0))
        box = (left, top, min(left + side, width), min(top + side, height))
        if max_share == 1:
            break
        counts = np.bincount(labels[box[1] : box[3], box[0] : box[2]].ravel(), minlength=IGNORED + 1)[:IGNORED]
        if np.count_nonzero(counts) > 1 and counts.max() < max_share * counts.sum():
            break
    return box


class EvalPairs(KeyedDataset):
    """Whole images, at one or several scales, with their classes as they are in the file.

    Args:
        source: Where they are.
        data: Gives the size at scale 1.
        scales: Of the views.
        **options: Of ``KeyedDataset``.
    """

    def __init__(
        self, source: Any, data: SegmentationDataSection, *, scales: Sequence[float] = (1.0,), **options: Any
    ) -> None:
        super().__init__(source, **options)
        self.data, self.scales = data, scales

    def prepare(self, content: Any, index: int, *, counted: bool) -> tuple[Views, np.ndarray]:
        """An image (h, w, 3) for each scale, and classes (H, W)."""
        image, labels = content or (Image.new("RGB", (BLANK, BLANK)), np.full((BLANK, BLANK), IGNORED, np.uint8))
        if not counted:
            labels = np.full_like(labels, IGNORED)
        return views(image, self.data, self.scales), labels

    def join(self, samples: Sequence[Any], indices: Tensor, bad: tuple[BadImage, ...]) -> SegmentationBatch:
        """A batch of one image, because they differ in size."""
        ((arrays, labels),) = samples
        pixels = [torch.from_numpy(array).permute(2, 0, 1)[None] for array in arrays]
        sizes = [array.shape[:2] for array in arrays]
        return SegmentationBatch(pixels, sizes, torch.from_numpy(labels)[None], indices, bad)


def views(image: Image.Image, data: SegmentationDataSection, scales: Sequence[float]) -> Views:
    """An image (h, w, 3) for each scale."""
    found = []
    for scale in scales:
        size = fitted(image.size, short=data.short_side * scale, long=data.long_side * scale)
        found.append(np.array(image.resize(size, Image.Resampling.BILINEAR)))
    return found
