"""Where images come from, as the engine knows it; each task has sources of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from timm.utils.misc import natural_key

from conv2former.errors import UserError


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


def given_folder(root: Path | None, what: str) -> Path:
    """The folder that the user has named as ``--data``; raises UserError."""
    if root is None:
        raise UserError(f"no data given: name the folder of {what} with --data DIR")
    if not root.is_dir():
        raise UserError(f"no such folder: {root}" if not root.exists() else f"not a folder: {root}")
    return root


def in_order(name: str) -> tuple[Any, str]:
    """The key to sort names by: ``img2`` before ``img10``. Classes, splits and hashes of data depend on it."""
    return natural_key(name), name
