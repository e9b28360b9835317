"""The colours of classes: those of their data set where it has its own, black for what is background."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from conv2former.viz.drawing import RGB, colour

ALIKE = 0.9  # the part of the classes that a data set must know


@cache
def _palettes() -> dict[str, dict[str, str]]:
    """Names of data sets to names of their classes to colours in hexadecimal digits."""
    return json.loads((files(__package__) / "palettes.json").read_text())


def class_colours(classes: Sequence[str]) -> list[RGB]:
    """Red, green and blue of each class, 0 to 255."""
    own: dict[str, str] = {"background": "000000"}
    for palette in _palettes().values():
        shared = sum(name in palette for name in classes)
        if shared >= ALIKE * max(len(classes), len(palette)):
            own |= palette
    found = [own.get(name if name in own else name.lower()) for name in classes]
    return [colour(index) if known is None else _parsed(known) for index, known in enumerate(found)]


def _parsed(digits: str) -> RGB:
    red, green, blue = bytes.fromhex(digits)
    return red, green, blue
