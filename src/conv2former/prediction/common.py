"""Prediction on picture files: one JSON object per input, an annotated picture each if asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch.utils.data import DataLoader, Dataset

from conv2former.data.images import BadImage, decode, find_images
from conv2former.errors import UserError

ANNOTATED = ".predicted.png"


@dataclass(frozen=True)
class Finding:
    """What a model makes of one picture.

    Attributes:
        fields: For the JSON line.
        draw: Turns the picture into an annotated one.
    """

    fields: dict[str, Any]
    draw: Callable[[Image.Image], Image.Image]


class Predictor(Protocol):
    """A trained model that looks at pictures.

    Attributes:
        most_at_once: Pictures of a batch.
    """

    most_at_once: int

    def prepare(self, image: Image.Image) -> Any:
        """What goes into a batch, made by the processes that read."""
        ...

    def find(self, batch: Sequence[Any]) -> list[Finding]:
        """One finding for each prepared picture."""
        ...


class _Files(Dataset):
    def __init__(self, files: list[Path], prepare: Callable[[Image.Image], Any]) -> None:
        self.files, self.prepare = files, prepare

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.prepare(decode(self.files[index]))
        except BadImage as error:
            return error


def findings(
    predictor: Predictor, inputs: Sequence[Path], *, batch_size: int, workers: int
) -> Iterator[tuple[Path, Finding | BadImage]]:
    """Every picture file in the inputs, in order, with what was found on it or why it cannot be read.

    Raises:
        UserError: There is no picture in the inputs.
    """
    files = find_images(inputs)
    if not files:
        raise UserError(f"no images in {', '.join(map(str, inputs))}")
    dataset = _Files(files, predictor.prepare)
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=list)
    remaining = iter(files)
    for samples in loader:
        good = [sample for sample in samples if not isinstance(sample, BadImage)]
        found = iter(predictor.find(good) if good else [])
        for sample in samples:
            yield next(remaining), sample if isinstance(sample, BadImage) else next(found)


def row(file: Path, found: Finding | BadImage) -> dict[str, Any]:
    """The JSON line of a file."""
    if isinstance(found, BadImage):
        return dict(file=str(file), ok=False, error=found.reason)
    return dict(file=str(file), ok=True) | found.fields


def write_findings(pairs: Iterator[tuple[Path, Finding | BadImage]], *, out: Path | None) -> int:
    """Prints JSON lines, draws into ``out``; returns the exit status, 1 if a file failed.

    Raises:
        UserError: The pictures cannot be written.
    """
    total = failed = 0
    taken: set[str] = set()
    for file, found in pairs:
        total += 1
        failed += isinstance(found, BadImage)
        print(json.dumps(row(file, found)), flush=True)  # ASCII: file names may hold bytes that no terminal has
        if out and isinstance(found, Finding):
            _write(found.draw(decode(file)), _make(out) / free_name(file.stem, ANNOTATED, taken))
    if failed:
        print(f"{failed} of {total} files could not be read", file=sys.stderr)
    return 1 if failed else 0


def _make(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the output folder {folder}: {error.strerror}") from None
    return folder


def _write(picture: Image.Image, path: Path) -> None:
    try:
        picture.save(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def free_name(stem: str, ending: str, taken: set[str]) -> str:
    """A name for what is made of a picture file, which is ``taken`` from then on.

    It has an ending of its own, because it may go to the folder of the inputs, and a number where two folders hold
    files of one name.
    """
    name, number = f"{stem}{ending}", 2
    while name in taken:
        name, number = f"{stem}-{number}{ending}", number + 1
    taken.add(name)
    return name
