"""Reads recipes: shipped ones by name and files of one's own, with what the command line changes."""

from __future__ import annotations

import copy
import functools
import shlex
from importlib import resources
from pathlib import Path
from typing import Any

from conv2former.config import Recipe, validated
from conv2former.errors import UserError, nearest_or_all, one_line
from conv2former.files import MOST_YAML, parse_yaml, read_within
from conv2former.tasks import task_class


def recipe_names() -> list[str]:
    """The shipped recipes."""
    names = (entry.name for entry in resources.files("conv2former.recipes").iterdir())
    # a leading underscore marks what others are based on and is no experiment by itself
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml") and not name.startswith("_"))


def load_recipe(name: str | Path, *, overrides: list[str] | None = None) -> Recipe:
    """Reads a shipped recipe by name, or a file of one's own by its path (it must end in .yaml or .yml).

    Args:
        name: Name or path.
        overrides: Assignments ``section.key=value``, the value in YAML.

    Raises:
        UserError: No such recipe, not YAML, unknown key or wrong type; the message names the nearest right one.
    """
    raw = _raw(str(name), ()) if str(name).endswith((".yaml", ".yml")) else copy.deepcopy(_shipped(str(name)))
    for assignment in overrides or []:
        _assign(raw, assignment)
    return parse_recipe(raw, str(name))


def with_settings(recipe: Recipe, settings: list[str], *, section: str | None = None) -> Any:
    """The recipe with settings ``SECTION.key=value`` changed, of one section alone if it is named.

    Raises:
        UserError: Another section, unknown key or wrong type.
    """
    raw = recipe.raw()
    for setting in settings:
        if section and not setting.startswith(f"{section}."):
            raise UserError(f"--set {setting!r}: only {section}.key=value can be changed here")
        _assign(raw, setting)
    return parse_recipe(raw, recipe.name)


@functools.cache
def _shipped(name: str) -> dict[str, Any]:
    """A shipped recipe as it is written; not to be changed. A table of the paper reads each of its own many times."""
    return _raw(name, ())


def _raw(name: str, above: tuple[str, ...]) -> dict[str, Any]:
    """A recipe as it is written, merged over the one that it names as its ``base``."""
    text = _read(name)
    try:
        raw = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"recipe {name} is not YAML: {one_line(error)}") from None
    if not isinstance(raw, dict):
        raise UserError(f"recipe {name} holds no sections: it must start with name:, claim:, model:")
    raw = {key: part for key, part in raw.items() if part is not None}  # an empty section is written as nothing
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str) or base in (name, *above):
        raise UserError(f"recipe {name}: base must name another recipe, not {base!r}")
    below = _raw(base, (name, *above))
    if name.endswith((".yaml", ".yml")):  # the paper's numbers for the base do not hold for somebody's own recipe
        command = f"conv2former train --recipe {shlex.quote(name)} --data DIR --out RUN"
        own = dict(source=f"based on {base}", command=command, notes="", paper=None, measured="not run")
        below["claim"] = below.get("claim", {}) | own
    return _merged(below, raw)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = below | above
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = _merged(below[key], above[key])
    return merged


def parse_recipe(raw: dict[str, Any], origin: str) -> Recipe:
    """Checks a recipe that is already parsed; ``origin`` stands in error messages."""
    task = raw.get("task", "classification") if isinstance(raw, dict) else "classification"
    try:
        config_class = task_class(str(task)[:100]).config_class
    except UserError as error:
        raise UserError(f"recipe {origin}: {error}") from None
    return validated(config_class, raw, origin)


def _read(name: str) -> str:
    if name.endswith((".yaml", ".yml")):
        try:
            return read_within(Path(name), 4 * MOST_YAML).decode()
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read recipe {name}: {getattr(error, 'strerror', None) or error}") from None
    file = resources.files("conv2former.recipes").joinpath(f"{name}.yaml")
    if not file.is_file():
        names = recipe_names()
        hint = nearest_or_all(name, names)
        raise UserError(f"unknown recipe {name!r}{hint} (a file of your own must end in .yaml)")
    return file.read_text(encoding="utf-8")


def _assign(raw: dict[str, Any], assignment: str) -> None:
    key, equals, value = assignment.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(f"--set {assignment!r} is not of the form section.key=value")
    target = raw
    for part in path[:-1]:
        if target.get(part) is None:  # a section that the file leaves out, or writes as an empty line
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            raise UserError(f"--set {assignment!r}: {part!r} holds a value, not a section")
    try:
        target[path[-1]] = parse_yaml(value)
    except ValueError as error:
        raise UserError(f"--set {assignment!r}: the value is not YAML: {one_line(error)}") from None
