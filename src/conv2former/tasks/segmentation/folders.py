"""Where images with masks lie: ADE20K's layout, and plain folders of pairs."""

from __future__ import annotations

import copy
import hashlib
import os
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from conv2former.data.folders import find_splits, listed, one_form, respelled, subfolders, unread
from conv2former.data.images import IGNORED, IMAGE_EXTENSIONS, MAX_PIXELS, BadImage, decode
from conv2former.data.recognise import IMAGES, MASKS
from conv2former.data.sources import (
    class_lines,
    counted,
    exif_remark,
    given_folder,
    held_out,
    in_order,
    plain_names,
    spread,
    stored_pixels,
)
from conv2former.errors import UserError, plural, some
from conv2former.tasks.segmentation.config import SegmentationDataSection
from conv2former.tasks.segmentation.masks import (
    GREY,
    LABEL_EXTENSIONS,
    LOSSY_EXTENSIONS,
    ColourMask,
    palette,
    read_labels,
    to_classes,
)
from conv2former.tasks.segmentation.values import (
    MaskValues,
    Table,
    check_values,
    colour_key,
    colour_trouble,
    missing_classes,
    remedy,
    some_colours,
    table_classes,
)

LOOKED_AT = 64  # masks whose values are counted before the first step
BREAK = re.compile(r"[ ._(-]")  # stands between an image's name and what is beside it: cat_1, cat (1), rust-cat
TRIED = 20  # images whose names are looked for in those of masks
MAX_CLASSES = 255  # one number of a byte stands for none
CLASS_FILES = ("classes.txt", "objectInfo150.txt")  # one name a line; ADE20K's table


@dataclass(frozen=True)
class Pair:
    """An image and its mask, by their paths; ``name`` is what to call them."""

    name: str
    image: Path
    labels: Path


class PairSource:
    """Images with a mask each.

    Args:
        pairs: Where they are.
        classes: K names.
        reduce_zero: Label 0 is no class, label 1 the first one.
        table: What the values of masks mean, where the recipe says it.
        nearest: Whether a value that the table lacks stands for the nearest one, not only in files like JPEG.
        turn: Whether the EXIF orientation of images and masks is applied.

    Attributes:
        notes: Lines about files and values.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        classes: list[str],
        *,
        reduce_zero: bool,
        table: Table | None = None,
        nearest: bool = False,
        turn: bool = True,
    ) -> None:
        self.pairs, self.classes, self.reduce_zero, self.nearest = list(pairs), classes, reduce_zero, nearest
        self.values, self.turn = MaskValues(table, classes) if table else None, turn
        self.greys = False  # whether palettes hold the values of masks as their greys
        self.notes: list[str] = []

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return self.pairs[index].name

    def file(self, index: int) -> Path:
        """The path of an image."""
        return self.pairs[index].image

    def load(self, index: int, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, np.ndarray]:
        """The image in RGB and its classes (H, W) of uint8, 255 for none; raises BadImage."""
        pair = self.pairs[index]
        image = decode(pair.image, max_pixels=max_pixels, turn=self.turn)
        stored = self.stored(index, max_pixels)
        if stored.shape != (image.height, image.width):
            height, width = stored.shape
            way = stored_pixels(pair.image, (width, height), image.size) if self.turn else ""
            raise BadImage(
                str(pair.labels), f"it has {width} x {height} pixels, its image {image.width} x {image.height}{way}"
            )
        return image, self.classes_of(stored, pair.labels)

    def stored(self, index: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """A mask's values or colours, (H, W); raises BadImage."""
        colours = self.values is not None and self.values.colours
        options: Any = dict(colours=colours, greys=self.greys, turn=self.turn)
        if self.values and 1 not in self.values.given and IGNORED in self.values.given:
            options |= dict(white=IGNORED)
        return read_labels(self.pairs[index].labels, max_pixels=max_pixels, **options)

    def classes_of(self, stored: np.ndarray, path: Path) -> np.ndarray:
        """Stored values (H, W) as classes of uint8, 255 for none; raises BadImage."""
        if self.values:
            lossy = path.suffix.lower() in LOSSY_EXTENSIONS
            return self.values.classes_of(stored, path, nearest=self.nearest or lossy, void=not lossy)
        return to_classes(stored, classes=len(self.classes), reduce_zero=self.reduce_zero, path=path)

    def part(self, indices: Sequence[int]) -> PairSource:
        """Some of the pairs."""
        chosen = copy.copy(self)
        chosen.pairs = [self.pairs[int(index)] for index in indices]
        return chosen

    def look(self, where: Path, *, learns: bool = True) -> list[str]:
        """What is to be said of the values in a sample of the masks, before a training or an evaluation.

        Raises:
            UserError: There is nothing to learn, or nothing to evaluate.
        """
        pixels, masks, without, others = np.zeros(1 << 16, np.int64), 0, 0, 0
        unnamed = not self.values or not (self.values.colours or IGNORED in self.values.given)  # 255 is no class
        for index in spread(len(self), LOOKED_AT):
            try:
                stored = self.stored(index)
                numbers = _counts(stored) if unnamed else np.zeros(IGNORED + 1, np.int64)
                counts = _counts(self.classes_of(stored, self.pairs[index].labels)) if self.values else numbers
            except ColourMask as error:
                found = some_colours(error.colours)
                raise colour_trouble(
                    f"the masks in {where} are colour images ({found})", error.colours, self.classes
                ) from None
            except BadImage as error:
                if learns and self.values and "data.mask_values" in error.reason:
                    raise UserError(str(error)) from None
                continue  # training meets it, and does what the recipe says
            pixels += counts
            masks += 1
            others += int(numbers[1:IGNORED].any())
            without += int(numbers[IGNORED] > 0 and not numbers[1:IGNORED].any())
        if not masks:
            return []
        if self.values:
            present = set(np.flatnonzero(pixels[:IGNORED]).tolist())
            lines = missing_classes(f"{masks} masks of {where}", present, self.classes)
        else:
            lines = check_values(where, pixels, masks, self.classes, reduce_zero=self.reduce_zero, learns=learns)
        if without and others and not self.reduce_zero:
            lines.append(
                f"{where}: {without} of {masks} masks that were looked at hold 0 and 255 alone, others hold classes: "
                "right if 255 marks what is to be ignored; if it is a class in these, save all masks alike"
            )
        return lines

    def check_palettes(self) -> None:
        """Looks at palettes, of which each file may have its own; then its numbers are no classes.

        GIFs in grey are read by their greys, which Pillow numbers anew in each file, unless a table of the recipe names
        others. Elsewhere it says what the numbers are, whatever their colours.

        Raises:
            UserError: One number has several colours.
        """
        known: dict[int, tuple[int, Path]] = {}
        colours: Counter[int] = Counter()
        differ, grey = "", True
        for index in () if self.values and self.values.colours else spread(len(self), LOOKED_AT):
            if self.values and not grey:  # a table says what their numbers are
                break
            file = self.pairs[index].labels
            for value, colour in palette(file).items():
                first, other = known.setdefault(value, (colour, file))
                if first != colour and value != IGNORED:
                    one, two = colour_key(first), colour_key(colour)
                    differ = f"number {value} is {one} in {other.name} and {two} in {file.name}"
                colours[colour] += 1
                grey &= file.suffix.lower() == ".gif" and colour % GREY == 0
        if self.values and grey:
            given = {*self.values.given}
            grey = bool(differ or known.keys() - given) and {colour & 255 for colour in colours} <= given | {IGNORED}
        self.greys = bool(known) and grey
        if self.greys:
            return
        if differ and not self.values:
            raise colour_trouble(f"masks have palettes of their own ({differ})", colours, self.classes)


@dataclass(frozen=True)
class PairSplits:
    """A training and a validation set with the same classes."""

    train: PairSource
    val: PairSource
    held_out: bool = False  # whether the validation set is a fraction of the one that was given

    @property
    def notes(self) -> list[str]:
        """The classes, and images that EXIF turns."""
        lines = [counted(self.train.classes, self)]
        files = [source.file(index) for source in (self.train, self.val) for index in range(len(source))]
        return lines + (exif_remark(files, "masks") if self.train.turn else [])

    def digest(self) -> str:
        """A hash of the names of all images and classes."""
        lines = [*self.train.classes, "", *(pair.name for source in (self.train, self.val) for pair in source.pairs)]
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def open_pairs(data: SegmentationDataSection, root: Path | None, *, seed: int) -> PairSplits:
    """The two sets that a recipe trains and validates on.

    Raises:
        UserError: Missing data, images without masks, no validation set, no classes.
    """
    root = given_folder(root, "images")
    places = _places(data.source, root)
    found = places.get("train", places.get("alone"))
    if found is None:
        there = some(subfolders(root)) or "no folders"
        raise UserError(
            f"no {_expected(data.source)} in {root} (there: {there}): call the folders so; masks have the names of "
            "their images, or the same word before or behind each"
        )
    classes = _classes(root, data)
    train = _open(root, found, classes, data)
    train.notes += [*_unread(root, places), *train.look(found[1])]
    if "val" in places:
        val = _open(root, places["val"], classes, data)
        val.notes += val.look(places["val"][1])
        return PairSplits(train, val)
    if not data.val_fraction:
        raise UserError(
            f"no validation set in {root}: add one, or hold out a fraction with --set data.val_fraction=0.1"
        )
    rest, held = held_out(len(train), data.val_fraction, seed, root)
    return PairSplits(train.part(rest), train.part(held), held_out=True)


def open_eval_pairs(
    data: SegmentationDataSection, root: Path | None, classes: list[str], split: str | None = None
) -> PairSource:
    """The validation set in ``root``, or the one set that is there, for a model with these classes.

    ``split`` is 'train', 'val' or 'test' for that part of it.

    Raises:
        UserError: Missing data, or training images alone.
    """
    root = given_folder(root, "images")
    own = _named_classes(root)
    own = None if own is None else respelled(own, classes)
    if own is not None and own != classes:
        pairs = zip(own, classes, strict=False)
        differ = [f"{mine!r}, the model's {theirs!r}" for mine, theirs in pairs if mine != theirs]
        detail = f": here {differ[0]}" if differ else f": here {len(own)}, the model's {len(classes)}"
        raise UserError(f"the classes named in {root} are not the model's, in its order{detail}")
    places = _places(data.source, root)
    found = places.get(split) if split else places.get("val", places.get("alone"))
    if found is None and split:
        raise UserError(f"{root} has no {split} images: give the folder of the images itself, without --split")
    if found is None:
        way = "; evaluate its test images with --split test" * ("test" in places)
        raise UserError(f"no validation set ({_expected(data.source)}) in {root}{way}")
    source = _open(root, found, classes, data)
    source.notes += source.look(found[1], learns=False)
    return source


def _expected(source: str) -> str:
    if source == "ade20k":
        return "images/training and annotations/training, images/validation and annotations/validation"
    return "images/ and masks/, alone or in train/ and val/"


def _places(source: str, root: Path) -> dict[str, tuple[Path, Path]]:
    """The folders of images and masks of each set that is there."""
    parts = {} if source == "ade20k" else {split: _two(root / name) for split, name in _parts(root).items()}
    found = {split: place for split, place in parts.items() if place}
    whole = _two(root)
    if whole and "train" not in found:
        inside = {split: (whole[0] / name, whole[1] / name) for split, name in _parts(whole[0]).items()}
        found |= inside if {"train", "val"} & set(inside) else {}
        found |= dict(alone=whole) if not inside and source != "ade20k" else {}
    for images, labels in found.values():
        if images.is_dir() != labels.is_dir():
            there, missing = (images, labels) if images.is_dir() else (labels, images)
            raise UserError(f"{there} has no {missing} beside it: each folder of images needs one of masks")
    return found


def _parts(folder: Path) -> dict[str, str]:
    """The parts of a set that are folders in one."""
    return find_splits(subfolders(folder)) if folder.is_dir() else {}


def _two(folder: Path) -> tuple[Path, Path] | None:
    """The folders of images and of masks in a folder; either may be missing, and is then called as it should be."""
    names = {name.casefold(): name for name in reversed(subfolders(folder))}
    images, masks = ([names[word] for word in words if word in names] for words in (IMAGES, MASKS))
    if not images and not masks:
        return None
    return folder / (images or [IMAGES[0]])[0], folder / (masks or [MASKS[0]])[0]


def _unread(root: Path, places: dict[str, tuple[Path, Path]]) -> list[str]:
    used = {path.relative_to(root).parts[0] for split in places if split != "test" for path in places[split]}
    lines = [unread(root, subfolders(root), used)]
    if "test" in places and places["test"][0].relative_to(root).parts[0] in used:
        lines.append(f"{root}: its test images are not read; evaluate a trained model on them with --split test")
    return [line for line in lines if line]


def _open(root: Path, place: tuple[Path, Path], classes: list[str], data: SegmentationDataSection) -> PairSource:
    images, labels = place
    notes: list[str] = []
    image_files = _files(images, IMAGE_EXTENSIONS, notes)
    if not image_files:
        raise UserError(f"no images in {images}: expected files ending in {' '.join(IMAGE_EXTENSIONS)}")
    mask_files = _files(labels, LABEL_EXTENSIONS, [])
    if not mask_files and (mask_files := _files(labels, LOSSY_EXTENSIONS, [])) and not data.mask_values:
        raise UserError(
            f"the masks in {labels} are {next(iter(mask_files.values())).suffix} files, whose values are not exact: "
            "say which value is which class (the nearest one counts), with "
            + remedy([0, 255] if len(classes) == 2 else [*range(len(classes))], classes)
        )
    masks = _matched([*image_files], mask_files, labels, notes)
    alone = [str(path.relative_to(root)) for stem, path in image_files.items() if stem not in masks]
    if alone:
        there = some([path.name for path in mask_files.values()], 3) or "no masks"
        raise UserError(
            f"{len(alone)} of {len(image_files)} images have no mask of their name in {labels}: {some(alone, 3)} "
            f"(there: {there})"
        )
    _check_rest(labels, {*mask_files.values()} - {masks[stem] for stem in image_files}, image_files, masks, notes)
    pairs = [Pair(str(path.relative_to(root)), path, masks[stem]) for stem, path in image_files.items()]
    turn = data.exif == "turn"
    table: Any = dict(table=data.mask_values, nearest=data.mask_nearest)
    source = PairSource(pairs, classes, reduce_zero=data.reduce_zero_label, turn=turn, **table)
    source.check_palettes()
    source.notes = notes
    return source


def _counts(values: np.ndarray) -> np.ndarray:
    """Numbers of pixels by value, (65536,)."""
    return np.bincount(values.ravel(), minlength=1 << 16)


def _check_rest(where: Path, rest: set[Path], images: Iterable[str], masks: dict[str, Path], notes: list[str]) -> None:
    """What is to be said of masks that no image has; raises UserError if most are further masks of an image."""
    if not rest:
        return
    used = {path.relative_to(where).with_suffix("").as_posix(): path for path in {*masks.values()} - rest}
    used |= {name: masks[name] for name in images}
    # whose own mask has something before the name: else what ends in it may well be the mask of another image
    behind = {name for name in images if not masks[name].stem.startswith(os.path.basename(name))}
    further: dict[Path, Path] = {}
    for path in sorted(rest):
        folder, base = path.relative_to(where).parent, path.stem
        breaks = [*BREAK.finditer(base)]
        starts = [(folder / base[: found.start()]).as_posix() for found in reversed(breaks)]
        ends = [(folder / base[found.end() :]).as_posix() for found in breaks]
        if known := [name for name in starts if name in used] + [name for name in ends if name in behind]:
            further[path] = used[known[0]]
    if 2 * len(further) > len(rest) and len({*further.values()}) > 1:
        two = " and ".join(path.name for path in reversed(next(iter(further.items()))))
        way = "merge them into one, or move masks of other images elsewhere"
        raise UserError(f"{where} holds several masks of one image, {two} for example: {way}")
    notes.append(f"{where}: {plural(len(rest), 'mask')} of no image: {some([path.name for path in sorted(rest)], 3)}")


def _matched(images: Sequence[str], masks: dict[str, Path], where: Path, notes: list[str]) -> dict[str, Path]:
    """The mask of each image: of its name, or of its name with the same words before and behind it (``NAME_mask``).

    What all images have before and behind the differing part of their names (``image_1``, ``1_sat``) may be missing in
    those of masks. What is said of it is appended to ``notes``.
    """
    if all(name in masks for name in images):
        return masks
    bases = [os.path.basename(image) for image in images]
    first = len(os.path.commonprefix(bases).rstrip(string.digits))  # noqa: RUF071 (letter by letter is what is meant)
    last = len(os.path.commonprefix([base[::-1] for base in bases]).rstrip(string.digits))  # noqa: RUF071
    cores = [base[first : len(base) - last] for base in bases]
    for parts in (bases, cores):
        own = [(os.path.dirname(image), part) for image, part in zip(images, parts, strict=True)]
        for before, behind in _around(own[:TRIED], masks):
            named = [os.path.join(folder, before + part + behind) for folder, part in own]
            if all(name in masks for name in named) and len({*named}) == len(named):
                notes.append(f"{where}: the masks are called {before}NAME{behind}")
                return {image: masks[name] for image, name in zip(images, named, strict=True)}
    return masks


def _around(names: Sequence[tuple[str, str]], masks: Iterable[str]) -> list[tuple[str, str]]:
    """What stands before and behind names (folder, name) in those of masks, the most frequent first."""
    found: Counter[tuple[str, str]] = Counter()
    for mask in masks:
        folder, base = os.path.split(mask)
        for own, name in names:
            if own == folder and name and name in base:
                start = base.index(name)
                found[(base[:start], base[start + len(name) :])] += 1
    return [words for words, _ in found.most_common(TRIED)]


def _files(folder: Path, extensions: tuple[str, ...], notes: list[str]) -> dict[str, Path]:
    """The files of a folder and those below it, by their path without extension, in natural order.

    What is said of the others is appended to ``notes``.
    """
    listing = listed(folder, extensions)
    found: dict[str, Path] = {}
    for name in sorted(listing.files, key=lambda name: in_order(os.path.splitext(name)[0])):
        stem, path = one_form(os.path.splitext(name)[0]), folder / name
        if stem in found:
            raise UserError(f"{found[stem]} and {path} differ by their extension alone: remove one")
        found[stem] = path
    notes += listing.lines(folder)
    return found


def _classes(root: Path, data: SegmentationDataSection) -> list[str]:
    names = _named_classes(root)
    if names is None and data.mask_values:
        names = table_classes(data.mask_values)
    if names is None:
        if data.classes is None:
            values = _values_of_some(root, data)
            if values == [0, 255]:
                add = remedy(values, ["background", "object"])
                raise UserError(f"the masks hold 0 and 255, and nothing says which classes these are: add {add}")
            seen = f" (the masks hold {some([str(value) for value in values])})" if values else ""
            raise UserError(
                f"nothing says which classes there are{seen}: add {root / CLASS_FILES[0]}, one name a line, or "
                "--set data.classes=NUMBER, or say what the values of the masks mean in data.mask_values"
            )
        names = [str(number) for number in range(data.classes)]
    if data.classes not in (None, len(names)):
        raise UserError(f"data.classes={data.classes}, but the file in {root} names {len(names)}: make them match")
    if not 2 <= len(names) <= MAX_CLASSES:
        raise UserError(f"{len(names)} classes: give at least 2 and at most {MAX_CLASSES}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"the file in {root} names {some(twice, 3)} more than once: give every class its own name")
    return names


def _values_of_some(root: Path, data: SegmentationDataSection) -> list[int]:
    """What the first masks hold; empty where one of them has other values than numbers of classes."""
    values: set[int] = set()
    for _, labels in _places(data.source, root).values():
        for path in list(_files(labels, LABEL_EXTENSIONS, []).values())[:LOOKED_AT]:
            try:
                values |= {*np.unique(read_labels(path)).tolist()}
            except BadImage:
                return []
    return sorted(values)


def _named_classes(root: Path) -> list[str] | None:
    """What the file of names in the root says, if there is one."""
    return next((_read_names(root / name) for name in CLASS_FILES if (root / name).is_file()), None)


def _read_names(path: Path) -> list[str]:
    lines = class_lines(path)
    if path.name == CLASS_FILES[1]:
        return [line.split("\t")[-1].split(",")[0].split(";")[0].strip() for line in lines[1:]]
    return plain_names(lines, path)
