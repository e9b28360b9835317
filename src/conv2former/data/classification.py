"""Images to read, transform and batch for classification, under keyed randomness."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from conv2former.data.images import BadImage
from conv2former.data.sampling import EvalSampler, Purpose, SampleKey, TrainSampler, seeded
from conv2former.data.sources import ImageSource
from conv2former.errors import UserError, one_line
from conv2former.recipes.schema import AugmentSection, DataSection

Batch = tuple[Tensor, Tensor, Tensor]  # images (B, 3, H, W), targets (B,), indices (B,)


def train_transform(data: DataSection, augment: AugmentSection) -> Callable[[Image.Image], Tensor]:
    """timm's training transform: random crop, flip, policy, normalisation, random erasing.

    Raises:
        UserError: A policy that timm does not know.
    """
    options: dict[str, Any] = dict(
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
        interpolation=data.interpolation,
        mean=data.mean,
        std=data.std,
        re_prob=augment.random_erasing,
        re_mode="pixel",
    )
    try:
        return create_transform(data.input_size, is_training=True, **options)
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(f"timm cannot build the augmentation ({one_line(error)}): check augment.auto_augment") from None


def eval_transform(config: dict[str, Any]) -> Callable[[Image.Image], Tensor]:
    """timm's evaluation transform for a model's data configuration (``resolve_model_data_config``)."""
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return create_transform(**{key: config[key] for key in keys if key in config}, is_training=False)


class ImageDataset(Dataset):
    """Images of a source, transformed under the random numbers of their key.

    A broken image comes out as its ``BadImage``, so that a worker process does not turn it into a traceback.
    """

    def __init__(self, source: ImageSource, transform: Callable[[Image.Image], Tensor], *, seed: int = 0) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int, int] | BadImage:
        try:
            image = self.source.load(key.image)
        except BadImage as error:
            return error
        with seeded(Purpose.AUGMENT, self.seed, *key):
            return self.transform(image), self.source.targets[key.image], key.image


def collate(samples: list[Any]) -> Batch | BadImage:
    """A batch, or the first broken image in it."""
    for sample in samples:
        if isinstance(sample, BadImage):
            return sample
    images, targets, indices = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(targets), torch.tensor(indices)


def checked(batch: Batch | BadImage) -> Batch:
    """The batch; raises its ``BadImage`` in the process that asked for it."""
    if isinstance(batch, BadImage):
        raise batch
    return batch


def train_loader(dataset: ImageDataset, sampler: TrainSampler, *, workers: int) -> DataLoader:
    """One endless pass: the sampler runs through all epochs, so that workers never restart."""
    return DataLoader(dataset, batch_sampler=sampler, **_loader_options(workers))


def eval_loader(dataset: ImageDataset, sampler: EvalSampler, *, batch_size: int, workers: int) -> DataLoader:
    """Every image of the sampler once, in order, the last batch smaller."""
    return DataLoader(dataset, sampler=sampler, batch_size=batch_size, **_loader_options(workers))


def _loader_options(workers: int) -> dict[str, Any]:
    return dict(
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_ignore_interrupt,
    )


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the training process stops the workers when its
    # step is done
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
