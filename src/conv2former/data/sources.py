"""Where labelled images lie: class folders, scikit-learn's digits, and parts of either."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key

from conv2former.data.images import IMAGE_EXTENSIONS, decode
from conv2former.errors import UserError


class ImageSource(Protocol):
    """A set of labelled images."""

    classes: list[str]
    targets: list[int]

    def __len__(self) -> int: ...

    def load(self, index: int) -> Image.Image:
        """The image in RGB; raises BadImage."""
        ...

    def name(self, index: int) -> str:
        """What to call the image in messages and files."""
        ...


class FolderSource:
    """One folder per class, read with timm's folder reader (nested folders: the innermost names the class).

    Hidden files and folders are passed over. Classes and images are in natural order, equal ones ('1' and '01') in that
    of their names, so that the order is the same on every machine.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        none = f"no images in {root}: expected one folder per class with files ending in {' '.join(IMAGE_EXTENSIONS)}"
        try:
            self.reader = ReaderImageFolder(str(root), input_key=";".join(IMAGE_EXTENSIONS))
        except RuntimeError:
            raise UserError(none) from None
        names = {index: name for name, index in self.reader.class_to_idx.items()}
        samples = [(path, names[index]) for path, index in self.reader.samples if not self._hidden(path)]
        if not samples:
            raise UserError(none)
        loose = [path for path, name in samples if not name]
        if loose:
            raise UserError(f"{loose[0]} lies in no class folder: move or remove the images directly in {root}")
        samples.sort(key=lambda sample: (natural_key(sample[0]), sample[0]))
        self.classes = sorted({name for _, name in samples}, key=lambda name: (natural_key(name), name))
        self.targets = [self.classes.index(name) for _, name in samples]
        self.reader.samples = list(zip((path for path, _ in samples), self.targets, strict=True))

    def __len__(self) -> int:
        return len(self.targets)

    def _hidden(self, path: str) -> bool:
        return any(part.startswith(".") for part in Path(path).relative_to(self.root).parts)

    def load(self, index: int) -> Image.Image:
        """The image in RGB; raises BadImage."""
        return decode(self.reader.filename(index, absolute=True))

    def name(self, index: int) -> str:
        """The path below the folder's root."""
        return self.reader.filename(index)


class DigitsSource:
    """scikit-learn's handwritten digits: 1,797 scans of 8x8 pixels, inside its wheel."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.images = np.round(digits.images * (255 / 16)).astype(np.uint8)
        self.targets = [int(target) for target in digits.target]
        self.classes = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int) -> Image.Image:
        """The scan in RGB, 8x8."""
        return Image.fromarray(self.images[index]).convert("RGB")

    def name(self, index: int) -> str:
        """The scan's number in the set, and its digit."""
        return f"digit-{index:04d}-is-{self.targets[index]}.png"


class SubsetSource:
    """Some images of another source."""

    def __init__(self, source: ImageSource, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices
        self.classes = source.classes
        self.targets = [source.targets[i] for i in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> Image.Image:
        """The image in RGB; raises BadImage."""
        return self.source.load(self.indices[index])

    def name(self, index: int) -> str:
        """The image's name in the other source."""
        return self.source.name(self.indices[index])
