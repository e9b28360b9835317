"""The training and the validation set of a recipe: found where the data lies, or split off."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from conv2former.data.folders import SPLITS, find_splits, respelled, subfolders, unread
from conv2former.data.images import BadImage, shown_size
from conv2former.data.recognise import holds_images, masked, refuse_masks, refuse_parts
from conv2former.data.sampling import Purpose, derive_seed
from conv2former.data.sources import alike, counted, given_folder, only_in, spread
from conv2former.errors import UserError, nearest, printable, some, visible
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

LOOKED_INTO = 20  # class folders, or images
LEAST_ENLARGED = 96  # pixels, of small images
DEEP = 3  # folders that hold one folder each, as unpacking a file leaves them


@dataclass(frozen=True)
class Splits:
    """A training and a validation set with the same classes."""

    train: ImageSource
    val: ImageSource
    held_out: bool = False  # whether the validation set is a fraction of the one that was given
    unread: str | None = None

    @property
    def notes(self) -> list[str]:
        """What lies beside them and is not read, the classes with their numbers of training images."""
        counts = np.bincount(self.train.targets, minlength=len(self.train.classes))
        each = [f"{visible(name)} ({count:,})" for name, count in zip(self.train.classes, counts, strict=True)]
        tried = {*self.val.targets}
        missing = [visible(name) for i, name in enumerate(self.train.classes) if counts[i] and i not in tried]
        untried = f"no validation images of: {printable(some(missing))}" if missing else None
        return [*filter(None, [self.unread, alike(self.train.classes), untried]), counted(each, self)]

    def too_small(self, data: DataSection) -> str | None:
        """The line about images that are enlarged to more than twice their size, which takes time."""
        name_of = getattr(self.train, "file", lambda index: None)
        sides = []
        for file in filter(None, map(name_of, spread(len(self.train), LOOKED_INTO))):
            with contextlib.suppress(BadImage):  # whoever reads the image says it
                sides.append(max(shown_size(Path(file), turn=False)))
        side = int(np.median(sides)) if sides else data.input_size
        fitting = max(-(-2 * side // 32) * 32, LEAST_ENLARGED)
        if fitting >= data.input_size:
            return None
        what = f"images of {side} pixels are enlarged to {data.input_size}, which adds no detail"
        fewer = (data.input_size / fitting) ** 2
        return f"{what}: --set data.input_size={fitting} computes {fewer:.1f} times fewer pixels"

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

    - folder: ``train/`` and ``val/`` with class folders, or class folders alone.
    - tar: ``train.tar`` and ``val.tar``, or ``train/`` and ``val/`` with tar files, or tar files alone.
    - wds: shards ``train-*.tar`` and ``val-*.tar``, or of any name alone.
    - hfds: the splits 'train' and 'validation', or one of any name alone; ``root`` may be a name on the hub.

    'val' is also called 'valid' or 'validation', each in upper and lower case; 'test' is never validated on.

    Raises:
        UserError: Missing or damaged data, no images, no validation set, fewer than two classes, classes that differ.
    """
    if data.source == "digits":
        if root is not None:
            raise UserError(f"the recipe brings its own images and would ignore {root}: leave --data out")
        return _split(DigitsSource(), data.val_fraction, seed)
    layout = _layout(data.source, root)
    if data.source == "folder" and root is not None:
        _refuse_class_called_train(root)
    return replace(_opened(layout, root, data.val_fraction, seed), unread=layout.unread)


def _opened(layout: _Layout, root: Path | None, fraction: float, seed: int) -> Splits:
    words, parts = layout.words, layout.parts
    if "train" not in parts:
        if parts or not fraction:
            raise UserError(f"no {words[0]} in {root}: give {words[2]} alone with --set data.val_fraction=0.1")
        return _split(layout.alone(), fraction, seed)
    if "val" not in parts:
        if not fraction:
            raise UserError(
                f"no {words[1]} in {root}: add one, or hold out a fraction with --set data.val_fraction=0.1"
                + "; the test images are not validated on" * ("test" in parts)
            )
        return _split(parts["train"](), fraction, seed)
    splits = Splits(parts["train"](), parts["val"]())
    _respell(splits.val, splits.train.classes)
    _check_class_count(splits.train)
    _check_same_classes(splits)
    _put_in_order(splits.val, splits.train.classes)
    return splits


def open_eval_source(
    root: Path | None, classes: list[str], *, kind: str = "folder", split: str | None = None
) -> ImageSource:
    """The images to evaluate a model with these classes on, targets in the order of ``classes``.

    ``root`` holds a validation set as ``open_splits`` describes it, or one set alone; ``split`` is 'train', 'val' or
    'test' for that part of it. ``kind`` is a ``data.source``; 'digits' stands for folders here, since images are named.

    Raises:
        UserError: Missing or damaged data, no images, training images alone, a class that the model does not know.
    """
    layout = _layout("folder" if kind == "digits" else kind, root)
    part = layout.parts.get(split or "val")
    if split and part is None:
        raise UserError(f"{root} has no {split} images: give the folder of the images itself, without --split")
    if part is None and layout.parts:
        train, val = (words.removesuffix(" folder") for words in layout.words[:2])
        there = train if "train" in layout.parts else "test images"
        ways = "give the folder of the images to evaluate on itself" + ", or --split test" * ("test" in layout.parts)
        raise UserError(f"{root} has {there} and no {val}: {ways}")
    source = (part or layout.alone)()
    if len({*classes}) < len(classes):
        raise UserError("the model has several classes of one name, which no image can be counted for: rename them")
    _respell(source, classes)
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
        parts: The training, the validation and the test set, those that there are.
        alone: What lies in the root itself.
        words: What the training and the validation set are called in messages, and what to give.
        unread: The line about what lies beside them and is not read.
    """

    parts: dict[str, Opener]
    alone: Opener
    words: tuple[str, str, str]
    unread: str | None = None


def _layout(kind: str, root: Path | None) -> _Layout:
    if kind == "hfds" and root is not None and not root.exists() and not root.is_absolute():
        return _hfds_layout(root)  # a name on the hub, perhaps
    known = dict(folder=_folder_layout, tar=_tar_layout, wds=_wds_layout, hfds=_hfds_layout)
    if kind not in known:
        raise UserError(f"unknown layout of images {kind!r}{nearest(kind, [*known])}; there are: {', '.join(known)}")
    return known[kind](given_folder(root, "images"))


def _folder_layout(root: Path) -> _Layout:
    names = subfolders(root)
    found = _splits(names)
    shown = [] if found else [name for name in names if holds_images(root / name)]
    refuse_parts(root, shown, "call them train/ and val/ (or test/), with the class folders in them")
    inside, below = _innermost(root, shown or names)
    if inside != root and "train" in (inner := find_splits(below)):
        where = shlex.quote(str(inside))
        raise UserError(f"{' and '.join(inner.values())} lie in {inside}: give --data {where}")
    places = {split: root / name for split, name in found.items()}
    _refuse_parts_of_classes(root, names if not found else [])
    for split, folder in {"": root, **places}.items():
        _refuse_archives(folder, split)
    for folder in places.values() or [root]:
        _refuse_masks(folder)
    words = ("train/ folder", "val/ folder", "train/ and val/ with one folder per class, or class folders")
    parts: dict[str, Opener] = {split: partial(FolderSource, place) for split, place in places.items()}
    return _Layout(parts, partial(FolderSource, root), words, _rest(root, names, found))


def _innermost(folder: Path, below: list[str]) -> tuple[Path, list[str]]:
    """Where folders that hold one folder each lead, and the folders there; ``below`` are those to begin with."""
    inside = folder
    while len(below) == 1 and len(inside.parts) < len(folder.parts) + DEEP:
        inside /= below[0]
        below = subfolders(inside)
    return inside, below


def _refuse_class_called_train(root: Path) -> None:
    names = subfolders(root)
    found = find_splits(names)
    if "train" in found and "val" not in found and len(names) > len(found) and not subfolders(root / found["train"]):
        others = some([name for name in names if name not in found.values()], 3)
        raise UserError(
            f"{root / found['train']} has no class folders, and beside it are {others}: if {found['train']!r} is a "
            "class, rename that folder, because its name means the training images"
        )


def _refuse_parts_of_classes(root: Path, names: Sequence[str]) -> None:
    """Refuses class folders that hold the parts of a set, which would be mixed and split anew."""
    for name in (names[index] for index in spread(len(names), LOOKED_INTO)):
        inner = find_splits(subfolders(root / name))
        if "train" in inner and len(inner) > 1:
            raise UserError(
                f"{root / name} holds {' and '.join(inner.values())}: put them above the class folders "
                f"({inner['train']}/{name}/ and so on), or give --data {shlex.quote(str(root / name))} if that is the "
                "whole set"
            )


def _refuse_masks(folder: Path) -> None:
    """Refuses images beside their masks, as folders of classes or inside of these: masks would be learnt as images."""
    refuse_masks(folder, masked(folder))
    names = subfolders(folder)
    for place in (folder / names[index] for index in spread(len(names), LOOKED_INTO)):
        if pair := masked(place):
            what = f"{pair[0]}/ and {pair[1]}/ in {place} look like images and their masks"
            raise UserError(f"{what}: give the folder of one set of photos, or move the masks elsewhere")


def _splits(names: Sequence[str]) -> dict[str, str]:
    """``find_splits``; without a training part it takes 'val/' and 'validation/' for parts, and others among parts."""
    found = find_splits(names)
    if "train" in found or len(found) == len(names):
        return found
    return {split: name for split, name in found.items() if name in ("val", "validation")}


def _refuse_archives(folder: Path, split: str) -> None:
    """Refuses tar files and no class folders where these are asked for; shards of a part lie beside those of others."""
    tars = tar_files(folder)
    if tars and not any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir()):
        kind, what = ("wds", "webdataset shards") if is_shard(tars[0]) else ("tar", "tar files")
        way = f"read them with --set data.source={kind}"
        if split and kind == "wds":
            way = f"move them to {folder.parent} as {split}-{tars[0].name} and so on, and add --set data.source=wds"
        raise UserError(f"{folder} holds {what} and no class folders: {way}")


def _tar_layout(root: Path) -> _Layout:
    files = {path.stem: path for path in tar_files(root)}
    places = {name: root / name for name in subfolders(root)} | files
    found = _splits([*places])
    words = ("train.tar", "val.tar", "train.tar and val.tar, or train/ and val/ with tar files, or one tar per class")
    parts: dict[str, Opener] = {split: partial(TarSource, places[name]) for split, name in found.items()}
    return _Layout(parts, partial(TarSource, root), words, _rest(root, [*places], found))


def _wds_layout(root: Path) -> _Layout:
    shards = tar_files(root)

    found: dict[str, list[Path]] = {}
    for split, names in SPLITS.items():
        form = re.compile(rf"(.*[-_])?({'|'.join(names)})[-_].*\.tar", re.IGNORECASE)
        found[split] = [shard for shard in shards if form.match(shard.name)]
    words = ("train-*.tar shards", "val-*.tar shards", "shards train-*.tar and val-*.tar, or shards of other names")
    parts: dict[str, Opener] = {split: partial(ShardSource, root, own) for split, own in found.items() if own}
    used = [shard.name for split in ("train", "val") for shard in found[split]]
    rest = unread(root, [shard.name for shard in shards], used) if used else None
    return _Layout(parts, partial(ShardSource, root, shards), words, rest)


def _hfds_layout(root: Path) -> _Layout:
    splits = hfds_splits(root)
    found = find_splits(splits)
    if not {"train", "val"} & set(found) and len(splits) != 1:
        raise UserError(f"{root} has the splits {some(splits)}: 'train' and 'validation' are needed")
    words = ("split 'train'", "split 'validation'", "a dataset with the splits 'train' and 'validation', or one split")
    parts: dict[str, Opener] = {split: partial(HfdsSource, root, name) for split, name in found.items()}
    return _Layout(parts, partial(HfdsSource, root, splits[0]), words, _rest(root, splits, found))


def _rest(root: Path, names: Sequence[str], found: dict[str, str]) -> str | None:
    """The line that names the parts that are not read."""
    return unread(root, names, [name for split, name in found.items() if split != "test"]) if found else None


def _respell(source: ImageSource, classes: Sequence[str]) -> None:
    """Writes the classes of a set as another one or a model does, where they differ in their Unicode form alone."""
    source.classes = respelled(source.classes, classes)


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
    train, val = (SubsetSource(source, np.flatnonzero(chosen)) for chosen in (~held_out, held_out))
    return Splits(train, val, held_out=True)


def _check_class_count(source: ImageSource) -> None:
    if len(source.classes) > 1:
        return
    where, name = getattr(source, "root", "the data"), source.classes[0]
    ways, inside, below = "give at least two", Path(where), list[str]()
    if (inside / name).is_dir():
        inside, below = _innermost(inside, [name])
    if len(below) > 1:
        ways = f"if its folders are the classes, move them to {where}, or give --data {shlex.quote(str(inside))}"
    raise UserError(f"only one class ({name!r}) in {where}: {ways}")


def _check_same_classes(splits: Splits) -> None:
    train, val = splits.train.classes, splits.val.classes
    if {*val} <= {*train}:
        return  # a rare class may have no image for validation
    if differ := only_in("train", train, "val", val):
        raise UserError(f"train and val have different classes ({differ}): make them match")
