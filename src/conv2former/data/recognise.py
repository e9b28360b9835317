"""What a folder seems to hold, for those who give it to another task than theirs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from conv2former.data.folders import ends_in, find_splits, is_junk, like_splits, subfolders
from conv2former.data.images import IMAGE_EXTENSIONS
from conv2former.errors import UserError, printable, some

# what the folders of images and of their masks are called, in upper and lower case; what is first counts where two are
IMAGES = ("images", "image", "imgs", "img", "img_dir")
MASKS = ("masks", "mask", "annotations", "labels", "label", "ann_dir", "ground_truth", "groundtruth", "gt")
LABELS = {  # annotations that are not read: what their folders and files are called
    "YOLO": (("labels", "label"), ".txt"),
    "Pascal VOC": (("annotations",), ".xml"),
}
RECIPES = dict(classification="finetune", detection="finetune_detection", segmentation="finetune_segmentation")
LOOKED_INTO, HEAD = 20, 1 << 16  # JSON files of a folder, and bytes of each
COCO = (b'"images"', b'"annotations"', b'"categories"')


def images_and_masks(names: Iterable[str]) -> tuple[str, str] | None:
    """Of the names of folders those of images and of masks, if both are there."""
    known = {name.casefold(): name for name in names}
    images = [known[word] for word in IMAGES if word in known]
    masks = [known[word] for word in MASKS if word in known]
    return (images[0], masks[0]) if images and masks else None


@contextlib.contextmanager
def read_for(task: str, root: Path | None) -> Iterator[None]:
    """Adds to the errors inside what the folder seems to hold, if that is something for another task."""
    try:
        yield
    except UserError as error:
        seen: dict[str, str] = {}
        with contextlib.suppress(UserError):  # a folder that may not be read
            seen = dict(_seen(root)) if root is not None and root.is_dir() else {}
        if not seen or task in seen:
            raise
        kind, what = next(iter(seen.items()))
        way = f"train with --recipe {RECIPES[kind]}" if kind in RECIPES else "export them in COCO's format"
        raise UserError(f"{printable(what)}: {way} (for {task}: {error})") from None


def _seen(root: Path) -> Iterator[tuple[str, str]]:
    """The tasks that a folder seems to be for, each with what shows it; the surest first."""
    splits = find_splits(subfolders(root))
    parts = [root, *(root / name for name in splits.values())]
    folders = [place / name for place in parts for name in subfolders(place)]
    for place in (*parts, *folders):
        if file := next((file for file in islice(place.glob("*.json"), LOOKED_INTO) if _is_coco(file)), None):
            yield "detection", f"{file} looks like annotations of COCO's format"
            break
    for place in parts:
        pair = images_and_masks(subfolders(place))
        if pair and all(holds_images(place / name) for name in pair):
            yield "segmentation", f"{pair[0]}/ and {pair[1]}/ in {place} look like images and their masks"
            return
    for kind, (called, ending) in LABELS.items():
        if labels := [place for place in folders if place.name.casefold() in called and _has(place, (ending,))]:
            yield kind, f"{labels[0]} looks like annotations of {kind}"
            return
    place = root / splits.get("train", "")
    classes = [name for name in subfolders(place) if _has(place / name, IMAGE_EXTENSIONS, deep=False)]
    if len(classes) > 1 and not find_splits(classes) and not like_splits(classes):
        yield "classification", f"{some([f'{name}/' for name in classes], 3)} in {place} look like folders of classes"


def holds_images(folder: Path) -> bool:
    """Whether there is an image in a folder or below it."""
    return _has(folder, IMAGE_EXTENSIONS)


def _has(folder: Path, endings: tuple[str, ...], *, deep: bool = True) -> bool:
    for _, below, files in os.walk(folder):
        if any(ends_in(name, endings) for name in files):
            return True
        below[:] = [name for name in below if deep and not is_junk(name)]
    return False


def _is_coco(file: Path) -> bool:
    try:
        with open(file, "rb") as stream:
            head = stream.read(HEAD)
    except OSError:
        return False
    return any(word in head for word in COCO)
