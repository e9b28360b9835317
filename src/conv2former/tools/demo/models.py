"""The models that the page offers, and what one makes of an image."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from conv2former import checkpoints
from conv2former.checkpoints.exported import is_exported
from conv2former.data.rle import decode_mask
from conv2former.engine.devices import pick_device
from conv2former.errors import UserError
from conv2former.tasks.base import Line, Task, Words
from conv2former.tools.demo.about import about, readable
from conv2former.tools.demo.agreement import Kind, kind_of
from conv2former.tools.demo.options import Options
from conv2former.tools.explain.cams import ActivationMaps
from conv2former.tools.explain.maps import map_panels
from conv2former.tools.explain.opening import Block, Explained, choose_blocks
from conv2former.tools.explain.sheets import over
from conv2former.tools.naming import open_task, read_name
from conv2former.viz import drawing

KEPT = 3  # models in memory at a time: two to compare, and the one before
FOUND = 16  # answers of a model that are kept, so that drawing them anew does not need the network
LARGE = 1024  # longest side of an image on the page

Panels = list[tuple[str, list[tuple[str, np.ndarray]]]]


@dataclass(frozen=True)
class Found:
    """What the network says of an image."""

    fields: dict[str, Any]  # for the JSON file
    lines: list[Line]  # the most important first
    drawn: Image.Image | None  # by the task, where it has no layers
    milliseconds: float
    maps: dict[str, Any] = field(default_factory=dict)  # those that were asked for already


@dataclass(frozen=True)
class Look:
    """What a model makes of an image."""

    words: Words  # of the model's task
    kind: Kind | None  # what its agreement with another model is counted in
    image: Image.Image  # with boxes and masks, or classes in colour; of a classifier the image itself
    fields: dict[str, Any]  # for the JSON file
    lines: list[Line]  # what was found, the most important first
    milliseconds: float  # in the network
    maps: Panels  # a name for each block, and its maps with their titles; none where they were not asked for
    no_maps: str = ""  # why this model has none
    cam: tuple[str, np.ndarray] | None = None  # class activation: a sentence and the map, where it was asked for
    no_cam: str = ""  # why there is none


class Model:
    """A model in memory, with what is known ``about`` it; maps are shown of ``blocks``, the last of each stage."""

    def __init__(self, name: str, source: Path | str, device: str) -> None:
        named = source if isinstance(source, Path) else read_name(source)
        self.source = source
        self.task, random = open_task(named, str(source))
        self.task.to(pick_device(device))
        self.about = about(self.task, source, random=random)
        self.warm = False  # it has seen no image; the first takes longer
        self._found: OrderedDict[Any, Found] = OrderedDict()
        # called by its name on the page, which must not show paths of the server
        self.explained = Explained(name, self.task)
        self.blocks: list[Block] = []
        self.no_maps = ""
        try:
            self.blocks = choose_blocks(self.explained, None, None)
        except UserError:
            network = type(self.task.backbone).__name__
            self.no_maps = f"No modulation maps: {network} has no modulation, Conv2Former has."

    def look(self, image: Image.Image, options: Options) -> Look:
        """The model's prediction on an image, the time of the network alone, and its maps where asked for."""
        found = self._predicted(image, options)
        drawn = found.drawn or image
        if self.task.layers:
            drawn = layered(image, found.lines, options)
        if options.maps and "modulation" not in found.maps:
            rows = map_panels(self.explained, image, self.blocks, channels=1) if self.blocks else []
            found.maps["modulation"] = [(name, row[1:]) for name, row in rows]  # the first panel is the image
        if options.cam and "cam" not in found.maps:
            found.maps["cam"] = self._activation(image)
        panels: Panels = found.maps["modulation"] if options.maps else []
        cam, no_cam = found.maps["cam"] if options.cam else (None, "")
        return Look(
            *(self.task.words, kind_of(self.task), drawn, found.fields, found.lines, found.milliseconds),
            *(panels, self.no_maps if options.maps else "", cam, no_cam),
        )

    def _predicted(self, image: Image.Image, options: Options) -> Found:
        """From memory where the network has seen the image with these options."""
        own = options.of(self.task)
        key = hashlib.sha256(image.tobytes()).digest(), image.size, tuple(own.values())
        if key not in self._found:
            for name, value in own.items():
                setattr(self.task, name, value)
            prepared = self.task.preprocess(image)
            if not self.warm:
                self.task.predict([prepared])
                self.warm = True
            with _timed(self.task) as seconds:
                (found,) = self.task.predict([prepared])
            drawn = None
            if not found.plain and not self.task.layers:
                # as large as the image: a legend below it would be too small to read, and the lines have the colours
                drawn = found.draw(image).crop((0, 0, *image.size))
                drawn.thumbnail((LARGE, LARGE))
            while len(self._found) >= FOUND:
                self._found.popitem(last=False)
            self._found[key] = Found(found.fields, found.lines, drawn, seconds[0] * 1000)
        self._found.move_to_end(key)
        return self._found[key]

    def _activation(self, image: Image.Image) -> tuple[tuple[str, np.ndarray] | None, str]:
        """The class activation map of the last stage with a sentence, or why there is none."""
        try:
            view, values, index, _ = ActivationMaps(self.explained, method=None, target=None, stage=None).compute(image)
        except UserError as error:
            return None, f"No class activation: {error}."
        finally:
            self.task.zero_grad(set_to_none=True)  # the gradients of the weights, which nobody needs
        words = "Red is where the last stage responds most, whatever the class."
        if index is not None:
            words = f"Red is where the image speaks most for the class {readable(self.task.classes[index])}."
        return (words, over(view, values)), ""


def layered(image: Image.Image, lines: Sequence[Line], options: Options) -> Image.Image:
    """What was found, drawn on the image as large as the page shows it; the most certain lies on top."""
    sheet = image.copy()
    sheet.thumbnail((LARGE, LARGE))
    scale = sheet.width / image.width
    boxes = [None if line.box is None else [scale * value for value in line.box] for line in lines]
    pixels = np.array(sheet)
    for line in reversed(lines) if "masks" in options.layers else ():
        if line.mask is not None and line.colour is not None:
            mask = Image.fromarray(decode_mask(line.mask)).resize(sheet.size, Image.Resampling.NEAREST)
            drawing.tint(
                *(pixels, np.asarray(mask) > 0, line.colour),
                strength=options.opacity,
                outlined=line.box is not None,  # by which neighbours of one class are told apart
            )
    sheet = Image.fromarray(pixels)
    for line, box in zip(reversed(lines), reversed(boxes), strict=True):
        if box is not None and line.colour is not None:
            if "boxes" in options.layers:
                drawing.frame(sheet, box, line.colour)
            if "labels" in options.layers:
                drawing.label(sheet, box, f"{readable(line.label)} {line.value:.0%}", line.colour)
    return sheet


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
    if is_exported(path):
        return [path]
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
