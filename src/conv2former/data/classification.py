"""Labelled images for training and evaluation: where they lie, how they are split, how they become batches."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from conv2former.data.images import IMAGE_EXTENSIONS, BadImage, decode
from conv2former.data.sampling import EvalSampler, Purpose, SampleKey, TrainSampler, derive_seed, seeded
from conv2former.errors import UserError, one_line, some
from conv2former.recipes.schema import AugmentSection, DataSection

Batch = tuple[Tensor, Tensor, Tensor]  # images (B, 3, H, W), targets (B,), indices (B,)


class ImageSource(Protocol):
    """A set of labelled images."""

    classes: list[str]
    targets: list[int]

    def __len__(self) -> int: ...

    def load(self, index: int) -> Image.Image:
        """The image in RGB; raises BadImage."""
        ...

    def name(self, index: int) -> str:
        """What to call the image in messages and files."""
        ...


class FolderSource:
    """One folder per class, read with timm's folder reader (nested folders: the innermost names the class).

    Hidden files and folders are passed over. Classes and images are in natural order, equal ones ('1' and '01') in that
    of their names, so that the order is the same on every machine.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        none = f"no images in {root}: expected one folder per class with files ending in {' '.join(IMAGE_EXTENSIONS)}"
        try:
            self.reader = ReaderImageFolder(str(root), input_key=";".join(IMAGE_EXTENSIONS))
        except RuntimeError:
            raise UserError(none) from None
        names = {index: name for name, index in self.reader.class_to_idx.items()}
        samples = [(path, names[index]) for path, index in self.reader.samples if not self._hidden(path)]
        if not samples:
            raise UserError(none)
        loose = [path for path, name in samples if not name]
        if loose:
            raise UserError(f"{loose[0]} lies in no class folder: move or remove the images directly in {root}")
        samples.sort(key=lambda sample: (natural_key(sample[0]), sample[0]))
        self.classes = sorted({name for _, name in samples}, key=lambda name: (natural_key(name), name))
        self.targets = [self.classes.index(name) for _, name in samples]
        self.reader.samples = list(zip((path for path, _ in samples), self.targets, strict=True))

    def __len__(self) -> int:
        return len(self.targets)

    def _hidden(self, path: str) -> bool:
        return any(part.startswith(".") for part in Path(path).relative_to(self.root).parts)

    def load(self, index: int) -> Image.Image:
        """The image in RGB; raises BadImage."""
        return decode(self.reader.filename(index, absolute=True))

    def name(self, index: int) -> str:
        """The path below the folder's root."""
        return self.reader.filename(index)


class DigitsSource:
    """scikit-learn's handwritten digits: 1,797 scans of 8x8 pixels, inside its wheel."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.images = np.round(digits.images * (255 / 16)).astype(np.uint8)
        self.targets = [int(target) for target in digits.target]
        self.classes = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int) -> Image.Image:
        """The scan in RGB, 8x8."""
        return Image.fromarray(self.images[index]).convert("RGB")

    def name(self, index: int) -> str:
        """The scan's number in the set, and its digit."""
        return f"digit-{index:04d}-is-{self.targets[index]}.png"


class SubsetSource:
    """Some images of another source."""

    def __init__(self, source: ImageSource, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices
        self.classes = source.classes
        self.targets = [source.targets[i] for i in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> Image.Image:
        """The image in RGB; raises BadImage."""
        return self.source.load(self.indices[index])

    def name(self, index: int) -> str:
        """The image's name in the other source."""
        return self.source.name(self.indices[index])


@dataclass(frozen=True)
class Splits:
    """A training and a validation set with the same classes."""

    train: ImageSource
    val: ImageSource

    def digest(self) -> str:
        """A hash of the names and classes of all images, by which a resumed run knows its data."""
        digest = hashlib.sha256()
        for source in (self.train, self.val):
            for index, target in enumerate(source.targets):
                digest.update(f"{source.name(index)}\0{source.classes[target]}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]


def open_splits(data: DataSection, root: Path | None, *, seed: int) -> Splits:
    """The two sets that a recipe trains and validates on.

    ``root`` holds ``train/`` and ``val/`` (or ``validation/``), or, with ``data.val_fraction``, class folders of which
    a stratified share is held out; the split depends on the seed and the files.

    Raises:
        UserError: Missing folder, no images, no validation set, fewer than two classes, classes that differ.
    """
    if data.source == "digits":
        if root is not None:
            raise UserError(f"the recipe brings its own images and would ignore {root}: leave --data out")
        return _split(DigitsSource(), data.val_fraction, seed)
    root = _existing(root)
    train_dir, val_dir = root / "train", _val_dir(root)
    if not train_dir.is_dir():
        if val_dir or not data.val_fraction:
            raise UserError(
                f"no train/ folder in {root}: give train/ and val/ with one folder per class, or class folders alone "
                "with --set data.val_fraction=0.1"
            )
        return _split(FolderSource(root), data.val_fraction, seed)
    if val_dir is None:
        if not data.val_fraction:
            raise UserError(f"no val/ folder in {root}: add one, or hold out a share with --set data.val_fraction=0.1")
        return _split(FolderSource(train_dir), data.val_fraction, seed)
    splits = Splits(FolderSource(train_dir), FolderSource(val_dir))
    _check_same_classes(splits)
    _check_class_count(splits.train)
    return splits


def open_eval_source(root: Path | None, classes: list[str]) -> ImageSource:
    """The images to evaluate a model with these classes on, targets in the order of ``classes``.

    ``root`` holds ``val/`` or ``validation/``, or is itself a folder of class folders.

    Raises:
        UserError: Missing folder, no images, training images alone, a class folder that the model does not know.
    """
    root = _existing(root)
    if (root / "train").is_dir() and _val_dir(root) is None:
        raise UserError(f"{root} has train/ and no val/: give the folder of the images to evaluate on itself")
    source = FolderSource(_val_dir(root) or root)
    unknown = sorted(set(source.classes) - set(classes))
    if unknown:
        raise UserError(
            f"{source.root} has {len(unknown)} class folders that the model does not know ({some(unknown)}); "
            f"its {len(classes)} classes are {some(classes)}"
        )
    order = [classes.index(name) for name in source.classes]
    source.targets = [order[target] for target in source.targets]
    source.classes = classes
    return source


def _existing(root: Path | None) -> Path:
    if root is None:
        raise UserError("no data given: name the folder of images with --data DIR")
    if not root.is_dir():
        raise UserError(f"no such folder: {root}" if not root.exists() else f"not a folder: {root}")
    return root


def _val_dir(root: Path) -> Path | None:
    return next((root / name for name in ("val", "validation") if (root / name).is_dir()), None)


def _split(source: ImageSource, fraction: float, seed: int) -> Splits:
    _check_class_count(source)
    if not fraction:
        raise UserError("nothing is held out for validation: set data.val_fraction=0.1, say")
    held_out: list[int] = []
    targets = np.asarray(source.targets)
    for target, name in enumerate(source.classes):
        members = np.flatnonzero(targets == target)
        if len(members) < 2:
            raise UserError(f"class {name!r} has {len(members)} image: two are needed to hold one out for validation")
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        order = np.random.default_rng(derive_seed(Purpose.SPLIT, seed, target)).permutation(members)
        held_out += order[:count].tolist()
    val = sorted(held_out)
    train = sorted(set(range(len(source))) - set(val))
    return Splits(SubsetSource(source, train), SubsetSource(source, val))


def _check_class_count(source: ImageSource) -> None:
    if len(source.classes) < 2:
        where = getattr(source, "root", "the data")
        raise UserError(f"only one class ({source.classes[0]!r}) in {where}: give at least two class folders")


def _check_same_classes(splits: Splits) -> None:
    train, val = set(splits.train.classes), set(splits.val.classes)
    if train != val:
        parts = [
            f"only in {where}: {some(sorted(names))}"
            for where, names in (("train", train - val), ("val", val - train))
            if names
        ]
        raise UserError(f"train and val have different classes ({'; '.join(parts)}): make the folders match")


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
