"""The models that the page offers, and what one makes of an image."""

from __future__ import annotations

import contextlib
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from conv2former import checkpoints
from conv2former.engine.devices import pick_device
from conv2former.errors import UserError
from conv2former.tasks.base import Line, Task, Words
from conv2former.tools.explain.maps import map_panels
from conv2former.tools.explain.opening import Block, Explained, choose_blocks
from conv2former.tools.naming import open_task, read_name

KEPT = 3  # models in memory at a time: two to compare, and the one before

Panels = list[tuple[str, list[tuple[str, np.ndarray]]]]


@dataclass(frozen=True)
class Look:
    """What a model makes of an image."""

    words: Words  # of the model's task
    image: Image.Image  # with boxes and masks, or classes in colour; of a classifier the image itself
    lines: list[Line]  # what was found, the most important first
    milliseconds: float  # in the network
    maps: Panels  # a name for each block, and its maps with their titles; none where they were not asked for
    no_maps: str = ""  # why this model has none


class Model:
    """A model in memory, with a note on its answers; maps are shown of ``blocks``, the last of each stage."""

    def __init__(self, name: str, source: Path | str, device: str) -> None:
        named = source if isinstance(source, Path) else read_name(source)
        self.task, random = open_task(named, str(source))
        self.task.to(pick_device(device))
        self.note = "random weights: it has learned nothing" if random else ""
        self.warm = False  # it has seen no image; the first takes longer
        # called by its name on the page, which must not show paths of the server
        self.explained = Explained(name, self.task)
        self.blocks: list[Block] = []
        self.no_maps = ""
        try:
            self.blocks = choose_blocks(self.explained, None, None)
        except UserError:
            network = type(self.task.backbone).__name__
            self.no_maps = f"No modulation maps: {network} has no modulation, Conv2Former has."

    def look(self, image: Image.Image, *, maps: bool) -> Look:
        """The model's prediction on an image, the time of the network alone, and its maps where asked for."""
        prepared = self.task.preprocess(image)
        if not self.warm:
            self.task.predict([prepared])
            self.warm = True
        with _timed(self.task) as seconds:
            (found,) = self.task.predict([prepared])
        # as large as the image: a legend below it would be too small to read, and the lines have the colours
        drawn = image if found.plain else found.draw(image).crop((0, 0, *image.size))
        panels: Panels = []
        if maps and self.blocks:
            # without the first panel of each row, the image
            panels = [(name, row[1:]) for name, row in map_panels(self.explained, image, self.blocks, channels=1)]
        return Look(self.task.words, drawn, found.lines, seconds[0] * 1000, panels, self.no_maps if maps else "")


@contextlib.contextmanager
def _timed(task: Task) -> Iterator[list[float]]:
    """Adds up the seconds of a network's forward passes, of which sliding windows need several; a list of one sum."""
    total = [0.0]

    def add(sign: int) -> None:
        if task.normalizer.mean.is_cuda:
            torch.cuda.synchronize()
        total[0] += sign * time.perf_counter()

    start = task.model.register_forward_pre_hook(lambda *call: add(-1))
    with start, task.model.register_forward_hook(lambda *call: add(1)):
        yield total


class Models:
    """The models that may be chosen, ``names``, and the last few of them in memory; raises UserError.

    ``sources`` are run folders, saved models, folders of these, and timm's models (``NAME:key=value,...``).
    """

    def __init__(self, sources: Sequence[str], *, device: str = "auto") -> None:
        self.device = device
        self._sources = _named([found for source in sources for found in _expanded(source)])
        self.names = list(self._sources)
        self._open: OrderedDict[str, Model] = OrderedDict()

    def get(self, name: str) -> Model:
        """A model by its name, read if it is not in memory: the one unused for longest makes room. Raises UserError."""
        if name not in self._sources:
            raise UserError("that model is not offered here: choose one of the list")
        if name not in self._open:
            while len(self._open) >= KEPT:
                self._open.popitem(last=False)
            self._open[name] = Model(name, self._sources[name], self.device)
        self._open.move_to_end(name)
        return self._open[name]


def _expanded(source: str) -> list[Path | str]:
    """The models that a word of the user's means; raises UserError."""
    path = read_name(source)
    if not isinstance(path, Path):
        return [source]
    try:
        checkpoints.saved_task(path)
        return [path]
    except UserError:
        inside: list[Path | str] = []
        with contextlib.suppress(OSError):  # no folder, or one that cannot be read
            for child in sorted(path.iterdir()):
                with contextlib.suppress(UserError):
                    if child.is_dir() and not child.name.startswith(".") and checkpoints.saved_task(child):
                        inside.append(child)
        if not inside:
            raise
        return inside


def _named(sources: Sequence[Path | str]) -> dict[str, Path | str]:
    """Short names that tell the sources apart: the folder's, with those above it where several are called alike."""
    found: dict[str, Path | str] = {}
    for source in dict.fromkeys(Path(os.path.abspath(s)) if isinstance(s, Path) else s for s in sources):
        if not isinstance(source, Path):
            found[source] = source
            continue
        parts = [part for part in source.parts if part != source.anchor]
        least = 2 if source.name in ("best", "last") or source.is_file() else 1  # such a name alone says nothing
        names = ["/".join(parts[-count:]) for count in range(least, len(parts) + 1)]
        found[next((name for name in names if name not in found), str(source))] = source
    return found
