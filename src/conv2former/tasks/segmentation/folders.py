"""Where images with masks lie: ADE20K's layout, and plain folders of pairs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from conv2former.data.images import IMAGE_EXTENSIONS, MAX_PIXELS, BadImage, decode
from conv2former.data.sampling import Purpose, derive_seed
from conv2former.data.sources import given_folder, in_order
from conv2former.errors import UserError, some
from conv2former.tasks.segmentation.config import SegmentationDataSection
from conv2former.tasks.segmentation.masks import LABEL_EXTENSIONS, read_labels, to_classes

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
    """

    def __init__(self, pairs: Sequence[Pair], classes: list[str], *, reduce_zero: bool) -> None:
        self.pairs, self.classes, self.reduce_zero = list(pairs), classes, reduce_zero

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return self.pairs[index].name

    def load(self, index: int, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, np.ndarray]:
        """The image in RGB and its classes (H, W) of uint8, 255 for none; raises BadImage."""
        pair = self.pairs[index]
        image = decode(pair.image, max_pixels=max_pixels)
        stored = read_labels(pair.labels, max_pixels=max_pixels)
        if stored.shape != (image.height, image.width):
            height, width = stored.shape
            raise BadImage(
                str(pair.labels), f"it has {width} x {height} pixels, its image {image.width} x {image.height}"
            )
        count = len(self.classes)
        return image, to_classes(stored, classes=count, reduce_zero=self.reduce_zero, path=pair.labels)

    def part(self, indices: Sequence[int]) -> PairSource:
        """Some of the pairs."""
        return PairSource([self.pairs[int(index)] for index in indices], self.classes, reduce_zero=self.reduce_zero)


@dataclass(frozen=True)
class PairSplits:
    """A training and a validation set with the same classes."""

    train: PairSource
    val: PairSource

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
    classes = _classes(root, data)
    places = _places(data.source, root)
    found = places.get("train", places.get("alone"))
    if found is None:
        raise UserError(f"no {_expected(data.source)} in {root}: that is what data.source={data.source} reads")
    train = _open(root, found, classes, data)
    if "val" in places:
        return PairSplits(train, _open(root, places["val"], classes, data))
    if not data.val_fraction:
        raise UserError(
            f"no validation set in {root}: add one, or hold out a fraction with --set data.val_fraction=0.1"
        )
    if len(train) < 2:
        raise UserError(f"{root} holds one image: two are needed to hold one out for validation")
    held = min(max(round(len(train) * data.val_fraction), 1), len(train) - 1)
    order = np.random.default_rng(derive_seed(Purpose.SPLIT, seed, 0)).permutation(len(train))
    return PairSplits(train.part(sorted(order[held:])), train.part(sorted(order[:held])))


def open_eval_pairs(data: SegmentationDataSection, root: Path | None, classes: list[str]) -> PairSource:
    """The validation set in ``root``, or the one set that is there, for a model with these classes.

    Raises:
        UserError: Missing data, or training images alone.
    """
    root = given_folder(root, "images")
    own = _named_classes(root)
    if own is not None and own != classes:
        pairs = zip(own, classes, strict=False)
        differ = [f"{mine!r}, the model's {theirs!r}" for mine, theirs in pairs if mine != theirs]
        detail = f": here {differ[0]}" if differ else f": here {len(own)}, the model's {len(classes)}"
        raise UserError(f"the classes named in {root} are not the model's, in its order{detail}")
    places = _places(data.source, root)
    found = places.get("val", places.get("alone"))
    if found is None:
        raise UserError(f"no validation set ({_expected(data.source)}) in {root}")
    return _open(root, found, classes, data)


def _expected(source: str) -> str:
    if source == "ade20k":
        return "images/training and annotations/training, images/validation and annotations/validation"
    return "images/ and masks/, alone or in train/ and val/"


def _places(source: str, root: Path) -> dict[str, tuple[Path, Path]]:
    """The folders of images and masks of each set that is there."""
    if source == "ade20k":
        candidates = {
            split: (root / "images" / name, root / "annotations" / name)
            for split, name in (("train", "training"), ("val", "validation"))
        }
    else:
        candidates = {
            split: (root / name / "images", root / name / "masks")
            for split, name in (("train", "train"), ("val", "val"), ("alone", ""))
        }
    found = {}
    for split, (images, labels) in candidates.items():
        if images.is_dir() != labels.is_dir():
            there, missing = (images, labels) if images.is_dir() else (labels, images)
            raise UserError(f"{there} has no {missing} beside it: each folder of images needs one of masks")
        if images.is_dir():
            found[split] = (images, labels)
    return found


def _open(root: Path, place: tuple[Path, Path], classes: list[str], data: SegmentationDataSection) -> PairSource:
    images, labels = place
    image_files, mask_files = _files(images, IMAGE_EXTENSIONS), _files(labels, LABEL_EXTENSIONS)
    if not image_files:
        raise UserError(f"no images in {images}: expected files ending in {' '.join(IMAGE_EXTENSIONS)}")
    alone = [str(path.relative_to(root)) for stem, path in image_files.items() if stem not in mask_files]
    if alone:
        raise UserError(
            f"{len(alone)} of {len(image_files)} images have no mask of their name in {labels}: {some(alone, 3)}"
        )
    pairs = [Pair(str(path.relative_to(root)), path, mask_files[stem]) for stem, path in image_files.items()]
    return PairSource(pairs, classes, reduce_zero=data.reduce_zero_label)


def _files(folder: Path, extensions: tuple[str, ...]) -> dict[str, Path]:
    """The files of a folder and those below it, by their path without extension, in natural order."""
    found: dict[str, Path] = {}
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in sorted(names):
            if name.lower().endswith(extensions) and not name.startswith("."):
                path = Path(place, name)
                stem = str(path.relative_to(folder).with_suffix(""))
                if stem in found:
                    raise UserError(f"{found[stem]} and {path} differ by their extension alone: remove one")
                found[stem] = path
    return dict(sorted(found.items(), key=lambda item: in_order(item[0])))


def _classes(root: Path, data: SegmentationDataSection) -> list[str]:
    names = _named_classes(root)
    if names is None:
        if data.classes is None:
            raise UserError(
                f"nothing says which classes there are: add {root / CLASS_FILES[0]}, one name a line, or "
                "--set data.classes=NUMBER"
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


def _named_classes(root: Path) -> list[str] | None:
    """What the file of names in the root says, if there is one."""
    return next((_read_names(root / name) for name in CLASS_FILES if (root / name).is_file()), None)


def _read_names(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if path.name == CLASS_FILES[1]:
        return [line.split("\t")[-1].split(",")[0].split(";")[0].strip() for line in lines[1:]]
    return lines
