"""The training and the validation set of a recipe: found where the data lies, or split off."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from conv2former.data.sampling import Purpose, derive_seed
from conv2former.data.sources import given_folder
from conv2former.errors import UserError, nearest, some
from conv2former.tasks.classification.archives import ShardSource, TarSource, is_shard, tar_files
from conv2former.tasks.classification.config import DataSection
from conv2former.tasks.classification.sources import (
    DigitsSource,
    FolderSource,
    HfdsSource,
    ImageSource,
    SubsetSource,
    hfds_splits,
)


@dataclass(frozen=True)
class Splits:
    """A training and a validation set with the same classes."""

    train: ImageSource
    val: ImageSource

    def digest(self) -> str:
        """A hash of the names and classes of all images, by which a resumed run knows its data."""
        digest = hashlib.sha256()
        for source in (self.train, self.val):
            for start in range(0, len(source), 1 << 16):  # a call per image would take as long as naming them
                part = enumerate(source.targets[start : start + (1 << 16)], start)
                lines = "".join([f"{source.name(index)}\0{source.classes[target]}\n" for index, target in part])
                digest.update(lines.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]


def open_splits(data: DataSection, root: Path | None, *, seed: int) -> Splits:
    """The two sets that a recipe trains and validates on.

    ``root`` holds a training and a validation set in the layout of ``data.source``, or, with ``data.val_fraction``, one
    set of which a stratified fraction is held out; the split depends on the seed and the files.

    - folder: ``train/`` and ``val/`` (or ``validation/``) with class folders, or class folders alone.
    - tar: ``train.tar`` and ``val.tar``, or ``train/`` and ``val/`` with tar files, or tar files alone.
    - wds: shards ``train-*.tar`` and ``val-*.tar``, or of any name alone.
    - hfds: the splits 'train' and 'validation', 'val' or 'test', or one of any name alone; ``root`` may be a name on
      the hub.

    Raises:
        UserError: Missing or damaged data, no images, no validation set, fewer than two classes, classes that differ.
    """
    if data.source == "digits":
        if root is not None:
            raise UserError(f"the recipe brings its own images and would ignore {root}: leave --data out")
        return _split(DigitsSource(), data.val_fraction, seed)
    layout = _layout(data.source, root)
    if layout.train is None:
        if layout.val or not data.val_fraction:
            raise UserError(
                f"no {layout.words[0]} in {root}: give {layout.words[2]} alone with --set data.val_fraction=0.1"
            )
        return _split(layout.alone(), data.val_fraction, seed)
    if layout.val is None:
        if not data.val_fraction:
            raise UserError(
                f"no {layout.words[1]} in {root}: add one, or hold out a fraction with --set data.val_fraction=0.1"
            )
        return _split(layout.train(), data.val_fraction, seed)
    splits = Splits(layout.train(), layout.val())
    _check_same_classes(splits)
    _put_in_order(splits.val, splits.train.classes)
    _check_class_count(splits.train)
    return splits


def open_eval_source(root: Path | None, classes: list[str], *, kind: str = "folder") -> ImageSource:
    """The images to evaluate a model with these classes on, targets in the order of ``classes``.

    ``root`` holds a validation set as ``open_splits`` describes it, or one set alone. ``kind`` is a ``data.source``;
    'digits' stands for folders here, since images are named.

    Raises:
        UserError: Missing or damaged data, no images, training images alone, a class that the model does not know.
    """
    layout = _layout("folder" if kind == "digits" else kind, root)
    if layout.train and layout.val is None:
        train, val = (words.removesuffix(" folder") for words in layout.words[:2])
        raise UserError(f"{root} has {train} and no {val}: give the folder of the images to evaluate on itself")
    source = (layout.val or layout.alone)()
    counts = np.bincount(source.targets, minlength=len(source.classes))
    known = set(classes)
    unknown = [name for name, count in zip(source.classes, counts, strict=True) if count and name not in known]
    if unknown:
        raise UserError(
            f"{getattr(source, 'root', root)} has {len(unknown)} {'class folders' if kind == 'folder' else 'classes'} "
            f"that the model does not know ({some(unknown)}); its {len(classes)} classes are {some(classes)}"
        )
    _put_in_order(source, classes)
    return source


Opener = Callable[[], ImageSource]


@dataclass(frozen=True)
class _Layout:
    """The sets found below a root, each opened by calling it.

    Attributes:
        train: The training set, if there is one.
        val: The validation set, if there is one.
        alone: What lies in the root itself.
        words: What the training and the validation set are called in messages, and what to give.
    """

    train: Opener | None
    val: Opener | None
    alone: Opener
    words: tuple[str, str, str]


def _layout(kind: str, root: Path | None) -> _Layout:
    if kind == "hfds" and root is not None and not root.exists() and not root.is_absolute():
        return _hfds_layout(root)  # a name on the hub, perhaps
    known = dict(folder=_folder_layout, tar=_tar_layout, wds=_wds_layout, hfds=_hfds_layout)
    if kind not in known:
        raise UserError(f"unknown layout of images {kind!r}{nearest(kind, [*known])}; there are: {', '.join(known)}")
    return known[kind](given_folder(root, "images"))


def _folder_layout(root: Path) -> _Layout:
    train = root / "train" if (root / "train").is_dir() else None
    val = next((root / name for name in ("val", "validation") if (root / name).is_dir()), None)
    for folder in (root, train, val):
        if folder:
            _refuse_archives(folder)
    words = ("train/ folder", "val/ folder", "train/ and val/ with one folder per class, or class folders")
    return _Layout(_opener(FolderSource, train), _opener(FolderSource, val), partial(FolderSource, root), words)


def _refuse_archives(folder: Path) -> None:
    """Refuses tar files and no class folders where these are asked for."""
    tars = tar_files(folder)
    if tars and not any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir()):
        kind, what = ("wds", "webdataset shards") if is_shard(tars[0]) else ("tar", "tar files")
        raise UserError(f"{folder} holds {what} and no class folders: read them with --set data.source={kind}")


def _tar_layout(root: Path) -> _Layout:
    def find(*names: str) -> Path | None:
        files = (root / f"{name}.tar" for name in names)
        folders = (root / name for name in names)
        return next((path for path in (*files, *folders) if path.exists()), None)

    train, val = find("train"), find("val", "validation")
    words = ("train.tar", "val.tar", "train.tar and val.tar, or train/ and val/ with tar files, or one tar per class")
    return _Layout(_opener(TarSource, train), _opener(TarSource, val), partial(TarSource, root), words)


def _wds_layout(root: Path) -> _Layout:
    shards = tar_files(root)

    def find(names: str) -> list[Path]:
        return [shard for shard in shards if re.match(rf"(.*-)?({names})-.*\.tar", shard.name)]

    words = ("train-*.tar shards", "val-*.tar shards", "shards train-*.tar and val-*.tar, or shards of other names")
    train, val = (_opener(ShardSource, root, find(names)) for names in ("train", "val|validation"))
    return _Layout(train, val, partial(ShardSource, root, shards), words)


def _hfds_layout(root: Path) -> _Layout:
    splits = hfds_splits(root)
    train = next((split for split in splits if split == "train"), None)
    val = next((split for split in ("validation", "val", "test") if split in splits), None)
    if not train and not val and len(splits) != 1:
        raise UserError(f"{root} has the splits {some(splits)}: 'train' and 'validation' are needed")
    words = ("split 'train'", "split 'validation'", "a dataset with the splits 'train' and 'validation', or one split")
    return _Layout(
        _opener(HfdsSource, root, train), _opener(HfdsSource, root, val), partial(HfdsSource, root, splits[0]), words
    )


def _opener(source: Callable[..., ImageSource], *places: Any) -> Opener | None:
    """Opens a set, if its place was found."""
    return partial(source, *places) if places[-1] else None


def _put_in_order(source: ImageSource, classes: list[str]) -> None:
    """Gives a set the classes, and their order, of a model or of another set."""
    if source.classes == classes:
        return
    numbers = {name: number for number, name in enumerate(classes)}
    order = [numbers.get(name, -1) for name in source.classes]  # -1 for classes without images
    source.targets = [order[target] for target in source.targets]
    source.classes = classes


def _split(source: ImageSource, fraction: float, seed: int) -> Splits:
    """Holds out a fraction of each class, and nothing of a class with a single image (ImageNet-22k has some)."""
    _check_class_count(source)
    if not fraction:
        raise UserError("nothing is held out for validation: set data.val_fraction=0.1, say")
    targets = np.asarray(source.targets)
    counts = np.bincount(targets, minlength=len(source.classes))
    by_class = np.split(np.argsort(targets, kind="stable"), np.cumsum(counts)[:-1])
    held_out = np.zeros(len(targets), bool)
    for target, members in enumerate(by_class):
        if len(members) < 2:
            continue
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        order = np.random.default_rng(derive_seed(Purpose.SPLIT, seed, target)).permutation(members)
        held_out[order[:count]] = True
    if not held_out.any():
        raise UserError("no class has two images: two are needed to hold one out for validation")
    return Splits(SubsetSource(source, np.flatnonzero(~held_out)), SubsetSource(source, np.flatnonzero(held_out)))


def _check_class_count(source: ImageSource) -> None:
    if len(source.classes) < 2:
        where = getattr(source, "root", "the data")
        raise UserError(f"only one class ({source.classes[0]!r}) in {where}: give at least two")


def _check_same_classes(splits: Splits) -> None:
    train, val = set(splits.train.classes), set(splits.val.classes)
    if getattr(splits.val, "numbered", False) and val < train:
        return  # nobody named the classes, and some may have no image for validation
    if train != val:
        parts = [
            f"only in {where}: {some(sorted(names))}"
            for where, names in (("train", train - val), ("val", val - train))
            if names
        ]
        raise UserError(f"train and val have different classes ({'; '.join(parts)}): make them match")
