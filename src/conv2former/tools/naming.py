"""How a user names a network: a timm model with arguments behind a colon, or a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from conv2former.errors import UserError, nearest, one_line
from conv2former.recipes.load import parse_yaml

SEED = 0  # of untrained weights


def read_name(name: str) -> tuple[str, dict[str, Any]] | Path:
    """timm's name with arguments of ``timm.create_model``, or the path of a checkpoint.

    Raises:
        UserError: Neither, or arguments of another form.
    """
    model_name, _, arguments = name.partition(":")
    path = Path(name.removeprefix("local-dir:"))
    exists = os.path.exists(path)  # False also for what is no path at all
    if timm.is_model(model_name):
        if exists:
            raise UserError(f"{name} is a model of timm's and a path here: write ./{name} for the path")
        return model_name, _arguments(name, arguments)
    if not exists:
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


def built_untrained(name: str, model_name: str, args: dict[str, Any]) -> Any:
    """A timm model whose random weights, where it has no others, are the same for every call; raises UserError."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return built(name, timm.create_model, model_name, args)
