"""What the values of masks mean: the user's own table, and a look at a sample before anything is trained."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from conv2former.data.folders import one_form
from conv2former.data.images import IGNORED, BadImage
from conv2former.errors import UserError, say_once, some

NEAREST = "data.mask_nearest=true"
MOST_LISTED = 40  # values in a table that is proposed
MOST_EXACT = 0.5  # of the pixels hold a class's own value, where edges are soft
SEVERAL = 2  # values of soft edges
EDGE = 16  # by so much values of classes differ in masks with soft edges
NO_CLASS = "ignore"  # in a table, like null
COLOUR = re.compile(r"[(\[]?\s*(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})\s*[)\]]?|#([0-9a-fA-F]{6})")
Table = Mapping[str, str | int | None]


def canonical(raw: Any) -> Any:
    """A recipe's table with keys '255' or '255 0 0', whatever way they were written; raises ValueError."""
    if not isinstance(raw, dict):
        return raw
    table = {}
    for key, value in raw.items():
        colour = COLOUR.fullmatch(str(key).strip())
        if colour:
            parts = [int(colour[4][i : i + 2], 16) for i in (0, 2, 4)] if colour[4] else map(int, colour.groups()[:3])
            key = " ".join(map(str, parts))
        key = str(key).strip()
        if isinstance(value, bool):
            raise ValueError(f"data.mask_values: YAML reads the class of {key} as {value}: put its name in quotes")
        if key in table:
            raise ValueError(f"data.mask_values names {key} twice: give it one class")
        table[key] = value
    wrong = [key for key in table if not (key.isdecimal() and int(key) < 1 << 16) and not _is_colour(key)]
    if wrong or not table or len({" " in key for key in table}) > 1:
        raise ValueError(
            f"data.mask_values: {some(wrong) or 'the keys'} must be numbers up to 65535, or all of them colours such "
            "as '255 0 0' or '#ff0000'"
        )
    return table


def _is_colour(key: str) -> bool:
    return " " in key and all(int(part) < 256 for part in key.split())


def code(key: str) -> int:
    """A table's key as one number: the value, or red, green and blue as 24 bits."""
    red, *rest = map(int, key.split())
    return red << 16 | rest[0] << 8 | rest[1] if rest else red


def table_classes(table: Table) -> list[str]:
    """The names that a table gives, in its order, or the numbers up to its last."""
    given = [value for value in table.values() if value not in (None, NO_CLASS)]
    numbers = [value for value in given if isinstance(value, int)]
    return [str(n) for n in range(max(numbers) + 1)] if numbers else list(dict.fromkeys(map(str, given)))


class MaskValues:
    """A table for some classes.

    Args:
        table: Of a recipe.
        classes: K names.

    Attributes:
        colours: Whether the keys are colours.

    Raises:
        UserError: It names a class that there is not.
    """

    def __init__(self, table: Table, classes: Sequence[str]) -> None:
        self.colours = any(" " in key for key in table)
        places = {one_form(name): number for number, name in enumerate(classes)}
        targets = {}
        for key, value in table.items():
            number = value if isinstance(value, int) else places.get(one_form(str(value)))
            if value is None or (value == NO_CLASS and number is None):
                number = IGNORED
            elif number is None or not 0 <= number < len(classes):
                raise UserError(f"data.mask_values: {key} is {value!r}, which is none of the classes {some(classes)}")
            targets[code(key)] = number
        self.given = sorted(targets)  # 255 unless it is named is no class, but nothing is near to it
        if not self.colours:
            targets.setdefault(IGNORED, IGNORED)
        self.codes = np.array(sorted(targets), np.int64)
        self.targets = np.array([targets[value] for value in sorted(targets)], np.uint8)

    def classes_of(self, stored: np.ndarray, path: Path, *, nearest: bool, void: bool = False) -> np.ndarray:
        """Stored codes (H, W) as classes of uint8; raises BadImage.

        Args:
            stored: As ``read_labels`` gives them.
            path: For the message.
            nearest: Whether a value stands for the nearest one of the table (JPEG keeps none exactly).
            void: Whether 255 is no class even then, unless the table names it.
        """
        values, inverse = np.unique(stored, return_inverse=True)
        if nearest:
            given = np.array(self.given, np.int64)
            apart = np.abs(_channels(values)[:, None] - _channels(given)[None]).sum(axis=2)
            found = np.searchsorted(self.codes, given[apart.argmin(axis=1)])
            if void and not self.colours:
                found[values == IGNORED] = np.searchsorted(self.codes, IGNORED)
        else:
            found = np.searchsorted(self.codes, values).clip(max=len(self.codes) - 1)
            unknown = values[self.codes[found] != values]
            if len(unknown):
                # soft edges lie between values that are there, too
                soft = (
                    ""
                    if self.colours or len({*self.given} & {*values.tolist()}) < 2
                    else f", or take the nearest value: --set {NEAREST}"
                )
                raise BadImage(
                    str(path),
                    f"it holds {some([self.word(value) for value in unknown])}, which data.mask_values does not name: "
                    f"add what they mean ({NO_CLASS} for no class){soft}",
                )
        return self.targets[found][inverse.reshape(stored.shape)]

    def word(self, value: int) -> str:
        """A value as the table would write it."""
        return colour_key(value) if self.colours else str(value)


def class_values(table: Table | None, classes: Sequence[str], *, first: int = 0) -> np.ndarray:
    """What the masks of a data set hold for each class: (K,) of uint8, or (K, 3) where they are in colour.

    Without a table, or with one that has no such value for every class, they are numbers from ``first``; values beyond
    255 are of uint16.
    """
    numbers = np.arange(first, first + len(classes)).astype(np.uint8)
    if not table:
        return numbers
    known = MaskValues(table, classes)
    found = [known.codes[known.targets == index][:1] for index in range(len(classes))]
    if lacking := [name for name, codes in zip(classes, found, strict=True) if not len(codes)]:
        say_once(f"data.mask_values has no value for {some(lacking)}: masks are written with numbers of classes")
        return numbers
    codes = np.concatenate(found)
    if known.colours:
        return _channels(codes).astype(np.uint8)
    return codes.astype(np.uint8 if codes.max() <= IGNORED else np.uint16)


def colour_key(value: int) -> str:
    """A colour's code as a table's key."""
    return f"{value >> 16} {value >> 8 & 255} {value & 255}"


def _channels(values: np.ndarray) -> np.ndarray:
    """Codes (N,) as (N, 3); a number in the last channel alone."""
    values = values.astype(np.int64)
    return np.stack([values >> 16, values >> 8 & 255, values & 255], axis=1)


def remedy(keys: Sequence[int | str], classes: Sequence[str], *, in_order: bool = True) -> str:
    """The option that says what values mean, ready to be pasted; with CLASS where nothing says which class is which."""
    names = list(classes) if in_order and len(keys) == len(classes) else ["CLASS"] * len(keys)
    table = yaml.safe_dump(dict(zip(keys, names, strict=True)), default_flow_style=True, sort_keys=False, width=10**6)
    return f"--set {shlex.quote(f'data.mask_values={table.strip()}')}"


def _often(colours: Counter[int]) -> list[str]:
    return [colour_key(value) for value, _ in sorted(colours.most_common(12))]


def some_colours(colours: Counter[int]) -> str:
    """How many there are, and a few of them."""
    return f"{len(colours)} colours" + (f", most of them {some(_often(colours), 4)}" if len(colours) > 1 else "")


def colour_trouble(what: str, colours: Counter[int], classes: Sequence[str]) -> UserError:
    """The error about masks in colour that no table explains; ``what`` is wrong with them."""
    return UserError(
        f"{what}: say which colour is which class, with {remedy(_often(colours), classes, in_order=False)}"
    )


def check_values(
    where: Path, pixels: np.ndarray, masks: int, classes: Sequence[str], *, reduce_zero: bool, learns: bool = True
) -> list[str]:
    """What is to be said of the values of some masks, before anything is trained or evaluated.

    Args:
        where: Their folder.
        pixels: Numbers of pixels by stored value, (65536,).
        masks: How many were looked at.
        classes: K names.
        reduce_zero: Whether value 0 is no class.
        learns: Whether this is a training; an evaluation may be of few classes, and leaves out single masks.

    Raises:
        UserError: One class at most occurs beside pixels of value 255, or values beyond the classes do.
    """
    values = np.flatnonzero(pixels)
    counted = values[(values != IGNORED) & ~((values == 0) & reduce_zero)] - reduce_zero
    inside, beyond = counted[counted < len(classes)], counted[counted >= len(classes)] + reduce_zero
    looked = f"{masks} masks of {where}"
    if len(inside) <= 1 and pixels[IGNORED] and not len(beyond) and (learns or not inside.any()):
        share = pixels[IGNORED] / pixels.sum()
        occurs = [f"class {classes[inside[0]]!r} alone occurs"] if len(inside) else ["no class occurs"]
        raise UserError(
            f"{share:.1%} of the pixels in {looked} hold 255, which means no class, and {occurs[0]}: there is nothing "
            f"to {'learn' if learns else 'evaluate'}; if 255 is a class, add {remedy(values.tolist(), classes)}"
        )
    if not learns:
        return []
    if len(beyond) and int(beyond.max()) == len(classes) and not reduce_zero:
        raise UserError(
            f"{looked} hold values up to {len(classes)}, and {len(classes)} classes are 0 to {len(classes) - 1}: if 0 "
            "means no class, add --set data.reduce_zero_label=true; if a name is missing, add it to classes.txt or to "
            "data.classes"
        )
    if len(beyond):
        known = (
            f"the {len(classes)} classes are {int(reduce_zero)} to {len(classes) - 1 + reduce_zero} (255 is ignored)"
        )
        often = _apart(values[np.argsort(-pixels[values], kind="stable")], max(len(classes), 2))
        soft = _soft(np.setdiff1d(values, often), often, pixels)
        often = sorted(often) if soft else values[:MOST_LISTED].tolist()
        raise UserError(
            f"{looked} hold {some([str(value) for value in values])}, {known}: give a classes.txt or data.classes that "
            f"fits, or say what they mean with {remedy(often, classes)}" + f" --set {NEAREST}" * soft
        )
    lines = missing_classes(looked, set(inside.tolist()), classes)
    if lines and pixels[IGNORED]:
        share = pixels[IGNORED] / pixels.sum()
        lines[0] += f"; {share:.1%} of the pixels hold 255, which means no class: if it is one, add "
        lines[0] += remedy(values.tolist(), classes)
    return lines


def _apart(values: np.ndarray, most: int) -> list[int]:
    """The first values that are not soft edges of earlier ones."""
    found: list[int] = []
    for value in values.tolist():
        if len(found) < most and (len(values) <= most or all(abs(value - other) >= EDGE for other in found)):
            found.append(value)
    return found


def _soft(rest: np.ndarray, often: list[int], pixels: np.ndarray) -> bool:
    """Whether the rest of the values are soft edges: several, between the frequent ones, and each of them rarer."""
    if len(often) < 2 or len(rest) < SEVERAL or pixels[often].sum() < MOST_EXACT * pixels.sum():
        return False
    near = min(often) - EDGE < rest.min() and rest.max() < max(often) + EDGE  # some edges overshoot
    return bool(near and pixels[rest].max() < pixels[often].min())


def missing_classes(looked: str, present: set[int], classes: Sequence[str]) -> list[str]:
    """The line about classes that do not occur, if there are any."""
    missing = [repr(name) for number, name in enumerate(classes) if number not in present]
    what = f"class {missing[0]} has" if len(missing) == 1 else f"{len(missing)} of {len(classes)} classes have"
    names = "" if len(missing) == 1 else f": {some(missing, 8)}"
    return [f"{what} no pixel in {looked}{names}"] if missing else []
