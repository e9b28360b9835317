"""The training and the validation set of a recipe: found in folders, or split off."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conv2former.data.sampling import Purpose, derive_seed
from conv2former.data.sources import DigitsSource, FolderSource, ImageSource, SubsetSource
from conv2former.errors import UserError, some
from conv2former.recipes.schema import DataSection


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
