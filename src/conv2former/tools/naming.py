"""How a user names a network: a timm model with arguments behind a colon, or a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

from conv2former.errors import UserError, nearest, one_line
from conv2former.files import parse_yaml
from conv2former.models.meta import bounded
from conv2former.tasks import load
from conv2former.tasks.base import Task
from conv2former.tasks.classification.task import ClassificationTask

SEED = 0  # of untrained weights


def read_name(name: str) -> tuple[str, dict[str, Any]] | Path:
    """timm's name with arguments of ``timm.create_model`` (``key=value,key=value`` in YAML), or a checkpoint's path.

    Raises:
        UserError: Neither, or arguments of another form.
    """
    model_name, _, arguments = name.partition(":")
    path = Path(name.removeprefix("local-dir:"))
    exists = os.path.exists(path)  # False also for what is no path at all
    if timm.is_model(model_name):
        if exists:
            raise UserError(f"{name} is a model of timm's and a path here: write ./{name} for the path")
        try:
            args = parse_yaml("{" + arguments.replace("=", ": ") + "}")
        except ValueError:
            args = {"": None}
        if any(not isinstance(key, str) or not key.isidentifier() for key in args) or None in args.values():
            raise UserError(
                f"{name!r} is not of the form MODEL:key=value,key=value, conv2former_t:kernel_size=21 for example"
            )
        return model_name, args
    if not exists:
        raise UserError(
            f"{name} is neither a model of timm's nor a checkpoint{nearest(model_name, timm.list_models())}"
        )
    return path


def built(name: str, make: Callable[..., Any], model_name: str, args: dict[str, Any]) -> Any:
    """``make(model_name, **args)``; whatever goes wrong is a UserError with the ``name`` that the user wrote."""
    try:
        with bounded(name):
            return make(model_name, **args)
    except Exception as error:  # timm's models raise anything for a wrong argument, and a download may fail in any way
        raise UserError(f"{name} cannot be built: {one_line(error)}") from None


def built_untrained(name: str, model_name: str, args: dict[str, Any]) -> Any:
    """A timm model; its random weights, if it has no others, are the same for every call. Raises UserError."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return built(name, timm.create_model, model_name, args)


def open_task(named: tuple[str, dict[str, Any]] | Path, name: str) -> tuple[Task, bool]:
    """The model that a name means, read by ``read_name``, and whether its weights are random; raises UserError."""
    if isinstance(named, Path):
        return load(named), False
    return ClassificationTask.of(built_untrained(name, *named), name=name), not named[1].get("pretrained")
