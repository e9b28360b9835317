"""Where images come from, as the engine knows it; each task has sources of its own."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from timm.utils.misc import natural_key

from conv2former.data.images import decode, turned
from conv2former.data.sampling import Purpose, derive_seed
from conv2former.errors import UserError, one_line, plural, printable, shortened, some, visible
from conv2former.files import read_within

MOST_OF_A_NAME = 1000  # characters, of a class's or a file's
NAMED = 20  # classes that are named before the first step
MOST_LOOKED_AT = 20_000  # training images whose sizes are compared with those of a tenth as many for validation
MOST_ALIKE = 100  # training images of one size in bytes whose content is compared
MOST_DECODED, DARK = 20, 32  # images whose values are looked at; levels of 255
MOST_HEADERS = 500  # images whose EXIF is looked at
EXIF_OPTION = "--set data.exif=ignore"
HASHED_BYTES = 1 << 20
PACKED = (".zip", ".tar", ".gz", ".tgz", ".xz", ".7z", ".rar")


class Source(Protocol):
    """A set of images, of any task."""

    @property
    def classes(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call an image in messages and files."""
        ...

    def load(self, index: int, max_pixels: int = ...) -> Any:
        """The image, alone or first in a tuple with what the task knows of it; raises BadImage."""
        ...


class Splits(Protocol):
    """A training and a validation set, of any task."""

    @property
    def train(self) -> Any: ...

    @property
    def val(self) -> Any: ...

    def digest(self) -> str:
        """A hash of the images and what is known of them, by which a resumed run knows its data."""
        ...


def notes(*sources: Any) -> list[str]:
    """What sources have to say of their files, as far as they say anything (``notes``), each line once."""
    return list(dict.fromkeys(line for source in sources for line in getattr(source, "notes", ())))


def remarks(splits: Splits, data: Any = None) -> list[str]:
    """What is to be said of images before they are trained on, with a recipe's ``data`` section.

    Sources and splits may have ``notes``, splits ``too_small(data)``.
    """
    found = [repeated(splits.train, splits.val), versions(splits.train, splits.val)]
    found += [contradictory(splits.train), dark(splits.train)]
    found += [splits.too_small(data)] if data and hasattr(splits, "too_small") else []
    return [*notes(splits.train, splits.val, splits), *filter(None, found)]


def dark(source: Any) -> str | None:
    """The line about images of 16 bits that use a small part of their range, as of a camera with 10 or 12 bits."""
    if not hasattr(source, "file"):
        return None
    looked = [file for index in spread(len(source), MOST_DECODED) if (file := source.file(index))]
    levels = [level for file in looked if (level := _brightest(Path(file))) is not None and level < DARK]
    if not levels:
        return None
    what = f"{len(levels)} of {len(looked)} images that were looked at have 16 bits and come out nearly black"
    return f"{what}, at most {max(levels)} of 255: stretch their values"


def _brightest(file: Path) -> int | None:
    """The brightest level of 255 of an image of 16 bits; None for all others."""
    try:
        with Image.open(file) as image:
            deep = image.mode.startswith("I")
        return int(np.asarray(decode(file)).max()) if deep else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # whoever reads the image says it
        return None


def counted(classes: Sequence[str], splits: Splits, *, what: str = "classes") -> str:
    """The line with the classes, many of them shortened, and the numbers of images."""
    images = f"{len(splits.train):,} training and {len(splits.val):,} validation images"
    return f"{len(classes):,} {what}: {printable(some(classes, NAMED))}; {images}"


def alike(classes: Sequence[str]) -> str | None:
    """The line about classes whose names differ in case or spaces alone, if there are any."""
    forms: dict[str, list[str]] = {}
    for name in classes:
        forms.setdefault("".join(name.casefold().split()), []).append(name)
    pairs = [" and ".join(map(repr, names)) for names in forms.values() if len(names) > 1]
    what = "are classes of their own, though they differ in case or spaces alone: if they are not, join them"
    return printable(f"{some(pairs, 4)} {what}") if pairs else None


def spread(count: int, most: int) -> list[int]:
    """All numbers below ``count``, or ``most`` that are spread evenly."""
    return [index * count // most for index in range(most)] if count > most else list(range(count))


def versions(train: Any, val: Any) -> str | None:
    """The line about validation images of which Roboflow has made versions to train on (``NAME.rf.HASH.jpg``)."""
    if not len(train) or ".rf." not in train.name(0):
        return None
    stems = [{part.name(index).rpartition(".rf.")[0] for index in range(len(part))} - {""} for part in (train, val)]
    if not (both := sorted(stems[0] & stems[1])):
        return None
    what = f"versions of {plural(len(both), 'validation image')}, {both[0]} for example, are trained on"
    return printable(f"{what}: what is measured is too good; have Roboflow divide the images, or leave versions out")


def repeated(train: Any, val: Any, *, what: str = "validation images") -> str | None:
    """The line about validation images that are training images, too, byte for byte; of large sets a part is looked at.

    Args:
        train: A source; nothing is looked at unless it has ``file(index)``, the path of an image.
        val: Likewise.
        what: The name of the latter.
    """
    if not (hasattr(train, "file") and hasattr(val, "file")):
        return None
    by_size = _by_size(train)
    content = functools.cache(_content)
    looked, twins = spread(len(val), MOST_LOOKED_AT // 10), []
    for index in looked:
        file = val.file(index)
        alike = by_size.get(_size(file), [])
        twin = next((other for other in alike if content(train.file(other)) == content(file)), None)
        if twin is not None:
            twins.append(f"{val.name(index)} is {train.name(twin)}")
    if not twins:
        return None
    part = "" if len(looked) == len(val) else " that were looked at"
    found = f"{len(twins):,} of the {len(looked):,} {what}{part} are training images, too"
    return printable(f"{found} ({some(twins, 2)}): what is measured on them says nothing about new images")


def contradictory(train: Any) -> str | None:
    """The line about training images that are in two classes, byte for byte; of large sets a part is looked at."""
    if not (hasattr(train, "file") and hasattr(train, "targets")):
        return None
    first: dict[bytes, int] = {}
    twins = []
    for index in (index for same in _by_size(train).values() if len(same) > 1 for index in same):
        other = first.setdefault(_content(train.file(index)), index)
        if train.targets[index] != train.targets[other]:
            twins.append(f"{train.name(index)} is {train.name(other)}")
    what = f"{plural(len(twins), 'training image')} {'is' if len(twins) == 1 else 'are'} in two classes"
    return printable(f"{what} ({some(twins, 2)}): keep each in one") if twins else None


def _by_size(source: Any) -> dict[int, list[int]]:
    """Images by the bytes of their files; of many images, and of many of one size, a part."""
    found: dict[int, list[int]] = {}
    for index in spread(len(source), MOST_LOOKED_AT):
        if (size := _size(source.file(index))) and len(found.get(size, ())) < MOST_ALIKE:
            found.setdefault(size, []).append(index)
    return found


def _size(file: str | Path | None) -> int:
    """In bytes; 0 where there is no file."""
    try:
        return os.stat(file).st_size if file else 0
    except OSError:
        return 0


def _content(file: str | Path) -> bytes:
    """A hash of a file, of a large one of its beginning; of one that cannot be read its name."""
    try:
        with open(file, "rb") as stream:
            return hashlib.sha256(stream.read(HASHED_BYTES)).digest()
    except OSError:
        return os.fsencode(file)


def exif_remark(files: Sequence[Path], what: str) -> list[str]:
    """The line about images that EXIF turns, if there are any; of many a part is looked at.

    Args:
        files: The images.
        what: What belongs to their pixels, in words.
    """
    looked = [files[index] for index in spread(len(files), MOST_HEADERS)]
    count = sum(turned(file) for file in looked)
    what = f"{what} are taken to be those of the turned image; if they follow the pixels as stored, add {EXIF_OPTION}"
    return [f"{count} of {len(looked)} images are turned by their EXIF orientation: {what}"] if count else []


def stored_pixels(file: Path, wanted: tuple[int, int], size: tuple[int, int]) -> str:
    """What to add to the message about an image of another size than is said of it; EXIF may be the reason."""
    if wanted != size[::-1] or not turned(file):
        return ": resize one of them"
    return f"; its EXIF orientation turns it: for what follows the pixels as stored add {EXIF_OPTION}"


def given_folder(root: Path | None, what: str) -> Path:
    """The folder that the user has named as ``--data``; raises UserError."""
    if root is None:
        raise UserError(f"no data given: name the folder of {what} with --data DIR")
    if not root.is_dir():
        if not root.exists():
            raise UserError(f"no such folder: {root}: give the folder of {what} with --data DIR")
        packed = root.suffix.lower() in PACKED
        raise UserError(f"not a folder: {root}" + ": unpack it and give the folder that comes out" * packed)
    return root


def held_out(count: int, fraction: float, seed: int, root: Path) -> tuple[list[int], list[int]]:
    """The numbers of the images to train on, and to validate on; raises UserError where there is one image."""
    if count < 2:
        raise UserError(f"{root} holds {plural(count, 'image')}: two are needed to hold one out for validation")
    held = min(max(round(count * fraction), 1), count - 1)
    order = np.random.default_rng(derive_seed(Purpose.SPLIT, seed, 0)).permutation(count).tolist()
    return sorted(order[held:]), sorted(order[:held])


def only_in(train: str, classes: Collection[str], val: str, others: Collection[str]) -> str:
    """What one of two sets has and the other lacks, in words that name them; empty where they have the same."""
    alone = ((train, {*classes} - {*others}), (val, {*others} - {*classes}))
    return "; ".join(f"only in {name}: {some([*map(visible, sorted(found))])}" for name, found in alone if found)


def in_order(name: str) -> tuple[Any, str]:
    """The key to sort names by: ``img2`` before ``img10``. Classes, splits and hashes of data depend on it."""
    try:
        return natural_key(name), name
    except ValueError:  # a number of thousands of digits
        return [name], name


def class_lines(path: Path) -> list[str]:
    """The lines of a file that names one class a line, without empty ones; raises UserError."""
    try:
        text = read_within(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not in UTF-8 (PowerShell's > writes UTF-16): save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and lines[0].startswith("# label:"):
        raise UserError(
            f"{path} is a label map of CVAT's: leave the names alone in it, one a line, without the colours"
        )
    if any(len(line) > MOST_OF_A_NAME for line in lines):
        raise UserError(f"{path} holds a line of more than {MOST_OF_A_NAME:,} characters: give one name per line")
    return lines


def plain_names(lines: list[str], path: Path) -> list[str]:
    """The lines of a file as names; raises UserError where there is more in them than names."""
    if lines and lines[0].startswith("# "):
        raise UserError(f"{path} begins with a comment, {shortened(lines[0])}: leave the names alone in it, one a line")
    coloured = [line for line in lines if re.fullmatch(r"\S.*([,;\t ])\s*\d+\1\s*\d+\1\s*\d+", line)]
    table = len(coloured) > 1 and len(coloured) >= len(lines) - 1
    if lines and (table or lines[0].startswith("- ") or lines[0] == "__ignore__"):
        raise UserError(
            f"{path} holds more than names ({shortened((coloured or lines)[0])}): leave the names alone in it, one a "
            "line, without colours, marks and labelme's __ignore__"
        )
    order = _numbers(lines)
    if order != sorted(order) or (not order and _numbers(lines[1:])):  # in order, they do no harm
        raise UserError(
            f"{path} has numbers before the names ({shortened(lines[-1])}): leave the names alone in it, in the order "
            "of the numbers"
        )
    return lines


def _numbers(lines: Sequence[str]) -> list[int]:
    """The numbers before names, ``0,road`` or ``1: car``, if they count from 0 or 1 in any order; else none."""
    found = [re.fullmatch(r"(\d{1,5})\s*([:,;=\t ])\s*\S.*", line) for line in lines]
    known = [match for match in found if match]
    numbers = [int(match[1]) for match in known]
    counted = len(known) == len(lines) > 1 and len({match[2] for match in known}) == 1
    return numbers if counted and sorted(numbers) in (list(range(len(lines))), list(range(1, len(lines) + 1))) else []
