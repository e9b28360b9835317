"""COCO's annotations as they are found in the world: ids of any kind, texts for numbers, masks in every form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from conv2former.data.rle import decode_mask, polygons_to_mask
from conv2former.data.sources import in_order

FAR = 10  # sides of an image that a polygon's points may lie away from it
NO_MASK = "without a mask (segmentation)"
EMPTY_MASK = "whose mask has no pixel"


MOST = 10**60  # that no number of COCO's reaches: ids, sides, coordinates


def is_id(value: Any) -> bool:
    """Whether a value can be an id: a number or a text."""
    return len(value) < 1000 if isinstance(value, str) else not isinstance(value, bool) and number(value) is not None


def id_order(value: Any) -> tuple[bool, Any, Any]:
    """The key to sort ids by: numbers first, then texts in natural order."""
    return (True, *in_order(value)) if isinstance(value, str) else (False, value, "")


class Ids:
    """Finds an id where it may be a text in one list and a number in another."""

    def __init__(self, known: Iterable[Any]) -> None:
        self.known = {value: place for place, value in enumerate(known)}
        self.texts = {str(value): place for value, place in self.known.items()}
        counts = Counter(number(value) for value in self.known)
        self.numbers = {number(value): place for value, place in self.known.items() if counts[number(value)] == 1}

    def place(self, value: Any) -> int | None:
        """Its place among the known ids; None where it is none of them."""
        if not is_id(value):
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        place = self.known.get(value, self.texts.get(str(value)))
        said = number(value)  # "1.0" and "00001" are 1, if no other id is
        return self.numbers.get(said) if place is None and said is not None else place


def number(value: Any) -> float | int | None:
    """A number, or the number that a text says; None where it is none."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
        value = int(value) if value.is_integer() else value
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST  # NaN is not
    return value if good else None


def flag(value: Any) -> bool:
    """Whether a value says yes: 1, true, "1" and "true", not "0"."""
    if isinstance(value, str):
        return value.strip().lower() not in ("", "0", "0.0", "false", "no", "none", "null")
    return bool(value)


def usable(annotation: Mapping[str, Any], size: tuple[int, int]) -> tuple[dict[str, Any], str | None, str | None]:
    """What of an annotation can be used.

    Args:
        annotation: COCO's.
        size: (width, height) of its image.

    Returns:
        ``bbox``, ``segmentation`` and ``area``, as far as they are sound, texts as numbers, a box that is missing or
        without area by the mask; why the mask is left out, in part or as a whole; why the object cannot be trained on.
        Without ``bbox`` it cannot be evaluated either.
    """
    mask, trouble = usable_mask(annotation.get("segmentation"), size)
    own: dict[str, Any] = {}
    box = annotation.get("bbox")
    if isinstance(box, list | tuple) and len(box) == 4 and None not in (numbers := [number(value) for value in box]):
        own["bbox"] = numbers
    if mask and (box in (None, []) or not has_area(own.get("bbox", [0, 0, 1, 1]))):
        own["bbox"] = box_of(mask)
    if mask:
        own["segmentation"] = mask
    if (area := number(annotation.get("area"))) is not None:
        own["area"] = area
    if "bbox" not in own:
        return own, trouble, "whose box is not [x, y, width, height]"
    left, top, width, height = own["bbox"]
    if not has_area(own["bbox"]):
        return own, trouble, "whose box has no area"
    if left >= size[0] or top >= size[1] or left + width <= 0 or top + height <= 0:
        return own, trouble, "whose box lies outside of the image"
    return own, trouble, None


def has_area(box: Sequence[Any]) -> bool:
    """Whether a box [x, y, width, height] of numbers has pixels."""
    return box[2] > 0 and box[3] > 0


def usable_mask(segmentation: Any, size: tuple[int, int]) -> tuple[Any, str | None]:
    """The sound polygons or run lengths of an image (width, height), and what is wrong with the rest, if anything."""
    if not segmentation:
        return None, NO_MASK
    if isinstance(segmentation, list):
        return _polygons(segmentation, size)
    if not isinstance(segmentation, dict):
        return None, "whose mask is neither polygons nor run lengths"
    counts, sides = segmentation.get("counts"), segmentation.get("size")
    sides = [number(side) for side in sides] if isinstance(sides, list) else sides
    if sides != [size[1], size[0]]:
        return None, "whose mask has not the image's size"
    if isinstance(counts, list) and not all(type(count) is int for count in counts):
        numbers = [number(count) for count in counts]
        segmentation = dict(size=sides, counts=[-1 if count is None else int(count) for count in numbers])
    try:
        inside = decode_mask(segmentation)
    except Exception:  # faster-coco-eval raises nearly anything
        return None, "whose mask cannot be decoded"
    return (segmentation, None) if inside.any() else (None, EMPTY_MASK)


def _polygons(given: list[Any], size: tuple[int, int]) -> tuple[Any, str | None]:
    pairs = len(given) > 2 and all(isinstance(value, list) and len(value) == 2 for value in given)
    single = all(number(value) is not None for value in given) or (
        pairs and all(number(value) is not None for pair in given for value in pair)
    )
    kept, trouble = [], None
    for polygon in [given] if single else given:
        try:
            stored = np.array(polygon)
            points = stored.astype(float)
        except (TypeError, ValueError):
            trouble = "whose mask is no list of polygons"
            continue
        if not points.size:
            trouble = trouble or NO_MASK
            continue
        in_pairs = points.ndim == 2 and points.shape[1] == 2  # [[x, y], ...]
        if points.ndim == 1 and points.size % 2:
            trouble = "whose mask has a polygon with an odd number of coordinates"
        elif not (in_pairs or points.ndim == 1) or points.size < 6:
            trouble = "whose mask has a polygon of less than three points"
        elif not (np.abs(points) <= FAR * max(size)).all():  # not a number either
            trouble = "whose mask has points far outside of the image"
        elif _area(points) < 1:  # points, lines, and fractions of the image's sides
            trouble = "whose mask has a polygon of less than a pixel"
        else:
            kept.append(polygon if points.ndim == 1 and stored.dtype.kind in "if" else points.ravel().tolist())
    return kept or None, trouble


def _area(points: np.ndarray) -> float:
    """Of a polygon, in pixels; where its parts may cancel out, since it crosses itself, its pixels but one."""
    points = points.reshape(-1, 2)
    x, y = points.T
    area, width, height = abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2, np.ptp(x), np.ptp(y)
    if area >= 1 or width * height < 2:
        return area
    moved = (points - points.min(axis=0)).ravel()
    return int(polygons_to_mask([moved], int(height) + 2, int(width) + 2).sum()) - 1


def box_of(mask: Any) -> list[float]:
    """The box of polygons, or of run lengths, as x, y, width, height."""
    if isinstance(mask, dict):
        inside = decode_mask(mask).astype(bool)
        if not inside.any():
            return [0, 0, 0, 0]
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        left, top = int(columns[0]), int(rows[0])
        return [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
    points = np.concatenate([np.array(polygon, float).reshape(-1, 2) for polygon in mask])
    (left, top), (right, bottom) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return [left, top, right - left, bottom - top]


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes [x, y, width, height]."""
    sides = [min(one[i] + one[i + 2], other[i] + other[i + 2]) - max(one[i], other[i]) for i in (0, 1)]
    shared = max(sides[0], 0) * max(sides[1], 0)
    return shared / max(one[2] * one[3] + other[2] * other[3] - shared, 1e-9)


def apart(box: Sequence[float], mask: Sequence[float]) -> bool:
    """Whether a box is not that of its mask, by more than rounding; it may hold more, of an object that is hidden."""
    outside = [box[i] - mask[i] for i in (0, 1)] + [mask[i] + mask[i + 2] - box[i] - box[i + 2] for i in (0, 1)]
    return max(outside) > 2 and overlap(box, mask) < 0.5


def clipped(box: Sequence[float], image: Any) -> Sequence[float]:
    """A box [x, y, width, height] in evaluation: what reaches more than a pixel beyond its image is cut off."""
    (left, top), right, low = box[:2], box[0] + box[2], box[1] + box[3]
    inside = left >= -1 and top >= -1 and right <= image.width + 1 and low <= image.height + 1
    if inside or not overlap(box, [0, 0, image.width, image.height]):
        return box
    left, top = max(left, 0), max(top, 0)
    return [left, top, min(right, image.width) - left, min(low, image.height) - top]


def area_of(entry: Mapping[str, Any], size: tuple[int, int]) -> float:
    """An object's area in pixels: what its annotation says, else that of its mask, else of its box."""
    if "area" in entry:
        return entry["area"]
    mask = entry.get("segmentation")
    if not mask:
        return entry["bbox"][2] * entry["bbox"][3]
    pixels = decode_mask(mask) if isinstance(mask, dict) else polygons_to_mask(mask, size[1], size[0])
    return int(pixels.sum())
