"""Images with one class each: transforms and batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from torch import Tensor
from torchvision.transforms import Compose

from conv2former.data.images import BadImage
from conv2former.data.loading import KeyedDataset
from conv2former.errors import UserError, one_line
from conv2former.tasks.classification.config import AugmentSection, DataSection
from conv2former.tasks.classification.sources import ImageSource
from conv2former_runtime.images import limit_aspect

NO_TARGET = -1  # of an image that is not counted

ImageTransform = Callable[[Image.Image], Image.Image]


class Batch(NamedTuple):
    """Images that travel together.

    Attributes:
        images: 8-bit images (B, 3, H, W), channels last in memory.
        targets: Classes (B,), ``NO_TARGET`` for what does not count.
        indices: Numbers of the images in their source (B,).
        bad: Images that could not be read, and whose place others have taken.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    bad: tuple[BadImage, ...] = ()


def train_transform(data: DataSection, augment: AugmentSection) -> ImageTransform:
    """timm's training transform up to the normalisation: random crop, flip, policy.

    Raises:
        UserError: A policy that timm does not know.
    """
    try:
        options = timm_options(data, augment)
        transform = create_transform(data.input_size, is_training=True, use_prefetcher=True, **options)
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(f"timm cannot build the augmentation ({one_line(error)}): check augment.auto_augment") from None
    _mend_posterize(transform)
    return _without_tensor(transform)


def timm_options(data: DataSection, augment: AugmentSection) -> dict[str, Any]:
    """The recipe's training transform in timm's words, for its transforms and its loaders alike."""
    return dict(
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
        interpolation=data.interpolation,
        mean=data.mean,
        std=data.std,
    )


def _mend_posterize(transform: Any) -> None:
    """Lets timm's policies ask for a posterised image of 0 bits, which Pillow refuses by now.

    They do so at the highest magnitude, which ``rand-m9-mstd0.5-inc1`` draws now and then.
    """
    for part in transform.transforms:
        nested = [getattr(part, "ops", []), *getattr(part, "policy", [])]
        for operation in [operation for operations in nested for operation in operations]:
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = posterize


def posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's, and black for 0 bits, as Pillow used to make it."""
    if bits == 0:
        return image.point([0] * 256 * len(image.getbands()))
    return auto_augment.posterize(image, bits, **options)


def eval_transform(config: dict[str, Any]) -> ImageTransform:
    """timm's evaluation transform for a model's data configuration (``resolve_model_data_config``)."""
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    options = {key: config[key] for key in keys if key in config}
    resize = _without_tensor(create_transform(**options, is_training=False, use_prefetcher=True))
    return Compose([limit_aspect, resize])


def _without_tensor(transform: Any) -> Any:
    return Compose(transform.transforms[:-1])  # the last turns the image into an array, which is done here


class ImageDataset(KeyedDataset):
    """Images of a source with their classes, transformed.

    Args:
        source: Where the images are.
        transform: Image to image, all of one size.
        **options: Of ``KeyedDataset``.
    """

    def __init__(self, source: ImageSource, transform: ImageTransform, **options: Any) -> None:
        super().__init__(source, **options)
        self.transform = transform

    def prepare(self, content: Image.Image | None, index: int, *, counted: bool) -> tuple[np.ndarray, int]:
        """Image (H, W, 3) of uint8 and class."""
        image = content or Image.new("RGB", (64, 64))
        return np.asarray(self.transform(image)), self.source.targets[index] if counted else NO_TARGET

    def join(self, samples: Sequence[Any], indices: Tensor, bad: tuple[BadImage, ...]) -> Batch:
        """A batch, channels last, as the images lie."""
        images, targets = zip(*samples, strict=True)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return Batch(pixels, torch.tensor(targets), indices, bad)
