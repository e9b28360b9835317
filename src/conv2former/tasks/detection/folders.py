"""Where images and COCO annotations lie: the parts of a set by their names, or one set of which a part is held out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from conv2former.data.folders import SPLITS, respelled, subfolders, unread
from conv2former.data.sources import counted, given_folder, held_out
from conv2former.errors import UserError, printable, some, visible
from conv2former.tasks.detection.coco import CocoSource
from conv2former.tasks.detection.config import DetectionDataSection

WORDS = dict(train="training", val="validation")
VALIDATION = re.compile("val(id(ation)?)?", re.IGNORECASE)


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
    fraction = 0.0 if val_place[1].is_file() else data.val_fraction
    for part, (_, file) in dict(train=place, **{} if fraction else dict(val=val_place)).items():
        if not file.is_file():
            raise UserError(
                f"there are no annotations {file}: name those of the {WORDS[part]} images, by their paths below "
                f"{root}, with --set data.{part}_annotations=FILE --set data.{part}_images=FOLDER"
                + ", or hold out a fraction with --set data.val_fraction=0.1"
                * (part == "val")
            )
    train = CocoSource(*place, turn=data.exif == "turn")
    if fraction:
        rest, held = held_out(len(train), fraction, seed, root)
        val, train = train.part(held), train.part(rest)
        val.notes = []  # the other part has them
    else:
        val = CocoSource(*val_place, turn=data.exif == "turn")
        _unite(train, val)
    if not data.keep_empty:
        train = train.part([index for index, count in enumerate(train.counted) if count])
    _check_counts(train, val)
    places = [place] if fraction else [place, val_place]
    tops = {
        path.relative_to(root).parts[0] for own in places for path in own if path != root and path.is_relative_to(root)
    }
    each = [f"{name} ({count:,})" for name, count in zip(train.classes, train.per_class, strict=True)]
    splits = CocoSplits(train, val, held_out=bool(fraction))
    lines = [unread(root, subfolders(root), tops), counted(each, splits, what="classes with objects to train on")]
    if fraction:
        others = [file.name for file in _json_files(root) if file != place[1]]
        lines.insert(0, f"no annotations of validation images: {len(val):,} images of {place[1]} are held out")
        lines.insert(1, printable(f"{root}: not read: {some(others)}") if others else None)
    return replace(splits, notes=tuple(line for line in lines if line))


def _unite(train: CocoSource, val: CocoSource) -> None:
    """Gives the validation set the classes of the training set, in its order; raises UserError where they differ."""
    val.classes = respelled(val.classes, train.classes)
    _check_same(train, val)
    val.category_ids = [val.category_ids[val.classes.index(name)] for name in train.classes]
    val.classes = train.classes


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


def _alone(root: Path, data: DetectionDataSection) -> tuple[Path, Path] | None:
    """The one set in a folder without parts: its only JSON file, and ``images/`` or the folder itself."""
    if any(getattr(data, key) != getattr(DetectionDataSection(), key) for key in ("train_images", "train_annotations")):
        return None
    files = _json_files(root)
    if len(files) != 1 or any(_is_called(files[0].stem, split) for split in SPLITS):
        return None
    return (root / "images" if (root / "images").is_dir() else root), files[0]


def _json_files(root: Path) -> list[Path]:
    return [file for place in (root / "annotations", root / "images", root) for file in sorted(place.glob("*.json"))]


def _places(root: Path, data: DetectionDataSection, split: str) -> tuple[Path, Path]:
    """The folder of images and the annotations of a part of the set.

    Where the recipe leaves COCO's own names and there are no such files, a folder or a JSON file that is called after
    the part (Roboflow's ``valid/_annotations.coco.json``, ``annotations/val.json``).
    """
    own = "train" if split == "train" else "val"
    keys = [f"{own}_images", f"{own}_annotations"]
    given, usual = ([getattr(of, key) for key in keys] for of in (data, DetectionDataSection()))
    if split == "test":
        given, usual = ([re.sub(VALIDATION, "test", name) for name in names] for names in (given, usual))
    if given != usual or (root / given[1]).is_file():
        return root / given[0], root / given[1]
    folders = [place / name for place in (root / "images", root) if place.is_dir() for name in subfolders(place)]
    folders = [folder for folder in folders if _is_called(folder.name, split)]
    for folder in folders:
        if len(files := sorted(folder.glob("*.json"))) == 1:
            return folder, files[0]
    places = [root / "annotations", root]
    files = [file for place in places for file in sorted(place.glob("*.json")) if _is_called(file.stem, split)]
    images = [*folders, *(folder for folder in [root / "images"] if folder.is_dir()), root]
    return (images[0], files[0]) if files else (root / given[0], root / given[1])


def _is_called(name: str, split: str) -> bool:
    return bool({*re.findall("[a-z]+", name.casefold())} & {*SPLITS[split]})


def open_eval_coco(
    data: DetectionDataSection, root: Path | None, classes: Sequence[str], split: str | None = None
) -> CocoSource:
    """The validation set in ``root``, or another part of it, for a model with these classes, whatever their ids there.

    Raises:
        UserError: Anything wrong with the files, or categories that the model does not know.
    """
    root = given_folder(root, "images and annotations")
    place = _places(root, data, split or "val")
    if split is None and not place[1].is_file():
        place = _alone(root, data) or place
    source = CocoSource(*place, turn=data.exif == "turn")
    source.classes = respelled(source.classes, classes)
    unknown = [name for name in source.classes if name not in classes]
    if unknown:
        raise UserError(
            f"{source.annotations} has {len(unknown)} categories that the model does not know ({some(unknown)}); its "
            f"{len(classes)} are {some(list(classes))}"
        )
    # the model's classes, with ids that do not occur for those that the file lacks
    ids = dict(zip(source.classes, source.category_ids, strict=True))
    spare = max((number for number in source.category_ids if isinstance(number, int)), default=0)
    source.category_ids = [ids.get(name, spare + number) for number, name in enumerate(classes, 1)]
    source.classes = list(classes)
    return source


def _check_same(train: CocoSource, val: CocoSource) -> None:
    if {*train.classes} == {*val.classes}:
        return
    alone = [(own, {*own.classes} - {*other.classes}) for own, other in ((train, val), (val, train))]
    parts = [f"only in {own.annotations.name}: {some([*map(visible, sorted(names))])}" for own, names in alone if names]
    raise UserError(
        f"training and validation have different categories ({'; '.join(parts)}): make them match; the list "
        "'categories' of both files names all, also those without an object in it"
    )
