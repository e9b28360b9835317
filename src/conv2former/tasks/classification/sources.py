"""Where labelled images lie: class folders, Hugging Face datasets, the quick start's digits; parts of any source."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from timm.utils.misc import natural_key

from conv2former.data.folders import listed, one_form, passed_over
from conv2former.data.images import IMAGE_EXTENSIONS, MAX_PIXELS, BadImage, decode
from conv2former.data.sources import in_order, notes
from conv2former.errors import UserError, one_line, printable, some

MASK = re.compile(r"_mask(_\d+)?\.[^.]*$", re.IGNORECASE)


class ImageSource(Protocol):
    """A set of labelled images, each to be had by its index, in any order and in any process."""

    classes: list[str]
    targets: list[int]

    def __len__(self) -> int: ...

    def load(self, index: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
        """The image in RGB; raises BadImage."""
        ...

    def name(self, index: int) -> str:
        """What to call the image in messages and files; no two images share a name, and it never changes."""
        ...


class FolderSource:
    """One folder per class, the first level below ``root``; folders in it belong to the class.

    ``data.folders.listed`` says what is left out. Classes and images are in natural order, equal ones ('1' and '01') in
    that of their names, so that the order is the same on every machine. Two folders whose names differ in their Unicode
    form alone are one class.

    Attributes:
        notes: Lines about what is left out.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        found = listed(root, IMAGE_EXTENSIONS)
        if not found.files:
            ways = f"expected one folder per class with files ending in {' '.join(IMAGE_EXTENSIONS)}"
            raise UserError(f"no images in {root}: {ways}{'; ' * bool(found.others)}{passed_over(found.others)}")
        loose = next((name for name in sorted(found.files) if os.sep not in name), None)
        if loose and "\\" in loose:
            raise UserError(
                f"{printable(str(root))}: names of files hold backslashes ({printable(loose)}), as unpacked from an "
                "archive of Windows: unpack it again with a program that makes folders of them (7z, bsdtar)"
            )
        if loose and not found.entered:
            raise UserError(
                f"{printable(str(root))} holds images and no class folders: give the folder above if this is one class "
                "of several, or sort the images into a folder per class (labels in CSV files are not read)"
            )
        if loose:
            raise UserError(
                f"{root / loose} lies in no class folder: move or remove the images directly in {printable(str(root))}"
            )
        self.names = sorted(found.files, key=in_order)
        self.classes, self.targets = numbered([name.split(os.sep, 1)[0] for name in self.names])
        _refuse_copies(root, self.names)
        self._refuse_masks()
        self.notes = found.lines(root) + _alike(root, self.names)

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
        return decode(self.file(index), max_pixels=max_pixels)

    def file(self, index: int) -> str:
        """The path of an image."""
        return os.path.join(self.root, self.names[index])

    def name(self, index: int) -> str:
        return self.names[index]

    def _refuse_masks(self) -> None:
        """Refuses masks among the images of a class: ``x_mask.png`` and ``x_mask_1.png`` beside ``x.png``."""
        marks = [(name, mark.start()) for name in self.names if (mark := MASK.search(name))]
        stems = {os.path.splitext(name)[0] for name in self.names} if marks else set()
        masks: dict[str, list[str]] = {}
        for name, end in marks:
            if name[:end] in stems:
                masks.setdefault(name.split(os.sep)[0], []).append(name)
        sizes = Counter(name.split(os.sep)[0] for name in self.names) if masks else {}
        for folder, found in masks.items():
            if len(found) * 5 >= sizes[folder] and _few_colours(os.path.join(self.root, found[0])):
                what = f"{self.root / folder} holds masks beside its images ({found[0].partition(os.sep)[2]} and so on)"
                raise UserError(printable(f"{what}: move the masks elsewhere"))


def _few_colours(file: str) -> bool:
    try:
        return decode(file).getcolors(256) is not None
    except BadImage:
        return True


def _refuse_copies(root: Path, names: Sequence[str]) -> None:
    """Refuses a class folder that holds folders called as the other classes, as a copy of the whole set does."""
    inside: dict[str, set[str]] = {}
    for name in names:
        first, *rest = name.split(os.sep, 2)
        inside.setdefault(first, set()).update(rest[:-1])
    single = {name for name, below in inside.items() if not below & inside.keys()}  # all may hold the same folders
    for name, below in inside.items():
        if len(others := sorted((below & single) - {name})) > 1:
            what = f"{root / name} holds folders that are called as other classes ({some(others)})"
            raise UserError(printable(f"{what}: remove it if it is a copy of them, or move it out of {root}"))


def _alike(root: Path, names: Sequence[str]) -> list[str]:
    """The line about class folders that all hold much the same folders: these may be the classes."""
    inside: dict[str, set[tuple[str, ...]]] = {}
    for name in names:
        first, *rest = name.split(os.sep)
        if len(rest) < 2:
            return []
        inside.setdefault(first, set()).add(tuple(rest[:-1]))
    levels = [[{*level} for level in zip(*folders, strict=False)] for folders in inside.values()]
    found = [next((level for level in of_class if len(level) > 1), set()) for of_class in levels]  # below single ones
    same = set.intersection(*found)
    if len(found) < 2 or len(same) < 2 or 2 * len(same) < len(set.union(*found)):
        return []
    what = f"all class folders hold {some(sorted(same), 4)}, and the first folder names the class"
    return [printable(f"{root}: {what}: if these are the classes, put them at the top")]


def numbered(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """Classes in natural order, and the number of each image's, from the names of the images' classes."""
    spelled: dict[str, str] = {}
    for name in sorted(set(names), key=in_order):
        spelled.setdefault(one_form(name), name)
    classes = list(spelled.values())
    numbers = {form: number for number, form in enumerate(spelled)}
    known = {name: numbers[one_form(name)] for name in set(names)}
    return classes, [known[name] for name in names]


class HfdsSource:
    """A split of a Hugging Face dataset with the columns ``image`` and ``label``, read with timm's reader.

    The images are in the dataset's order. Classes are the label's names in the order of the dataset, or its values.

    Args:
        root: A folder that the `datasets` library can read (class folders, parquet files), or a dataset's name on the
            hub.
        split: One of ``hfds_splits(root)``.

    Raises:
        UserError: The library is missing, or cannot read the dataset; no such columns, no images, images without class.
    """

    def __init__(self, root: Path, split: str) -> None:
        library = _datasets()
        import pyarrow
        from huggingface_hub.constants import HF_HUB_CACHE
        from timm.data.readers.reader_hfds import ReaderHfds

        self.root, self.split = root, split
        # where files of its rows may lie: in its folder, where the library unpacks archives, in the hub's cache
        known = (root if root.exists() else HF_HUB_CACHE, library.config.DOWNLOADED_DATASETS_PATH)
        self._folders = tuple(os.path.join(os.path.abspath(folder), "") for folder in known)
        try:
            self.reader = ReaderHfds(name=str(root), split=split)
            images = self.reader.dataset.data.column("image")
            if images.null_count == len(images):  # the library makes up a column that is asked for and not there
                raise ValueError(f"no images in the split {split!r}")
            # timm's own ways to names and labels go through the rows one by one, images and all
            self._paths = pyarrow.chunked_array([chunk.field("path") for chunk in images.chunks], pyarrow.string())
            labels = self.reader.dataset.data.column("label").to_pylist()
        except Exception as error:  # of many kinds: the library's, pyarrow's, pandas', the hub's
            raise _unreadable(root, error, "it must have the columns image and label") from None
        # -1 marks the test images whose classes are kept secret
        if not all(isinstance(label, str) or (isinstance(label, int) and label >= 0) for label in labels):
            raise UserError(f"the split {split!r} of {root} has images without a class: label must be a number or name")
        named = list(self.reader.class_to_idx)
        values = range(len(named)) if named else sorted(set(labels), key=lambda value: (natural_key(str(value)), value))
        self.numbered = not named and all(isinstance(label, int) for label in values)
        self.classes = named or [str(value) for value in values]
        numbers = {value: number for number, value in enumerate(values)}
        self.targets = [numbers[label] for label in labels]

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
        image = self.reader.dataset[index][self.reader.image_key] or {}
        name = f"{self.name(index)} of {self.root}"
        content = image.get("bytes") or b""
        if not content and (path := image.get("path")):
            content = os.path.abspath(os.path.join(self.root, path))
            if not content.startswith(self._folders):
                raise BadImage(name, "its file lies outside of the dataset's folder")
        return decode(content, name=name, max_pixels=max_pixels)

    def name(self, index: int) -> str:
        """The image's number in the split, and the name of its file where the dataset has one."""
        return f"{self.split}/{index:08d}-{os.path.basename(self._paths[index].as_py() or 'image')}"


def hfds_splits(root: Path) -> list[str]:
    """The splits of a Hugging Face dataset.

    Raises:
        UserError: The library is missing, or knows no such dataset.
    """
    datasets = _datasets()
    try:
        return list(datasets.get_dataset_split_names(str(root)))
    except Exception as error:
        raise _unreadable(root, error, "give a folder, or a name on the hub, with --data") from None


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError("Hugging Face datasets need another package: pip install datasets") from None
    return datasets


def _unreadable(root: Path, error: Exception, advice: str) -> UserError:
    return UserError(f"cannot read {root} as a Hugging Face dataset ({one_line(error)}): {advice}")


class DigitsSource:
    """1,797 scans of handwritten digits, 8 x 8 pixels, in ``digits.npz`` beside this file (and its licence)."""

    def __init__(self) -> None:
        with np.load(Path(__file__).with_name("digits.npz")) as digits:
            self.images = np.round(digits["images"] * (255 / 16)).astype(np.uint8)
            self.targets: list[int] = digits["targets"].tolist()
        self.classes = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
        return Image.fromarray(self.images[index]).convert("RGB")

    def name(self, index: int) -> str:
        """The scan's number in the set, and its digit."""
        return f"digit-{index:04d}-is-{self.targets[index]}.png"


class SubsetSource:
    """Some images of another source."""

    def __init__(self, source: ImageSource, indices: Sequence[int] | np.ndarray) -> None:
        self.source, self.indices = source, np.asarray(indices, np.int64)
        self.classes, self.notes = source.classes, notes(source)
        self.targets = [source.targets[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
        return self.source.load(int(self.indices[index]), max_pixels)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def file(self, index: int) -> str | None:
        """The path of an image, where the other source has files."""
        own = getattr(self.source, "file", None)
        return own(int(self.indices[index])) if own else None
