"""Images to read, transform and batch for classification, under keyed randomness.

Workers hand out 8-bit pictures, a quarter of the bytes of normalised ones; ``Normalizer`` turns a whole batch into what
the network sees, on the network's device (as timm's prefetching loader does).
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose

from conv2former.data.images import MAX_PIXELS, BadImage
from conv2former.data.sampling import EvalSampler, Purpose, SampleKey, TrainSampler, seed_cpu
from conv2former.data.sources import ImageSource
from conv2former.errors import UserError, one_line
from conv2former.recipes.schema import AugmentSection, DataSection

CPU = torch.device("cpu")
NO_TARGET = -1  # of an image that is not counted
MAX_ASPECT = 20  # of a picture before it is resized for evaluation
REPLACEMENTS = 16  # images tried in place of a broken one

KILLED_WORKER = (
    "a process that reads images was killed, by want of memory (or, in a container, of /dev/shm) most likely: lower "
    "the number of workers or data.max_pixels; a training continues with --resume"
)

PictureTransform = Callable[[Image.Image], Image.Image]


class Batch(NamedTuple):
    """Images that travel together.

    Attributes:
        images: 8-bit pictures (B, 3, H, W), channels last in memory.
        targets: Classes (B,), ``NO_TARGET`` for what does not count.
        indices: Numbers of the images in their source (B,).
        bad: Images that could not be read, and whose place others have taken.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    bad: tuple[BadImage, ...] = ()


class Normalizer(nn.Module):
    """8-bit pictures (B, 3, H, W) to what a network expects: scaled to 0..1, minus mean, over std, in float32."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, 255 * torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) of uint8 to the same of float32, in the same layout."""
        if not images.is_contiguous(memory_format=torch.channels_last):
            return images.float().sub_(self.mean).div_(self.std)
        # by rows: a broadcast over the three innermost numbers would leave a CPU's vector units idle
        width = images.shape[3]
        rows = images.permute(0, 2, 3, 1).flatten(2).float()
        rows.sub_(self.mean.flatten().repeat(width)).div_(self.std.flatten().repeat(width))
        return rows.unflatten(2, (width, 3)).permute(0, 3, 1, 2)


def train_transform(data: DataSection, augment: AugmentSection) -> PictureTransform:
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
    """Lets timm's policies ask for a posterised picture of 0 bits, which Pillow refuses by now.

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


def eval_transform(config: dict[str, Any]) -> PictureTransform:
    """timm's evaluation transform for a model's data configuration (``resolve_model_data_config``)."""
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    options = {key: config[key] for key in keys if key in config}
    resize = _without_tensor(create_transform(**options, is_training=False, use_prefetcher=True))
    return Compose([limit_aspect, resize])


def _without_tensor(transform: Any) -> Any:
    return Compose(transform.transforms[:-1])  # the last turns the picture into an array, which is done here


def limit_aspect(image: Image.Image) -> Image.Image:
    """The middle of a picture that is more than ``MAX_ASPECT`` times as long as wide.

    Evaluation resizes the short side, which would make gigabytes of a line of pixels, and then takes the middle anyway.
    """
    width, height = image.size
    limit = MAX_ASPECT * min(width, height)
    if max(width, height) <= limit:
        return image
    left, top = max(width - limit, 0) // 2, max(height - limit, 0) // 2
    return image.crop((left, top, left + min(width, limit), top + min(height, limit)))


class ImageDataset(Dataset):
    """Images of a source, transformed under the random numbers of their key.

    A broken image comes out as its ``BadImage``, so that a worker process does not turn it into a traceback.

    Args:
        source: Where the images are.
        transform: Picture to picture, all of one size.
        seed: Of the run.
        on_bad_image: 'error' gives out the ``BadImage``; 'replace' the next image that can be read, with it (the same
            one whenever the key is the same); 'mask' a blank one that does not count, with it.
        max_pixels: Larger pictures count as broken.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: PictureTransform,
        *,
        seed: int = 0,
        on_bad_image: Literal["error", "replace", "mask"] = "error",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.on_bad_image, self.max_pixels = on_bad_image, max_pixels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey) -> tuple[np.ndarray, int, int, list[BadImage]] | BadImage:
        bad: list[BadImage] = []
        index = key.image
        target = NO_TARGET if key.padding else self.source.targets[index]
        while True:
            try:
                image = self.source.load(index, self.max_pixels)
                break
            except BadImage as error:
                bad.append(error)
                if self.on_bad_image == "error" or len(bad) > REPLACEMENTS:
                    return error
                if self.on_bad_image == "mask":
                    image, target = Image.new("RGB", (64, 64)), NO_TARGET
                    break
                index = (index + 1) % len(self.source)
                target = self.source.targets[index]
        seed_cpu(Purpose.AUGMENT, self.seed, key.epoch, key.image)
        return np.asarray(self.transform(image)), target, index, bad


def collate(samples: list[Any]) -> Batch | BadImage:
    """A batch, or the first broken image in it."""
    for sample in samples:
        if isinstance(sample, BadImage):
            return sample
    images, targets, indices, bad = zip(*samples, strict=True)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # channels last, as they lie
    return Batch(
        pixels, torch.tensor(targets), torch.tensor(indices), tuple(error for errors in bad for error in errors)
    )


def checked(batch: Batch | BadImage) -> Batch:
    """The batch; raises its ``BadImage`` in the process that asked for it."""
    if isinstance(batch, BadImage):
        raise batch
    return batch


def is_killed_worker(error: RuntimeError) -> bool:
    """Whether PyTorch says that a process which reads images was killed."""
    return "DataLoader worker (pid" in str(error)


def train_loader(
    dataset: ImageDataset, sampler: TrainSampler, *, workers: int, place: torch.device = CPU
) -> DataLoader:
    """One endless pass: the sampler runs through all epochs, so that workers never restart."""
    return DataLoader(dataset, batch_sampler=sampler, **_loader_options(workers, place))


def eval_loader(
    dataset: ImageDataset, sampler: EvalSampler, *, batch_size: int, workers: int, place: torch.device = CPU
) -> DataLoader:
    """Every image of the sampler once, in order, the last batch smaller."""
    return DataLoader(dataset, sampler=sampler, batch_size=batch_size, **_loader_options(workers, place))


def _loader_options(workers: int, place: torch.device) -> dict[str, Any]:
    if workers:
        atexit.unregister(_kill_workers)
        atexit.register(_kill_workers)  # after multiprocessing's own, hence before it when the process ends
    return dict(
        num_workers=workers,
        collate_fn=collate,
        pin_memory=place.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
    )


def _start_worker(worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM or SIGUSR1 reach the whole process group; the training process stops the workers
    # when its step is done
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def _kill_workers() -> None:
    """Ends workers that are left when the process ends: they ignore the SIGTERM that Python would wait on for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would take it for an accident
    for process in multiprocessing.active_children():
        if process.daemon:  # which Python would end, too
            process.kill()
