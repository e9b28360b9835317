"""The models that the page offers, and what one makes of a picture."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from conv2former import checkpoints
from conv2former.engine.devices import pick_device
from conv2former.errors import UserError
from conv2former.tasks import load
from conv2former.tasks.base import Line, Task, Words
from conv2former.tasks.classification.task import ClassificationTask
from conv2former.tools.explain.maps import map_panels
from conv2former.tools.explain.opening import Explained, Place, choose_blocks
from conv2former.tools.naming import built_untrained, read_name

KEPT = 3  # models in memory at a time: two to compare, and the one before

Panels = list[tuple[str, list[tuple[str, np.ndarray]]]]


@dataclass(frozen=True)
class Look:
    """What a model makes of a picture.

    Attributes:
        words: Of the model's task.
        picture: With boxes and masks, or classes in colour; of a classifier the image itself.
        lines: What was found, the most important first.
        milliseconds: In the network.
        maps: A name for each block, and its maps with their titles; none where they were not asked for.
        no_maps: Why this model has none.
    """

    words: Words
    picture: Image.Image
    lines: list[Line]
    milliseconds: float
    maps: Panels
    no_maps: str = ""


@dataclass
class Model:
    """A model in memory.

    Attributes:
        name: As the page calls it.
        task: The model.
        note: What to know of its answers.
        explained: Shows its maps.
        places: The blocks that are shown, the last of each stage.
        no_maps: Why there are none.
        warm: Whether it has seen an image; the first takes longer.
    """

    name: str
    task: Task
    note: str
    explained: Explained
    places: list[Place] = field(default_factory=list)
    no_maps: str = ""
    warm: bool = False

    def look(self, image: Image.Image, *, maps: bool) -> Look:
        """The model's prediction on an image, the time of the network alone, and its maps where asked for."""
        prepared = self.task.preprocess(image)
        if not self.warm:
            self.task.predict([prepared])
            self.warm = True
        with _Stopwatch(self.task.model) as watch:
            (found,) = self.task.predict([prepared])
        # as large as the image: a legend below it would be too small to read, and the lines have the colours
        drawn = image if found.plain else found.draw(image).crop((0, 0, *image.size))
        panels: Panels = []
        if maps and self.places:
            # without the first panel of each row, the image
            panels = [(name, row[1:]) for name, row in map_panels(self.explained, image, self.places, channels=1)]
        words, no_maps = self.task.words, self.no_maps if maps else ""
        return Look(words, drawn, found.lines, watch.seconds * 1000, panels, no_maps)


class _Stopwatch:
    """Adds up the time of a network's forward passes, of which sliding windows need several."""

    def __init__(self, network: Any) -> None:
        self.network, self.seconds = network, 0.0

    def __enter__(self) -> _Stopwatch:
        self.handles = [
            self.network.register_forward_pre_hook(self._start),
            self.network.register_forward_hook(self._stop),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _now(self) -> float:
        if next(self.network.parameters()).is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _start(self, *call: Any) -> None:
        self.started = self._now()

    def _stop(self, *call: Any) -> None:
        self.seconds += self._now() - self.started


class Models:
    """The models that may be chosen, and the last few of them in memory.

    Attributes:
        names: What may be chosen, in order.

    Args:
        sources: Run folders, saved models, folders of these, and timm's models (``NAME:key=value,...``).
        device: 'auto', 'cpu', 'cuda', ...

    Raises:
        UserError: One of them cannot be used.
    """

    def __init__(self, sources: Sequence[str], *, device: str = "auto") -> None:
        self.device = device
        self._sources = _named([found for source in sources for found in _expanded(source)])
        self.names = list(self._sources)
        self._open: OrderedDict[str, Model] = OrderedDict()

    def get(self, name: str) -> Model:
        """A model by its name, read where it is not in memory; the one unused for longest makes room.

        Raises:
            UserError: No such model, or one that cannot be used.
        """
        if name not in self._sources:
            raise UserError("that model is not offered here: choose one of the list")
        if name not in self._open:
            while len(self._open) >= KEPT:
                self._open.popitem(last=False)
            self._open[name] = _opened(name, self._sources[name], self.device)
        self._open.move_to_end(name)
        return self._open[name]


def _opened(name: str, source: Path | str, device: str) -> Model:
    note = ""
    if isinstance(source, Path):
        task = load(source)
    else:
        model_name, args = cast(tuple[str, dict[str, Any]], read_name(source))
        task = ClassificationTask.of(built_untrained(source, model_name, args), name=source)
        note = "" if args.get("pretrained") else "random weights: it has learned nothing"
    task.to(pick_device(device))
    # by its name on the page: where it lies is nobody's business there
    explained = Explained(name, task)
    model = Model(name, task, note, explained)
    try:
        model.places = choose_blocks(explained, None, None)
    except UserError:
        model.no_maps = f"No modulation maps: {type(task.backbone).__name__} has no modulation, Conv2Former has."
    return model


def _expanded(source: str) -> list[Path | str]:
    """The models that a word of the user's means; raises UserError."""
    path = read_name(source)
    if not isinstance(path, Path):
        return [source]
    try:
        checkpoints.saved_task(path)
        return [path]
    except UserError:
        inside = [child for child in _folders(path) if _is_model(child)]
        if not inside:
            raise
        return list(inside)


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    try:
        return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    except OSError:
        return []


def _is_model(path: Path) -> bool:
    try:
        return bool(checkpoints.saved_task(path))
    except UserError:
        return False


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
