"""An exported file compared with PyTorch: on real images, in the file's own runtime."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from conv2former.checkpoints.exported import Runtime
from conv2former.data.images import decode, given_images
from conv2former.data.sources import spread
from conv2former.engine.evaluate import validation_set
from conv2former.engine.run_dir import RunDir
from conv2former.errors import UserError
from conv2former.tasks.classification.sources import ImageSource
from conv2former.tasks.exportable import OneImage
from conv2former.tools.export.subjects import Subject

PASSES, LONGEST = 20, 2.0  # of one image when it is timed; seconds after which no other pass begins
BATCH = 4  # other than the exporter's example, so that a batch that is no constant shows


@dataclass(frozen=True)
class Comparison:
    """A runtime's outputs compared with PyTorch's. The names of the fields are keys of ``--json``."""

    pictures: int  # how many images
    # the largest of any output, as a fraction of that output's largest value in PyTorch; infinite where shapes differ
    # or one of the two gives no finite number
    difference: float
    # fraction of images (of pixels, for a segmentation model) whose top class is the same; of a detector's objects the
    # fraction that both find; None for features, and where nothing is found
    agreement: float | None


def images_in(paths: Sequence[Path], count: int, subject: Subject) -> list[np.ndarray]:
    """Some of the images in files and folders as the network takes them; raises UserError where there are none."""
    files = given_images(paths)
    return [subject.prepare(decode(files[index])) for index in spread(len(files), count)]


def validated_on(run: RunDir, count: int, subject: Subject) -> list[np.ndarray]:
    """Some of the images that a run was validated on, as the network takes them; raises UserError."""
    try:
        source: Any = validation_set(run).val
    except UserError as error:
        reason = str(error).partition(":")[0]
        raise UserError(f"{reason}: name images to compare on with --images (files or folders)") from None
    found = [source.load(index) for index in spread(len(source), count)]
    # those of a detector or segmentation model come with what is on them
    return [subject.prepare(item[0] if isinstance(item, tuple) else item) for item in found]


def compare(runtime: Runtime, subject: Subject, images: Sequence[np.ndarray]) -> Comparison:
    """Runs both over the images in batches, over the first image alone, and over another size if the size is free."""
    if subject.part.one:
        return _one_by_one(runtime, subject.part.one, images)
    count = len(subject.part.outputs)
    largest, scale = np.zeros(count), np.zeros(count)
    same = total = 0
    first = np.stack(images[:1])
    extra = [first, np.concatenate([first, first])]
    if subject.dynamic_size:
        extra.append(np.pad(first, [(0, 0), (0, 0), (0, 32), (0, 64)], mode="reflect"))
    batches = [np.stack(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
    for number, batch in enumerate([*batches, *extra]):
        ours, theirs = subject.reference(batch), runtime(batch)
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            if one.shape != other.shape or not (np.isfinite(one).all() and np.isfinite(other).all()):
                return Comparison(len(images), float("inf"), None)
            largest[i] = max(largest[i], np.abs(one - other).max())
            scale[i] = max(scale[i], np.abs(one).max())
        if subject.part.outputs == ["logits"] and number < len(batches):
            equal = ours[0].argmax(axis=1) == theirs[0].argmax(axis=1)
            same, total = same + int(equal.sum()), total + equal.size
    differences = largest / np.where(scale > 0, scale, 1)
    return Comparison(len(images), float(differences.max()), same / total if total else None)


def latency(runtime: Runtime, subject: Subject, images: Sequence[np.ndarray]) -> float:
    """Seconds that a runtime takes for one image, the median of up to ``PASSES`` passes after the first."""
    inputs = subject.part.one.feed(images[0]) if subject.part.one else (np.stack(images[:1]),)
    runtime(*inputs)
    times: list[float] = []
    while len(times) < PASSES and sum(times) < LONGEST:
        began = time.perf_counter()
        runtime(*inputs)
        times.append(time.perf_counter() - began)
    return median(times)


def _one_by_one(runtime: Runtime, one: OneImage, images: Sequence[np.ndarray]) -> Comparison:
    difference, same, total = 0.0, 0, 0
    for image in images:
        inputs = one.feed(image)
        largest, both, either = one.compare(one.reference(*inputs), runtime(*inputs))
        difference, same, total = max(difference, largest), same + both, total + either
    return Comparison(len(images), difference, same / total if total else None)


def top1(runtimes: Sequence[Runtime], subject: Subject, source: ImageSource) -> list[int]:
    """How many images each runtime gets right; raises UserError where one cannot be read."""
    correct = [0] * len(runtimes)
    for start in range(0, len(source), BATCH):
        indices = range(start, min(start + BATCH, len(source)))
        batch = np.stack([subject.prepare(source.load(index)) for index in indices])
        targets = np.array([source.targets[index] for index in indices])
        for number, runtime in enumerate(runtimes):
            correct[number] += int((runtime(batch)[0].argmax(axis=1) == targets).sum())
    return correct
