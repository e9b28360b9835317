"""An exported file against PyTorch: on real pictures, in the file's own runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conv2former.data.images import BadImage, decode, find_images
from conv2former.engine.evaluate import validation_set
from conv2former.engine.run_dir import RunDir
from conv2former.errors import UserError
from conv2former.tasks.classification.sources import ImageSource
from conv2former.tools.export.formats import Runtime
from conv2former.tools.export.subjects import Subject

BATCH = 4  # other than the exporter's example, so that a batch that is no constant shows


@dataclass(frozen=True)
class Comparison:
    """What a runtime makes of pictures beside PyTorch.

    Attributes:
        pictures: How many.
        difference: The largest of any output, as a share of that output's largest value in PyTorch; infinite where
            shapes differ or one of the two gives no finite number.
        agreement: Share of pictures (of pixels, for a segmenter) whose top class is the same; None for features.
    """

    pictures: int
    difference: float
    agreement: float | None


def _spread(total: int, count: int) -> list[int]:
    """As many numbers, evenly spaced over all."""
    count = min(count, total)
    return [index * total // count for index in range(count)]


def read(files: Sequence[Path], subject: Subject) -> list[np.ndarray]:
    """The pictures as the network takes them.

    Raises:
        UserError: One cannot be read.
    """
    try:
        return [subject.prepare(decode(file)) for file in files]
    except BadImage as error:
        raise UserError(str(error)) from None


def pictures_in(paths: Sequence[Path], count: int) -> list[Path]:
    """Some of the pictures in files and folders; raises UserError where there are none."""
    files = find_images(paths)
    if not files:
        raise UserError(f"no images in {', '.join(map(str, paths))}")
    return [files[index] for index in _spread(len(files), count)]


def validated_on(run: RunDir, count: int, subject: Subject) -> list[np.ndarray]:
    """Some of the pictures that a run was validated on, as the network takes them.

    Raises:
        UserError: They are not there any more, or one cannot be read.
    """
    try:
        source: Any = validation_set(run).val
    except UserError as error:
        reason = str(error).partition(":")[0]
        raise UserError(f"{reason}: name pictures to compare on with --pictures (files or folders)") from None
    try:
        found = [source.load(index) for index in _spread(len(source), count)]
    except BadImage as error:
        raise UserError(str(error)) from None
    # those of a detector or segmenter come with what is on them
    return [subject.prepare(item[0] if isinstance(item, tuple) else item) for item in found]


def compare(
    runtime: Runtime, subject: Subject, pictures: Sequence[np.ndarray], *, dynamic_size: bool = False
) -> Comparison:
    """Runs both over the pictures, in batches and the first of them alone, and at another size where that is free."""
    count = len(subject.part.outputs)
    largest, scale = np.zeros(count), np.zeros(count)
    same = total = 0
    first = np.stack(pictures[:1])
    extra = [first, np.concatenate([first, first])]
    if dynamic_size:
        extra.append(np.pad(first, [(0, 0), (0, 0), (0, 32), (0, 64)], mode="reflect"))
    batches = list(_batches(pictures))
    for number, batch in enumerate([*batches, *extra]):
        ours, theirs = subject.reference(batch), runtime(batch)
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            if one.shape != other.shape or not (np.isfinite(one).all() and np.isfinite(other).all()):
                return Comparison(len(pictures), float("inf"), None)
            largest[i] = max(largest[i], np.abs(one - other).max())
            scale[i] = max(scale[i], np.abs(one).max())
        if subject.part.outputs == ["logits"] and number < len(batches):
            equal = ours[0].argmax(axis=1) == theirs[0].argmax(axis=1)
            same, total = same + int(equal.sum()), total + equal.size
    share = np.where(scale > 0, largest / np.where(scale > 0, scale, 1), largest)
    return Comparison(len(pictures), float(share.max()), same / total if total else None)


def _batches(pictures: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    for start in range(0, len(pictures), BATCH):
        yield np.stack(pictures[start : start + BATCH])


def top1(runtimes: Sequence[Runtime], subject: Subject, source: ImageSource) -> list[int]:
    """How many images each runtime gets right; raises UserError where one cannot be read."""
    correct = [0] * len(runtimes)
    for start in range(0, len(source), BATCH):
        indices = range(start, min(start + BATCH, len(source)))
        try:
            batch = np.stack([subject.prepare(source.load(index)) for index in indices])
        except BadImage as error:
            raise UserError(str(error)) from None
        targets = np.array([source.targets[index] for index in indices])
        for number, runtime in enumerate(runtimes):
            correct[number] += int((runtime(batch)[0].argmax(axis=1) == targets).sum())
    return correct
