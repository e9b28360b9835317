"""Where images and COCO annotations lie: the parts of a set by their names, or one set of which a part is held out."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conv2former.config import MOST_SIDE
from conv2former.data.folders import SPLITS, listed, respelled, subfolders, unread
from conv2former.data.images import IMAGE_EXTENSIONS
from conv2former.data.sources import alike, counted, given_folder, held_out, only_in, spread
from conv2former.errors import UserError, plural, printable, some
from conv2former.tasks.dense import fitted
from conv2former.tasks.detection.coco import CocoSource
from conv2former.tasks.detection.config import DetectionDataSection

WORDS = dict(train="training", val="validation", test="test")
KEYS = dict(train="train", val="val", test="val")  # of the recipe, by part
LOOKED_AT, HARDLY_SEEN, MANY = 1000, 8, 0.25  # images; pixels; the fraction of all objects that is said
VALIDATION = re.compile("(?<![a-z])val(id(ation)?)?(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class CocoSplits:
    """A training and a validation set with the same categories."""

    train: CocoSource
    val: CocoSource
    notes: tuple[str, ...] = ()
    held_out: bool = False  # whether the validation set is a fraction of the one that was given

    @property
    def has_masks(self) -> bool:
        """Whether an object to train on has a mask."""
        return self.train.has_masks

    def too_small(self, data: DetectionDataSection) -> str | None:
        """The line about objects that are hardly seen at the size of the training, if they are many."""
        sides = []
        for index in spread(len(self.train), LOOKED_AT):
            entry = self.train.entries[index]
            width, _ = fitted((entry.width, entry.height), short=data.short_side, long=data.long_side)
            boxes = [own["bbox"] for own in self.train.objects_of(index) if not own["iscrowd"]]
            sides += [width / entry.width * math.sqrt(box[2] * box[3]) for box in boxes]
        few = sum(side < HARDLY_SEEN for side in sides)
        if few <= MANY * len(sides):
            return None
        size = f"{data.short_side} x {data.long_side} pixels"
        what = (
            f"{few / len(sides):.0%} of the objects measure less than {HARDLY_SEEN} pixels when images are scaled to "
        )
        what += f"{size} at most, and are hardly seen"
        short, long = (min(2 * side, MOST_SIDE) for side in (data.short_side, data.long_side))
        way = f"--set data.short_side={short} --set data.long_side={long}"
        return f"{what}: larger images show them better, and take more time ({way})"

    def digest(self) -> str:
        """A hash of all images and objects."""
        digest = hashlib.sha256()
        for source in (self.train, self.val):
            for entry, (start, end) in zip(source.entries, source.spans, strict=True):
                line = f"{entry.id}\0{entry.file_name}\n".encode("utf-8", "surrogateescape")
                digest.update(line + source.text[start:end])
        return digest.hexdigest()[:16]


def open_coco(data: DetectionDataSection, root: Path | None, *, seed: int) -> CocoSplits:
    """The two sets that a recipe trains and validates on; images without objects are trained on if it says so.

    Without validation images ``data.val_fraction`` of the others are held out; which ones depends on the seed.

    Raises:
        UserError: Anything wrong with the files, categories that differ, nothing to train on.
    """
    root = given_folder(root, "images and annotations")
    place, val_place = (_places(root, data, split) for split in ("train", "val"))
    place = place if place[1].is_file() else _alone(root, data) or place
    fraction = 0.0 if val_place[1].is_file() or _named(data, "val") else data.val_fraction
    for part, (_, file) in dict(train=place, **{} if fraction else dict(val=val_place)).items():
        if not file.is_file():
            raise _missing(file, root, part, held=not _named(data, part))
    train = CocoSource(*place, turn=data.exif == "turn")
    if fraction:
        val, train = _divided(train, fraction, seed, root)
    else:
        val = CocoSource(*val_place, turn=data.exif == "turn")
        _unite(train, val)
    unlisted = _unlisted(root, [train, val])
    empty = 0
    if not data.keep_empty:
        shown = [index for index, count in enumerate(train.counted) if count]
        empty, train = len(train) - len(shown), train.part(shown)
    _check_counts(train, val)
    splits = CocoSplits(train, val, held_out=bool(fraction))
    remarks = _remarks(root, splits, [place] if fraction else [place, val_place], empty)
    return replace(splits, notes=(*unlisted, *remarks))


def _unlisted(root: Path, sources: Sequence[CocoSource]) -> list[str]:
    """The lines about images that no annotation file lists."""
    known = {os.path.normpath(source.file(index)) for source in sources for index in range(len(source))}
    lines = []
    for folder in {source.images: None for source in sources if source.images != root}:
        files = listed(folder, IMAGE_EXTENSIONS).files
        if rest := [name for name in files if os.path.normpath(folder / name) not in known]:
            lines.append(
                printable(f"{folder}: not read: {plural(len(rest), 'image')} in no annotation ({some(rest, 3)})")
            )
    return lines


def _divided(source: CocoSource, fraction: float, seed: int, root: Path) -> tuple[CocoSource, CocoSource]:
    """What is held out of a set, and the rest, each with its share of the images that show something."""
    shown = [index for index, count in enumerate(source.counted) if count]
    blank = [index for index, count in enumerate(source.counted) if not count]
    if len(shown) == 1:
        raise UserError(
            f"{source.annotations}: one image alone has an object that counts: two are needed to hold one out"
        )
    parts: list[list[int]] = [[], []]
    for some_of_them in (shown, blank):
        if len(some_of_them) > 1:
            for part, chosen in zip(parts, held_out(len(some_of_them), fraction, seed, root), strict=True):
                part += [some_of_them[index] for index in chosen]
        else:
            parts[0] += some_of_them
    rest, val = (source.part(sorted(part)) for part in parts)
    val.notes = []  # the other part has them
    return val, rest


def _remarks(root: Path, splits: CocoSplits, places: Sequence[tuple[Path, Path]], empty: int) -> list[str]:
    """What is to be said of a set that is read from some places; ``empty`` images without objects are left out."""
    train = splits.train
    read = [path.relative_to(root).parts for own in places for path in own if path.is_relative_to(root)]
    read += [Path(train.entries[0].file_name).parts[:-1]]  # names in the annotations may begin with a folder
    each = [f"{name} ({count:,})" for name, count in zip(train.classes, train.per_class, strict=True)]
    lines = [unread(root, subfolders(root), {parts[0] for parts in read if parts})]
    if splits.held_out:
        others = [file.name for file in _json_files(root) if file != places[0][1]]
        lines.append(printable(f"{root}: not read: {some(others)}") if others else None)
    if empty:
        what = f"{plural(empty, 'image')} without objects {'is' if empty == 1 else 'are'} not trained on"
        lines.append(f"{what}: --set data.keep_empty=true includes them")
    lines += [alike(train.classes), counted(each, splits, what="classes with objects to train on")]
    return [line for line in lines if line]


def _missing(file: Path, root: Path, part: str, *, held: bool = True) -> UserError:
    """The error about annotations that are not there; ``held`` where a part may be held out of the others."""
    own = KEYS[part]
    inside = [file for name in subfolders(root) for file in sorted((root / name).glob("*.json"))]
    there = [str(found.relative_to(root)) for found in dict.fromkeys([*_json_files(root), *inside])]
    way = ", or hold out a fraction with --set data.val_fraction=0.1" if part == "val" and held else ""
    lacking = f"there are no annotations {file}; there are {some(there)}: name"
    if not there:
        lacking = (
            f"there are no annotations in {root}: export them in COCO's format (YOLO's, labelme's and Pascal VOC's are "
            "not read), and name"
        )
    return UserError(
        f"{lacking} those of the {WORDS[part]} images, by their paths below {root}, with "
        f"--set data.{own}_annotations=FILE --set data.{own}_images=FOLDER{way}"
    )


def _unite(train: CocoSource, val: CocoSource) -> None:
    """Gives the validation set the classes of the training set; raises UserError where objects are of others."""
    val.classes = respelled(val.classes, train.classes)
    if any(count and name not in train.classes for name, count in zip(val.classes, val.per_class, strict=True)):
        differ = only_in(str(train.annotations), train.classes, str(val.annotations), val.classes)
        raise UserError(f"training and validation have different categories ({differ}): make them match")
    _take_classes(val, train.classes)
    both = zip(train.classes, train.per_class, val.per_class, strict=True)
    if unseen := [name for name, own, other in both if own > other == 0]:
        val.notes.append(f"{val.annotations}: no objects of {printable(some(unseen))} to validate on")


def _take_classes(source: CocoSource, classes: Sequence[str]) -> None:
    """Gives a set these classes in this order, with ids that do not occur for those that the file lacks."""
    ids = dict(zip(source.classes, source.category_ids, strict=True))
    counts = dict(zip(source.classes, source.per_class, strict=True))
    spare = max((number for number in source.category_ids if isinstance(number, int)), default=0)
    source.category_ids = [ids.get(name, spare + number) for number, name in enumerate(classes, 1)]
    source.per_class = [counts.get(name, 0) for name in classes]
    source.classes = list(classes)


def _check_counts(train: CocoSource, val: CocoSource) -> None:
    """Raises UserError where there is nothing to train or to validate on."""
    if not len(train):
        why = "; ".join(line.removeprefix(f"{train.annotations}: ") for line in train.notes)
        raise UserError(
            f"{train.annotations} has no image with an object that counts: there is nothing to train on"
            + (f" ({why})" if why else "")
        )
    if not len(val):
        raise UserError(f"{val.annotations} lists no images: there is nothing to validate on")
    if not any(val.counted):
        raise UserError(f"{val.annotations} has no object that counts: there is nothing to validate on")


def _named(data: DetectionDataSection, part: str) -> bool:
    """Whether the recipe says where a part of the set is."""
    return bool(data.model_dump(include={f"{part}_images", f"{part}_annotations"}, exclude_defaults=True))


def _alone(root: Path, data: DetectionDataSection) -> tuple[Path, Path] | None:
    """The one set in a folder without parts: its only JSON file, and ``images/`` or the folder itself."""
    files = _likely(_json_files(root))
    if _named(data, "train") or _named(data, "val") or len(files) != 1 or len(_parts_of(files[0].stem)) == 1:
        return None
    return (root / "images" if (root / "images").is_dir() else root), files[0]


def _json_files(root: Path) -> list[Path]:
    places = (root / "annotations", root / "images", root)
    return [file for place in places for file in sorted(place.glob("*.json")) if not file.name.startswith(".")]


def _likely(files: Sequence[Path]) -> list[Path]:
    """Of several files those that COCO, CVAT and Roboflow give such names."""
    return [file for file in files if file.name.startswith(("instances", "_annotations"))] or list(files)


def _places(root: Path, data: DetectionDataSection, split: str) -> tuple[Path, Path]:
    """The folder of images and the annotations of a part of the set.

    Where the recipe leaves COCO's own names and there are no such files, a folder or a JSON file that is called after
    the part (Roboflow's ``valid/_annotations.coco.json``, ``annotations/val.json``); UserError where several are.
    """
    own = KEYS[split]
    given = [getattr(data, key) for key in (f"{own}_images", f"{own}_annotations")]
    if split == "test":
        given = [re.sub(VALIDATION, "test", name) for name in given]
    place = root / given[0], root / given[1]
    if _named(data, own) or place[1].is_file():
        return place
    folders = [place / name for place in (root / "images", root) if place.is_dir() for name in subfolders(place)]
    folders = [folder for folder in folders if split in _parts_of(folder.name)]
    folders = [folder for folder in folders if folder.name.casefold() in SPLITS[split]] or folders
    if len(folders) > 1:
        folders = [folder for folder in folders if listed(folder, IMAGE_EXTENSIONS).files] or folders
    own_files = {folder: [file for file in _json_files(folder) if file.parent == folder] for folder in folders}
    inside = [(folder, file) for folder, found in own_files.items() for file in _likely(found)]
    if inside:
        return _only(inside, split, root)
    files = _likely([file for file in _json_files(root) if _parts_of(file.stem) == {split}])
    images = folders or [folder for folder in [root / "images"] if folder.is_dir()] or [root]
    return _only([(folder, file) for folder in images for file in files], split, root) or place


def _only(places: Sequence[tuple[Path, Path]], split: str, root: Path) -> Any:
    """The one place of a part; None without; raises UserError where there are several."""
    if len(places) > 1:
        found = [" with ".join(str(path.relative_to(root)) for path in place) for place in places]
        own = KEYS[split]
        raise UserError(
            f"{root}: several may be the {WORDS[split]} images and their annotations ({some(found)}): say "
            f"which with --set data.{own}_images=FOLDER --set data.{own}_annotations=FILE"
        )
    return places[0] if places else None


def _parts_of(name: str) -> set[str]:
    """The parts of a set that a name speaks of."""
    words = {*re.findall("[a-z]+", name.casefold())}
    return {split for split, own in SPLITS.items() if words & {*own}}


def open_eval_coco(
    data: DetectionDataSection, root: Path | None, classes: Sequence[str], split: str | None = None
) -> CocoSource:
    """The validation set in ``root``, or another part of it, for a model with these classes, whatever their ids there.

    Raises:
        UserError: Anything wrong with the files, or categories that the model does not know.
    """
    root = given_folder(root, "images and annotations")
    place = _places(root, data, split or "val")
    instead = None if place[1].is_file() else _instead(root, data, split)
    place = instead or place
    if not place[1].is_file():
        raise _missing(place[1], root, split or "val", held=False)
    source = CocoSource(*place, turn=data.exif == "turn")
    if instead:
        source.notes.append(f"no annotations of {WORDS[split or 'val']} images: all images of {place[1]} are evaluated")
    source.classes = respelled(source.classes, classes)
    named = zip(source.classes, source.per_class, strict=True)
    if unknown := [name for name, count in named if count and name not in classes]:
        raise UserError(
            f"{source.annotations} has {len(unknown)} categories that the model does not know ({some(unknown)}); its "
            f"{len(classes)} are {some(list(classes))}"
        )
    if not any(source.counted):
        source.notes.append(f"{source.annotations} has no object that counts: there is nothing to measure")
    _take_classes(source, classes)
    return source


def _instead(root: Path, data: DetectionDataSection, split: str | None) -> tuple[Path, Path] | None:
    """The one set that is there, where the annotations of a part are not; the training set if no part was asked for."""
    if split in ("val", "test"):
        return None
    alone = _alone(root, data)
    if alone or split or _named(data, "val"):
        return alone
    train = _places(root, data, "train")
    return train if train[1].is_file() else None
