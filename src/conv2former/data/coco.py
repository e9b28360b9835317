"""Images with COCO annotations: read once, checked as a whole, kept small."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from conv2former.data.images import MAX_PIXELS, BadImage, decode
from conv2former.errors import UserError, one_line, some
from conv2former.recipes.detection import DetectionDataSection


class CocoSource:
    """A set of images with objects: box, category and mask each.

    Objects are kept as text, which is a tenth of what Python's dictionaries take and is shared by the processes that
    read. Boxes without area, or outside of their image, are left out and counted in one line; so are objects whose mask
    is missing.

    Args:
        images: Folder of the pictures.
        annotations: COCO's JSON.
        say: Takes the line about what was left out.

    Attributes:
        classes: Names of the categories, by their ids.
        category_ids: The ids, in the order of ``classes``.

    Raises:
        UserError: Not JSON, keys that are missing, images that are missing, no categories.
    """

    def __init__(self, images: Path, annotations: Path, *, say: Callable[[str], None] | None = None) -> None:
        self.images, self.annotations = images, annotations
        content = _read(annotations)
        categories = sorted(content["categories"], key=lambda entry: entry["id"])
        self.category_ids = [entry["id"] for entry in categories]
        self.classes = [str(entry["name"]) for entry in categories]
        _check_unique(annotations, "category id", self.category_ids)
        _check_unique(annotations, "category name", self.classes)
        self.entries = sorted(content["images"], key=lambda entry: entry["id"])
        _check_unique(annotations, "image id", [entry["id"] for entry in self.entries])
        self._check_files()
        objects = self._sorted_objects(content["annotations"], say or _say)
        self.objects = [json.dumps(own, separators=(",", ":")).encode() for own in objects]
        self.counted = [sum(not entry.get("iscrowd") for entry in own) for own in objects]

    def _check_files(self) -> None:
        if not self.images.is_dir():
            raise UserError(f"no such folder: {self.images}")
        missing = [entry["file_name"] for entry in self.entries if not (self.images / entry["file_name"]).is_file()]
        if missing:
            raise UserError(
                f"{len(missing)} of the {len(self.entries)} images that {self.annotations} names are not in "
                f"{self.images}: {some(missing, 3)}"
            )

    def _sorted_objects(self, annotations: list[Any], say: Callable[[str], None]) -> list[list[dict[str, Any]]]:
        """The objects of each image, in the order of ``entries``."""
        place = {entry["id"]: index for index, entry in enumerate(self.entries)}
        known = set(self.category_ids)
        found: list[list[dict[str, Any]]] = [[] for _ in self.entries]
        wrong: dict[str, list[str]] = {}
        for number, annotation in enumerate(annotations):
            missing = [key for key in ("image_id", "category_id", "bbox") if key not in annotation]
            if missing:
                raise UserError(f"{self.annotations}: annotation {number} has no {missing[0]}: every object needs one")
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
            found[index].append({key: annotation[key] for key in KEPT if key in annotation})
        for what, names in wrong.items():
            which = f"{len(names)} of {len(annotations)} objects {what} are left out"
            say(f"{self.annotations}: {which} (ids {some(names, 3)})")
        return found

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        """The picture's file below its folder."""
        return self.entries[index]["file_name"]

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) by the annotations."""
        return self.entries[index]["width"], self.entries[index]["height"]

    def objects_of(self, index: int) -> list[dict[str, Any]]:
        """The objects of an image, crowds included."""
        return json.loads(self.objects[index])

    def load(self, index: int, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, list[dict[str, Any]]]:
        """The image in RGB and its objects; raises BadImage."""
        file = self.images / self.name(index)
        image = decode(file, max_pixels=max_pixels)
        if image.size != self.size(index):
            (width, height), (said_width, said_height) = image.size, self.size(index)
            raise BadImage(
                str(file), f"it has {width} x {height} pixels, by the annotations {said_width} x {said_height}"
            )
        return image, self.objects_of(index)

    def part(self, indices: Sequence[int]) -> CocoSource:
        """Some of the images."""
        chosen = object.__new__(CocoSource)
        chosen.__dict__.update(self.__dict__)
        for name in ("entries", "objects", "counted"):
            values = getattr(self, name)
            setattr(chosen, name, [values[int(index)] for index in indices])
        return chosen

    def ground_truth(self, indices: Sequence[int]) -> dict[str, Any]:
        """COCO's dictionary of some of the images, with areas where the file gives none."""
        annotations: list[dict[str, Any]] = []
        for index in indices:
            for entry in self.objects_of(index):
                entry = dict(entry, id=len(annotations) + 1, iscrowd=int(entry.get("iscrowd", 0)))
                entry.setdefault("area", entry["bbox"][2] * entry["bbox"][3])
                annotations.append(entry)
        categories = [dict(id=i, name=n) for i, n in zip(self.category_ids, self.classes, strict=True)]
        images = [{key: self.entries[index][key] for key in ("id", "width", "height")} for index in indices]
        return dict(images=images, annotations=annotations, categories=categories)


KEPT = ("image_id", "category_id", "bbox", "segmentation", "iscrowd", "area")


@dataclass(frozen=True)
class CocoSplits:
    """A training and a validation set with the same categories."""

    train: CocoSource
    val: CocoSource

    def digest(self) -> str:
        """A hash of all images and objects."""
        digest = hashlib.sha256()
        for source in (self.train, self.val):
            for entry, objects in zip(source.entries, source.objects, strict=True):
                digest.update(f"{entry['id']}\0{entry['file_name']}\n".encode("utf-8", "surrogateescape") + objects)
        return digest.hexdigest()[:16]


def open_coco(data: DetectionDataSection, root: Path | None) -> CocoSplits:
    """The two sets that a recipe trains and validates on; images without objects are trained on if it says so.

    Raises:
        UserError: Anything wrong with the files, categories that differ, nothing to train on.
    """
    root = _folder(root)
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
    root = _folder(root)
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


def _folder(root: Path | None) -> Path:
    if root is None:
        raise UserError("no data given: name the folder of images and annotations with --data DIR")
    if not root.is_dir():
        raise UserError(f"no such folder: {root}" if not root.exists() else f"not a folder: {root}")
    return root


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): name the file with --set data.train_annotations or "
            "data.val_annotations"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({one_line(error)}): give COCO annotations") from None
    for key, needed in (
        ("images", ("id", "file_name", "width", "height")),
        ("categories", ("id", "name")),
        ("annotations", ()),
    ):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path} has no list {key!r}: give COCO annotations (instances_*.json)")
        lacking = [(number, name) for number, entry in enumerate(entries) for name in needed if name not in entry]
        if lacking:
            number, name = lacking[0]
            raise UserError(
                f"{path}: {len(lacking)} entries of {key!r} lack something, the first ({number}) has no {name}"
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


def _trouble(annotation: dict[str, Any], image: dict[str, Any]) -> str | None:
    """Why an object cannot be used, if so."""
    box = annotation["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, int | float) for value in box):
        return "whose box is not [x, y, width, height]"
    left, top, width, height = box
    if not (width > 0 and height > 0):  # not a number either
        return "whose box has no area"
    if left >= image["width"] or top >= image["height"] or left + width <= 0 or top + height <= 0:
        return "whose box lies outside of the image"
    if not annotation.get("iscrowd") and not annotation.get("segmentation"):
        return "without a mask (segmentation)"
    return None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
