"""A task tried out on fake tensors, which have shapes and no values: what it refuses shows before the first step."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from conv2former.engine.launch import blocks
from conv2former.errors import UserError, one_line
from conv2former.tasks.base import Task

# raised where a result depends on values (detectors choose boxes), or where code of others knows no fake tensors
NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    NotImplementedError,
)
WORDS = ("tensor subclass", "no fake impl", "FakeTensor", "fake tensor")  # of PyTorch's other errors about them


def try_out(task: Task) -> None:
    """Computes a training step on blank images of the training size, with a copy that shares the parameters.

    A copy, because networks keep tensors from call to call, and in the fake mode batch norms go on counting. It finds
    out which blocks of the backbone are called as modules: FSDP shards those alone.

    Raises:
        UserError: The network cannot be trained on such images.
    """
    called: set[str] = set()
    with refusals(task):
        trial = copy.deepcopy(task, {id(parameter): parameter for parameter in task.parameters()}).train()
        if task.recipe.engine.strategy == "fsdp":
            for name, block in blocks(trial.backbone).items():
                block.register_forward_hook(partial(_note, called, name))
        with FakeTensorMode(allow_non_fake_inputs=True):
            for compute in (step, stand_in):
                if compute(trial, 2) is not None:
                    break
    task.sharded_blocks = called


def _note(called: set[str], name: str, *call: Any) -> None:
    called.add(name)


def step(task: Task, count: int) -> Tensor | None:
    """The loss of ``count`` blank images; None if it cannot be computed without values."""
    return _without_values(lambda: task.training_step(task.example_batch(count)))


def stand_in(task: Task, count: int) -> Tensor | None:
    """A sum over the maps of the trunk, for a network whose loss needs values; None if these need them, too."""
    images = example_images(task, count)

    def total() -> Tensor:
        found: Any = task.trunk(task.prepared(images))
        parts = found if isinstance(found, (tuple, list)) else (found,)
        return torch.stack([part.float().sum() for part in parts]).sum()

    return _without_values(total)


def _without_values(compute: Any) -> Tensor | None:
    try:
        return compute()
    except NEEDS_VALUES:
        return None
    except RuntimeError as error:
        if any(word in str(error) for word in WORDS):
            return None
        raise


def example_images(task: Task, count: int) -> Tensor:
    """The images of ``task.example_batch``."""
    batch: Any = task.example_batch(count)
    return batch.images[0] if isinstance(batch.images, (tuple, list)) else batch.images


@contextmanager
def refusals(task: Task) -> Iterator[None]:
    """Turns what a network says of a size or of a setting into the user's line."""
    batch: Any = task.example_batch(2)
    if missing := [name for name in ("images", "indices", "bad") if not hasattr(batch, name)]:
        raise UserError(f"the batches of {task.name} lack {', '.join(missing)}")
    if task.recipe.model.args.get("in_chans", 3) != 3:
        raise UserError("images are read in 3 channels (RGB): leave model.args.in_chans out")
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # which would print a traceback beside it
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except (AssertionError, AttributeError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        name, (height, width) = task.recipe.model.name, example_images(task, 1).shape[-2:]
        own = (getattr(task.backbone, "pretrained_cfg", None) or {}).get("input_size") or (3, height)
        way = f": add --set data.input_size={own[1]}, or --set model.args.img_size={height} if it takes that"
        raise UserError(
            f"{name} cannot be trained on images of {height} x {width} pixels: {one_line(error)}"
            + way * (own[1] != height and hasattr(task.recipe.data, "input_size"))
        ) from None
    finally:
        logger.setLevel(level)
