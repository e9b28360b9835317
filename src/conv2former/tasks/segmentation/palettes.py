"""The colours of classes: those of their data set where it has its own, none for what is background."""

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


def class_colours(classes: Sequence[str]) -> list[RGB | None]:
    """Red, green and blue of each class, 0 to 255; None for the background, which stays as it is."""
    return [*_colours(tuple(classes))]


@cache  # it is asked for with every image
def _colours(classes: tuple[str, ...]) -> list[RGB | None]:
    own: dict[str, str] = {}
    for palette in _palettes().values():
        shared = sum(name in palette for name in classes)
        if shared >= ALIKE * max(len(classes), len(palette)):
            own |= palette
    return [_colour(name, own.get(name), index) for index, name in enumerate(classes)]


def _colour(name: str, digits: str | None, index: int) -> RGB | None:
    if digits is None:
        return None if name.lower() == "background" else colour(index)
    red, green, blue = bytes.fromhex(digits)
    return red, green, blue
