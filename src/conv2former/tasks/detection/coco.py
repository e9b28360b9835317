"""Images with COCO annotations: read once, checked as a whole, kept small."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from conv2former.data.images import MAX_PIXELS, BadImage, decode
from conv2former.data.rle import decode_mask, library
from conv2former.data.sources import given_folder
from conv2former.errors import UserError, one_line, say_once, some
from conv2former.tasks.detection.config import DetectionDataSection

KEPT = ("category_id", "bbox", "segmentation", "area")  # of an object
FAR = 10  # sides of an image that a polygon's points may lie away from it
# what the lists must hold
FIELDS: dict[str, dict[str, type]] = dict(
    images=dict(id=int, file_name=str, width=int, height=int),
    categories=dict(id=int, name=str),
    annotations=dict(image_id=int, category_id=int),
)
KINDS = {int: "a whole number", str: "a text"}


class Entry(NamedTuple):
    """An image by the annotations."""

    id: int
    file_name: str
    width: int
    height: int


class CocoSource:
    """A set of images with objects: box, category and mask each.

    Objects are kept as one text, a fraction of what Python's dictionaries take, which the processes that read share.
    Objects that cannot be used (no area, outside of their image, a damaged mask) are left out and counted in one line.

    Args:
        images: Folder of the images.
        annotations: COCO's JSON.
        say: Takes the line about what was left out.

    Attributes:
        classes: Names of the categories, by their ids.
        category_ids: The ids, in the order of ``classes``.
        entries: The images.
        counted: Objects of each that are no crowds.

    Raises:
        UserError: Not JSON, keys that are missing or of another type, images that are missing, no categories.
    """

    def __init__(self, images: Path, annotations: Path, *, say: Callable[[str], None] = say_once) -> None:
        library()
        self.images, self.annotations = images, annotations
        content = _read(annotations)
        categories = sorted(content["categories"], key=lambda entry: entry["id"])
        self.category_ids = [entry["id"] for entry in categories]
        self.classes = [entry["name"] for entry in categories]
        _check_unique(annotations, "category id", self.category_ids)
        _check_unique(annotations, "category name", self.classes)
        listed = sorted(content["images"], key=lambda entry: entry["id"])
        self.entries = [Entry(**{key: entry[key] for key in Entry._fields}) for entry in listed]
        _check_unique(annotations, "image id", [entry.id for entry in self.entries])
        self._check_files()
        objects = self._sorted_objects(content["annotations"], say)
        self.counted = [sum(not entry["iscrowd"] for entry in own) for own in objects]
        texts = [json.dumps(own, separators=(",", ":")).encode() for own in objects]
        self.text = b"".join(texts)
        ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        self.spans = np.stack([ends - [len(text) for text in texts], ends], axis=1) if texts else np.zeros((0, 2), int)

    def _check_files(self) -> None:
        if not self.images.is_dir():
            raise UserError(f"no such folder: {self.images}")
        missing = [entry.file_name for entry in self.entries if not (self.images / entry.file_name).is_file()]
        if missing:
            raise UserError(
                f"{len(missing)} of the {len(self.entries)} images that {self.annotations} names are not in "
                f"{self.images}: {some(missing, 3)}"
            )

    def _sorted_objects(self, annotations: list[Any], say: Callable[[str], None]) -> list[list[dict[str, Any]]]:
        """The objects of each image, in the order of ``entries``."""
        place = {entry.id: index for index, entry in enumerate(self.entries)}
        known = set(self.category_ids)
        found: list[list[dict[str, Any]]] = [[] for _ in self.entries]
        wrong: dict[str, list[str]] = {}
        for number, annotation in enumerate(annotations):
            name = str(annotation.get("id", f"number {number}"))
            if annotation["image_id"] not in place:
                wrong.setdefault("of images that it does not list", []).append(name)
                continue
            if annotation["category_id"] not in known:
                raise UserError(
                    f"{self.annotations}: annotation {name} is of category {annotation['category_id']}, which it does "
                    "not list"
                )
            index = place[annotation["image_id"]]
            if trouble := _trouble(annotation, self.entries[index]):
                wrong.setdefault(trouble, []).append(name)
                continue
            own = {key: annotation[key] for key in KEPT if annotation.get(key) is not None}
            found[index].append(own | dict(iscrowd=int(bool(annotation.get("iscrowd")))))
        for what, names in wrong.items():
            which = f"{len(names)} of {len(annotations)} objects {what} are left out"
            say(f"{self.annotations}: {which} (ids {some(names, 3)})")
        return found

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        return self.entries[index].file_name

    def objects_of(self, index: int) -> list[dict[str, Any]]:
        """The objects of an image, crowds included."""
        start, end = self.spans[index]
        return json.loads(self.text[start:end])

    def load(self, index: int, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, list[dict[str, Any]]]:
        """The image in RGB and its objects; raises BadImage."""
        entry = self.entries[index]
        file = self.images / entry.file_name
        image = decode(file, max_pixels=max_pixels)
        if image.size != (entry.width, entry.height):
            sizes = f"{image.width} x {image.height} pixels, by the annotations {entry.width} x {entry.height}"
            raise BadImage(str(file), f"it has {sizes}")
        return image, self.objects_of(index)

    def part(self, indices: Sequence[int]) -> CocoSource:
        """Some of the images."""
        chosen = object.__new__(CocoSource)
        chosen.__dict__.update(self.__dict__)
        chosen.entries = [self.entries[index] for index in indices]
        chosen.counted = [self.counted[index] for index in indices]
        chosen.spans = self.spans[list(indices)]
        return chosen

    def ground_truth(self, indices: Sequence[int]) -> dict[str, Any]:
        """COCO's dictionary of some of the images, with areas where the file gives none."""
        annotations: list[dict[str, Any]] = []
        for index in indices:
            for entry in self.objects_of(index):
                own = dict(id=len(annotations) + 1, image_id=self.entries[index].id)
                annotations.append(dict(area=entry["bbox"][2] * entry["bbox"][3]) | entry | own)
        categories = [dict(id=i, name=n) for i, n in zip(self.category_ids, self.classes, strict=True)]
        images = [dict(id=e.id, width=e.width, height=e.height) for e in (self.entries[index] for index in indices)]
        return dict(images=images, annotations=annotations, categories=categories)


@dataclass(frozen=True)
class CocoSplits:
    """A training and a validation set with the same categories."""

    train: CocoSource
    val: CocoSource

    def digest(self) -> str:
        """A hash of all images and objects."""
        digest = hashlib.sha256()
        for source in (self.train, self.val):
            for entry, (start, end) in zip(source.entries, source.spans, strict=True):
                line = f"{entry.id}\0{entry.file_name}\n".encode("utf-8", "surrogateescape")
                digest.update(line + source.text[start:end])
        return digest.hexdigest()[:16]


def open_coco(data: DetectionDataSection, root: Path | None) -> CocoSplits:
    """The two sets that a recipe trains and validates on; images without objects are trained on if it says so.

    Raises:
        UserError: Anything wrong with the files, categories that differ, nothing to train on.
    """
    root = given_folder(root, "images and annotations")
    train = CocoSource(root / data.train_images, root / data.train_annotations)
    val = CocoSource(root / data.val_images, root / data.val_annotations)
    _check_same(train, val)
    if not data.keep_empty:
        train = train.part([index for index, count in enumerate(train.counted) if count])
    if not len(train):
        raise UserError(f"{train.annotations} has no image with an object that counts: there is nothing to train on")
    if not len(val):
        raise UserError(f"{val.annotations} lists no images: there is nothing to validate on")
    return CocoSplits(train, val)


def open_eval_coco(data: DetectionDataSection, root: Path | None, classes: Sequence[str]) -> CocoSource:
    """The validation set in ``root`` for a model with these classes, whatever their ids there.

    Raises:
        UserError: Anything wrong with the files, or categories that the model does not know.
    """
    root = given_folder(root, "images and annotations")
    source = CocoSource(root / data.val_images, root / data.val_annotations)
    unknown = [name for name in source.classes if name not in classes]
    if unknown:
        raise UserError(
            f"{source.annotations} has {len(unknown)} categories that the model does not know ({some(unknown)}); its "
            f"{len(classes)} are {some(list(classes))}"
        )
    # the model's classes, with ids that do not occur for those that the file lacks
    ids = dict(zip(source.classes, source.category_ids, strict=True))
    spare = max(source.category_ids, default=0)
    source.category_ids = [ids.get(name, spare + number) for number, name in enumerate(classes, 1)]
    source.classes = list(classes)
    return source


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): name the file with --set data.train_annotations=... or "
            "data.val_annotations=..."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({one_line(error)}): give COCO annotations") from None
    for key, fields in FIELDS.items():
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path} has no list {key!r}: give COCO annotations (instances_*.json)")
        wrong = [
            (number, name)
            for number, entry in enumerate(entries)
            for name, kind in fields.items()
            if type(entry.get(name)) is not kind or (name in ("width", "height") and entry[name] < 1)
        ]
        if wrong:
            number, name = wrong[0]
            kind = KINDS[fields[name]]
            raise UserError(
                f"{path}: {len(wrong)} values in {key!r} are missing or of the wrong kind; the first: {name} of entry "
                f"{number} must be {kind}, it is {str(entries[number].get(name))[:40]}"
            )
    if not content["categories"]:
        raise UserError(f"{path} lists no categories: there is nothing to detect")
    return content


def _check_unique(path: Path, what: str, values: list[Any]) -> None:
    twice = [str(value) for value, count in Counter(values).items() if count > 1]
    if twice:
        raise UserError(f"{path}: {what} {some(twice, 3)} occurs more than once")


def _check_same(train: CocoSource, val: CocoSource) -> None:
    if train.classes == val.classes:
        return
    parts = [
        f"only in {source.annotations.name}: {some([name for name in source.classes if name not in other.classes])}"
        for source, other in ((train, val), (val, train))
        if set(source.classes) - set(other.classes)
    ]
    detail = "; ".join(parts) or "their ids give them another order"
    raise UserError(f"training and validation have different categories ({detail}): make them match")


def _trouble(annotation: dict[str, Any], image: Entry) -> str | None:
    """Why an object cannot be used, if so."""
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        return "whose box is not [x, y, width, height]"
    left, top, width, height = box
    if width <= 0 or height <= 0:
        return "whose box has no area"
    if left >= image.width or top >= image.height or left + width <= 0 or top + height <= 0:
        return "whose box lies outside of the image"
    if not _is_number(annotation.get("area", 0)):
        return "whose area is no number"
    return mask_trouble(annotation.get("segmentation"), (image.width, image.height))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def mask_trouble(segmentation: Any, size: tuple[int, int]) -> str | None:
    """Why polygons or run lengths are no mask of an image (width, height), if so."""
    if not segmentation:
        return "without a mask (segmentation)"
    if isinstance(segmentation, list):
        try:
            polygons = [np.array(polygon, float) for polygon in segmentation]
        except (TypeError, ValueError):
            return "whose mask is no list of polygons"
        for polygon in polygons:
            if polygon.ndim != 1 or len(polygon) < 6 or len(polygon) % 2:
                return "whose mask has a polygon of less than three points"
            if not (np.abs(polygon) <= FAR * max(size)).all():  # not a number either
                return "whose mask has points far outside of the image"
        return None
    if not isinstance(segmentation, dict) or segmentation.get("size") != [size[1], size[0]]:
        return "whose mask has not the image's size"
    try:
        decode_mask(segmentation)
    except Exception:  # faster-coco-eval raises nearly anything
        return "whose mask cannot be decoded"
    return None
