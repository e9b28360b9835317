"""What a folder seems to hold, for those who give it to another task than theirs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from conv2former.data.folders import ends_in, find_splits, is_junk, like_pieces, like_splits, subfolders
from conv2former.data.images import IMAGE_EXTENSIONS
from conv2former.errors import UserError, printable, some

# what the folders of images and of their masks are called, in upper and lower case; what is first counts where two are
IMAGES = ("images", "image", "imgs", "img", "img_dir")
MASKS = ("masks", "mask", "annotations", "labels", "label", "ann_dir", "ground_truth", "groundtruth", "gt")
# what other sets call them, which no task reads: Pascal VOC, Flowers-102, CUB, Supervisely and so on
OTHER_IMAGES = ("jpegimages", "jpg", "jpgs", "jpeg", "original_images")
OTHER_MASKS = (
    *("segmentationclass", "segmentationobject", "segmentationclassaug", "segmentations", "segmentation", "segmim"),
    *("masks_machine", "masks_human", "masks_instances", "trimaps", "label_images_semantic"),
)
LABELS = {  # annotations that are not read: what their folders and files are called
    "YOLO": (("labels", "label"), ".txt"),
    "Pascal VOC": (("annotations",), ".xml"),
}
RECIPES = dict(classification="finetune", detection="finetune_detection", segmentation="finetune_segmentation")
LOOKED_INTO, HEAD = 20, 1 << 16  # JSON files or folders of a folder, and bytes of each file
DEPTH, MOST_NAMES = 4, 2000  # of folders, and files in one
COCO = (b'"file_name"', b'"category_id"', b'"supercategory"')  # keys of COCO's lists


def images_and_masks(names: Iterable[str]) -> tuple[str, str] | None:
    """Of the names of folders those of images and of masks, if both are there."""
    known = {name.casefold(): name for name in names}
    images = [known[word] for word in (*IMAGES, *OTHER_IMAGES) if word in known]
    masks = [known[word] for word in (*MASKS, *OTHER_MASKS) if word in known]
    return (images[0], masks[0]) if images and masks else None


def masked(place: Path) -> tuple[str, str] | None:
    """``images_and_masks`` of the folders in one that hold images."""
    names = subfolders(place)
    if not images_and_masks(names):
        return None
    words = (*IMAGES, *MASKS, *OTHER_IMAGES, *OTHER_MASKS)
    pair = images_and_masks(name for name in names if name.casefold() in words and holds_images(place / name))
    return pair if pair and _of_one_name(place / pair[0], place / pair[1]) else None


def masked_part(root: Path) -> tuple[Path, tuple[str, str]] | None:
    """A folder, or a part of the set in it, with the names of ``masked``; what may not be read has none."""
    parts = [root]
    with contextlib.suppress(UserError):
        parts += [root / name for name in find_splits(subfolders(root)).values()]
    for part in parts:
        with contextlib.suppress(UserError):
            if pair := masked(part):
                return part, pair
    return None


def _of_one_name(images: Path, masks: Path) -> bool:
    """Whether some image's name is in that of a mask, as far as both are looked at."""
    stems = {os.path.splitext(name)[0] for name in islice(_image_names(images), LOOKED_INTO)}
    return any(stem in name for name in islice(_image_names(masks), MOST_NAMES) for stem in stems)


def _image_names(folder: Path) -> Iterator[str]:
    for _, _, files in os.walk(folder):
        yield from sorted(name for name in files if ends_in(name, IMAGE_EXTENSIONS))


def refuse_parts(place: Path, names: Sequence[str], way: str) -> None:
    """Refuses folders, by their names, that would be taken for classes and are the parts or the pieces of a set.

    Args:
        place: Where they lie.
        names: Those that hold images.
        way: What to do with parts.

    Raises:
        UserError: They are.
    """
    if parts := like_splits(names):
        raise UserError(printable(f"{place}: the folders {some(parts)} look like parts of a set: {way}"))
    if like_pieces(names):
        what = f"{place}: the folders {some([*names], 3)} look like pieces of one set, and not like classes"
        raise UserError(printable(f"{what}: sort their images into a folder per class, or rename them if they are"))


def refuse_masks(place: Path, pair: tuple[str, str] | None) -> None:
    """Refuses images and their masks as two classes; raises UserError."""
    if pair:
        what = f"{pair[0]}/ and {pair[1]}/ in {place} are not taken for classes"
        raise UserError(printable(f"{what}: rename these folders if they are"))


@contextlib.contextmanager
def read_for(task: str, root: Path | None) -> Iterator[None]:
    """Adds to the errors inside what the folder seems to hold, if that is something for another task."""
    try:
        yield
    except UserError as error:
        seen: dict[str, str] = {}
        with contextlib.suppress(UserError):  # a folder that may not be read
            seen = dict(_seen(root, task)) if root is not None and root.is_dir() else {}
        if not seen or task in seen:
            raise
        kind, what = next(iter(seen.items()))
        way = f"train with --recipe {RECIPES[kind]}" if kind in RECIPES else "export them in COCO's format"
        raise UserError(f"{printable(what)}: {way} (for {task}: {error})") from None


def _seen(root: Path, task: str) -> Iterator[tuple[str, str]]:
    """The tasks that a folder seems to be for, each with what shows it; the surest first."""
    splits = find_splits(subfolders(root))
    parts = [root, *(root / name for name in splits.values())]
    folders = [place / name for place in parts for name in subfolders(place)]
    for place in (*parts, *folders):
        if file := next((file for file in islice(place.glob("*.json"), LOOKED_INTO) if _is_coco(file)), None):
            yield "detection", f"{file} looks like annotations of COCO's format"
            break
    place, pair = masked_part(root) or (root, ("", ""))
    what = f"{pair[0]}/ and {pair[1]}/ in {place} look like images and their masks"
    read = pair[0].casefold() in IMAGES and pair[1].casefold() in MASKS
    if read:
        yield "segmentation", what
        return
    labels = [
        (kind, f"{folder} looks like annotations of {kind}")
        for kind, (called, ending) in LABELS.items()
        for folder in folders
        if folder.name.casefold() in called and _has(folder, (ending,))
    ]
    yield from labels[: task != "segmentation"]  # whose masks may lie beside them
    if pair[0]:
        yield "segmentation", f"{what}, which are read from images/ and masks/"
        return
    # where there are labels, classes are looked for further down: that something is not for classification must be sure
    if found := _classes(root / splits.get("train", ""), DEPTH if labels else 0):
        place, classes = found
        if task == "segmentation" and len(classes) == 2:  # they may be images and masks of other names
            return
        yield "classification", f"{some([f'{name}/' for name in classes], 3)} in {place} look like folders of classes"


def _classes(place: Path, deep: int) -> tuple[Path, list[str]] | None:
    """A folder whose folders hold images and do not look like parts of a set, with these; the topmost."""
    names = subfolders(place)
    classes = [name for name in names if _has(place / name, IMAGE_EXTENSIONS, deep=False)]
    if len(classes) > 1 and not find_splits(classes) and not like_splits(classes):
        return place, classes
    below = (_classes(place / name, deep - 1) for name in names[: LOOKED_INTO * (deep > 0)])
    return next((found for found in below if found), None)


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
    return head.lstrip().startswith(b"{") and any(word in head for word in COCO)
