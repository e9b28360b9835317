"""Images with COCO annotations: read once, checked as a whole, kept small."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
from PIL import Image

from conv2former.data.folders import listed, one_form
from conv2former.data.images import IMAGE_EXTENSIONS, MAX_PIXELS, BadImage, decode, shown_size
from conv2former.data.rle import library
from conv2former.data.sources import MOST_OF_A_NAME, exif_remark, stored_pixels
from conv2former.errors import UserError, one_line, printable, some
from conv2former.tasks.detection.objects import (
    Ids,
    apart,
    area_of,
    box_of,
    clipped,
    flag,
    has_area,
    id_order,
    is_id,
    number,
    usable,
)

# what the lists must hold
FIELDS: dict[str, dict[str, str]] = dict(
    images=dict(id="an id", file_name="a text", width="a whole number", height="a whole number"),
    categories=dict(id="an id", name="a text"),
    annotations=dict(image_id="an id", category_id="an id"),
)


BEYOND = "have a box that reaches beyond the image"
CROWDS = "are crowds (iscrowd): not trained on"
ROTATED = "are rotated (attributes.rotation) and have no mask: their boxes are taken without that"
APART = "have a box that is not that of their mask: COCO's are [x, y, width, height], its polygons x1, y1, x2, y2, ..."
TWICE = "have the class and the box of another one of their image: if they are one object, remove one"


class Entry(NamedTuple):
    """An image by the annotations."""

    id: int | float | str
    file_name: str
    width: int
    height: int


class CocoSource:
    """A set of images with objects: box, category and perhaps a mask each.

    Objects are kept as one text, a fraction of what Python's dictionaries take, which the processes that read share.
    Those that cannot be trained on (no area, outside of their image) still count in evaluation.

    Args:
        images: Folder of the images.
        annotations: COCO's JSON.
        turn: Whether the EXIF orientation of images is applied, so that boxes are those of the turned image.

    Attributes:
        classes: Names of the categories, by their ids.
        category_ids: The ids, in the order of ``classes``.
        entries: The images.
        counted: Objects of each that are trained on.
        per_class: How many of these there are of each class.
        has_masks: Whether one of them has a mask.
        notes: Lines about what is left out.

    Raises:
        UserError: Not JSON, keys that are missing or of another type, images that are missing, no categories.
    """

    def __init__(self, images: Path, annotations: Path, *, turn: bool = True) -> None:
        library()
        self.images, self.annotations, self.turn = images, annotations, turn
        self.notes: list[str] = []
        content = _read(annotations)
        categories = sorted(self._categories(content), key=lambda entry: id_order(entry["id"]))
        self.category_ids = [entry["id"] for entry in categories]
        self.classes = [entry["name"] for entry in categories]
        images_listed = sorted(content["images"], key=lambda entry: id_order(entry["id"]))
        self.entries = [Entry(**{key: entry[key] for key in Entry._fields}) for entry in images_listed]
        _check_unique(annotations, "image id", [entry.id for entry in self.entries])
        self.stored_names = self._check_files()
        self._check_one_entry_each()
        self._find_sizes()
        self.spare: dict[Any, list[dict[str, Any]]] = {}
        self.per_class = [0] * len(self.classes)
        objects = self._sorted_objects(content["annotations"])
        self.counted = [sum(not entry["iscrowd"] for entry in own) for own in objects]
        self.has_masks = any("segmentation" in entry and not entry["iscrowd"] for own in objects for entry in own)
        texts = [json.dumps(own, separators=(",", ":")).encode() for own in objects]
        self.text = b"".join(texts)
        ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        self.spans = np.stack([ends - [len(text) for text in texts], ends], axis=1) if texts else np.zeros((0, 2), int)
        if turn:
            self.notes += exif_remark([self.file(index) for index in range(len(self))], "boxes and masks")

    def _categories(self, content: dict[str, Any]) -> list[dict[str, Any]]:
        """Those listed, without an unused one that is merely the others' supercategory (Roboflow's first)."""
        categories = content["categories"]
        _check_unique(self.annotations, "category id", [entry["id"] for entry in categories])
        ids = Ids(entry["id"] for entry in categories)
        counts = Counter(ids.place(annotation["category_id"]) for annotation in content["annotations"])
        kept = []
        for place, entry in enumerate(categories):
            above = any(other.get("supercategory") == entry["name"] for other in categories if other is not entry)
            if above and not counts[place]:
                self.notes.append(
                    f"{self.annotations}: category {printable(entry['name'])} (id {entry['id']}) is left out: it has "
                    "no objects, and others are below it"
                )
            else:
                kept.append((entry, counts[place]))
        if nameless := [entry["id"] for entry, _ in kept if not entry["name"].strip()]:
            raise UserError(f"{self.annotations}: the category of id {nameless[0]} has no name: give it one")
        names = Counter(entry["name"] for entry, _ in kept)
        if twice := [name for name, count in names.items() if count > 1]:
            alike = [(entry["id"], count or "no") for entry, count in kept if entry["name"] == twice[0]]
            own = [f"id {identity} with {count} objects" for identity, count in alike]
            raise UserError(
                f"{self.annotations}: category name {printable(twice[0])} occurs more than once ({', '.join(own)}): "
                "rename one, or remove one without objects"
            )
        return [entry for entry, _ in kept]

    def _check_files(self) -> dict[str, str]:
        """Names of files as the disk has them, where the annotations write them in another way."""
        if not self.images.is_dir():
            raise UserError(f"no such folder: {self.images}")
        missing = [entry.file_name for entry in self.entries if not self._is_there(entry.file_name)]
        found: dict[str, str] = {}
        if missing:
            there = {one_form(name): name for name in listed(self.images, IMAGE_EXTENSIONS).files}
            forms = {name: one_form(name.replace("\\", "/")) for name in missing}
            forms |= {
                name: unquote(form) for name, form in forms.items() if form not in there and unquote(form) in there
            }
            found = {name: there[form] for name, form in forms.items() if form in there}
            used = {one_form(entry.file_name) for entry in self.entries} - set(forms.values())
            free = {form: name for form, name in there.items() if form not in used}
            found |= self._by_their_names([name for name in missing if name not in found], free)
            missing = [name for name in missing if name not in found]
        if missing:
            raise UserError(
                f"{len(missing)} of the {len(self.entries)} images that {self.annotations} names are not in "
                f"{self.images}: {some(missing, 3)}"
            )
        return found

    def _check_one_entry_each(self) -> None:
        """Refuses two entries of one file: each would have the objects of the other as background."""
        first: dict[str, Any] = {}
        for index, entry in enumerate(self.entries):
            file = os.path.normpath(self.file(index))
            if file in first:
                raise UserError(
                    f"{self.annotations}: the images {first[file]} and {entry.id} are one file, "
                    f"{printable(entry.file_name)}: give all its objects one image_id, and remove the other entry"
                )
            first[file] = entry.id

    def _is_there(self, name: str) -> bool:
        """Whether an image lies in the folder or beside it: the annotations may be somebody else's."""
        path, top = os.path.join(self.images, name), os.path.abspath(self.images.parent)
        try:
            return os.path.isfile(path) and (
                not (os.path.isabs(name) or ".." in name) or os.path.abspath(path).startswith(os.path.join(top, ""))
            )
        except ValueError:  # a null in it
            return False

    def _by_their_names(self, missing: list[str], there: dict[str, str]) -> dict[str, str]:
        """Files of other folders than the annotations say, if the name of each is the only one of its kind."""
        by_name = Counter(_last_part(name) for name in there)
        alone = {_last_part(name): stored for name, stored in there.items() if by_name[_last_part(name)] == 1}
        found = {name: alone[_last_part(name)] for name in missing if _last_part(name) in alone}
        if not found or len({*found.values()}) < len(found):
            return {}
        written, stored = next(iter(found.items()))
        self.notes.append(
            f"{self.annotations}: {len(found):,} images are found by their names alone: it writes "
            f"{printable(written)} for {printable(stored)}"
        )
        return found

    def _find_sizes(self) -> None:
        """Takes sizes that the annotations lack from the files."""
        lacking = [index for index, entry in enumerate(self.entries) if not (entry.width and entry.height)]
        for index in lacking:
            file = self.file(index)
            try:
                width, height = shown_size(file, turn=self.turn)
            except BadImage as error:
                raise UserError(f"{self.annotations} gives no size of an image: {error}: remove it from both") from None
            self.entries[index] = self.entries[index]._replace(width=width, height=height)
        if lacking:
            self.notes.append(f"{self.annotations}: {len(lacking):,} sizes of images are missing: the files say them")

    def file(self, index: int) -> Path:
        """The path of an image."""
        name = self.entries[index].file_name
        return self.images / self.stored_names.get(name, name)

    def _sorted_objects(self, annotations: list[Any]) -> list[list[dict[str, Any]]]:
        """The objects of each image, in the order of ``entries``; ``spare`` gets those that are evaluated alone."""
        images, categories = Ids(entry.id for entry in self.entries), Ids(self.category_ids)
        found: list[list[dict[str, Any]]] = [[] for _ in self.entries]
        said: dict[str, list[str]] = {}
        seen = set[tuple[Any, ...]]()
        fractions = True  # whether all boxes lie between 0 and 1
        for position, annotation in enumerate(annotations):
            name = str(annotation.get("id", f"number {position}"))
            index, category = images.place(annotation["image_id"]), categories.place(annotation["category_id"])
            if index is None:
                said.setdefault("of images that it does not list are left out", []).append(name)
                continue
            if category is None:
                raise UserError(
                    f"{self.annotations}: annotation {name} is of category {annotation['category_id']}, which it does "
                    "not list"
                )
            entry = self.entries[index]
            own, mask_trouble, trouble = usable(annotation, (entry.width, entry.height))
            crowd = flag(annotation.get("iscrowd"))
            own = dict(category_id=self.category_ids[category]) | own | dict(iscrowd=int(crowd))
            if trouble:
                rest = "are not trained on" if "bbox" in own else "are left out"
                said.setdefault(f"{trouble} {rest}", []).append(name)
                if "bbox" in own:
                    self.spare.setdefault(entry.id, []).append(own)
                continue
            given = annotation.get("bbox")
            if given and given != own["bbox"] and not has_area([*map(number, given)]):
                said.setdefault("whose box has no area take that of their mask", []).append(name)
            fractions &= max(own["bbox"][0] + own["bbox"][2], own["bbox"][1] + own["bbox"][3]) <= 1
            if clipped(own["bbox"], entry) is not own["bbox"]:
                said.setdefault(BEYOND, []).append(name)
            if isinstance(own.get("segmentation"), list) and apart(own["bbox"], box_of(own["segmentation"])):
                said.setdefault(APART, []).append(name)
            self.per_class[category] += not crowd
            attributes = annotation.get("attributes")
            if isinstance(attributes, dict) and number(attributes.get("rotation")) and "segmentation" not in own:
                said.setdefault(ROTATED, []).append(name)
            if crowd:
                said.setdefault(CROWDS, []).append(name)
            elif mask_trouble:
                part = "lose that part of it" if "segmentation" in own else "count for their boxes alone"
                said.setdefault(f"{mask_trouble} {part}", []).append(name)
            if (key := (index, category, crowd, *own["bbox"])) in seen:
                said.setdefault(TWICE, []).append(name)
            seen.add(key)
            found[index].append(own)
        if fractions and any(found):
            raise UserError(
                f"{self.annotations}: all boxes lie between 0 and 1: COCO's are [x, y, width, height] in pixels, so "
                "multiply them by the sides of their images"
            )
        for what, names in said.items():
            if what == BEYOND and 2 * len(names) > len(annotations):
                what += "; COCO's are [x, y, width, height], not two corners"
            if what == CROWDS and 2 * len(names) > len(annotations):
                what += "; if each is one object, write iscrowd 0 into the file"
            ids = "" if what.startswith(CROWDS) else f" (ids {some(names, 3)})"
            self.notes.append(f"{self.annotations}: {len(names):,} of {len(annotations):,} objects {what}{ids}")
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
        entry, file = self.entries[index], self.file(index)
        image = decode(file, max_pixels=max_pixels, turn=self.turn)
        if image.size != (entry.width, entry.height):
            sizes = f"{image.width} x {image.height} pixels, by the annotations {entry.width} x {entry.height}"
            way = stored_pixels(file, (entry.width, entry.height), image.size) if self.turn else ""
            raise BadImage(str(file), f"it has {sizes}{way}")
        return image, self.objects_of(index)

    def part(self, indices: Sequence[int]) -> CocoSource:
        """Some of the images."""
        chosen = object.__new__(CocoSource)
        chosen.__dict__.update(self.__dict__)
        chosen.entries = [self.entries[index] for index in indices]
        chosen.counted = [self.counted[index] for index in indices]
        chosen.spans = self.spans[list(indices)]
        if sum(chosen.counted) < sum(self.counted):
            objects = (entry for index in range(len(chosen)) for entry in chosen.objects_of(index))
            ids = Counter(entry["category_id"] for entry in objects if not entry["iscrowd"])
            chosen.per_class = [ids[own] for own in self.category_ids]
        return chosen

    def ground_truth(self, indices: Sequence[int]) -> dict[str, Any]:
        """COCO's dictionary of some of the images, all objects with an area, none left out that has a box."""
        annotations: list[dict[str, Any]] = []
        for index in indices:
            image = self.entries[index]
            for entry in self.objects_of(index) + self.spare.get(image.id, []):
                entry = entry | dict(bbox=clipped(entry["bbox"], image))
                own = dict(id=len(annotations) + 1, image_id=image.id)
                annotations.append(dict(area=area_of(entry, (image.width, image.height))) | entry | own)
        categories = [dict(id=i, name=n) for i, n in zip(self.category_ids, self.classes, strict=True)]
        images = [dict(id=e.id, width=e.width, height=e.height) for e in (self.entries[index] for index in indices)]
        return dict(images=images, annotations=annotations, categories=categories)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): name the files of COCO annotations with --set "
            "data.train_annotations=... and data.val_annotations=...; other formats (YOLO, labelme, VOC) are not read: "
            "export as COCO, in two parts"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({one_line(error)}): give COCO annotations") from None
    for key, fields in FIELDS.items():
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path} has no list {key!r}: give COCO annotations (instances_*.json)")
        for position, entry in enumerate(entries):
            for name, kind in fields.items():
                value = _value(entry.get(name), kind)
                if value is None and kind == "a whole number" and entry.get(name) in (None, 0, "0", ""):
                    value = 0  # the file says it
                if value is not None:
                    entry[name] = value
                else:
                    wrong = sum(_value(other.get(n), k) is None for other in entries for n, k in fields.items())
                    raise UserError(
                        f"{path}: {wrong} values in {key!r} are missing or of the wrong kind; the first: {name} of "
                        f"entry {position} must be {kind}, it is {str(entry.get(name))[:40]}"
                    )
    if not content["categories"]:
        raise UserError(f"{path} lists no categories: there is nothing to detect")
    return content


def _value(value: Any, kind: str) -> Any:
    """A value as it is to be, a text as the number that it says where one is needed; None if it is not of its kind."""
    if kind == "an id":
        return int(value) if isinstance(value, float) and value.is_integer() else value if is_id(value) else None
    if kind == "a text":
        return str(value) if type(value) in (str, int) and len(str(value)) <= MOST_OF_A_NAME else None
    side = number(value)
    return int(side) if side is not None and side >= 1 and side == int(side) else None


def _last_part(name: str) -> str:
    """The name of a file without its folders, in small letters."""
    return one_form(name).replace("\\", "/").rpartition("/")[2].casefold()


def _check_unique(path: Path, what: str, values: list[Any]) -> None:
    twice = [value for value, count in Counter(map(str, values)).items() if count > 1]
    if twice:
        raise UserError(f"{path}: {what} {some(twice, 3)} occurs more than once")
