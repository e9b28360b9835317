"""How a user names a network: a timm model with arguments behind a colon, or a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import yaml

from conv2former.errors import UserError, nearest, one_line
from conv2former.recipes.schema import parse_yaml


def read_name(name: str) -> tuple[str, dict[str, Any]] | Path:
    """timm's name with arguments of ``timm.create_model``, or the path of a checkpoint.

    Raises:
        UserError: Neither, or arguments of another form.
    """
    model_name, _, arguments = name.partition(":")
    if timm.is_model(model_name):
        return model_name, _arguments(name, arguments)
    path = Path(name.removeprefix("local-dir:"))
    if not path.exists():
        raise UserError(
            f"{name} is neither a model of timm's nor a checkpoint{nearest(model_name, timm.list_models())}"
        )
    return path


def _arguments(name: str, text: str) -> dict[str, Any]:
    """``key=value,key=value``, the values in YAML."""
    try:
        found = parse_yaml("{" + text.replace("=", ": ") + "}")
    except yaml.YAMLError:
        found = {"": None}
    if any(not isinstance(key, str) or not key.isidentifier() for key in found) or None in found.values():
        raise UserError(
            f"{name!r} is not of the form MODEL:key=value,key=value, conv2former_t:kernel_size=21 for example"
        )
    return found


def built(name: str, make: Callable[..., Any], model_name: str, args: dict[str, Any]) -> Any:
    """``make(model_name, **args)``; raises UserError, with the user's ``name``, whatever goes wrong."""
    try:
        return make(model_name, **args)
    except Exception as error:  # timm's models raise anything for a wrong argument, and a download may fail in any way
        raise UserError(f"{name} cannot be built: {one_line(error)}") from None
