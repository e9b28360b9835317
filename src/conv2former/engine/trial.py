"""A task tried out on fake tensors, which have shapes and no values: what it refuses shows before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)

from conv2former.engine.batchnorm import BatchNormBackup
from conv2former.errors import UserError, one_line
from conv2former.tasks.base import Task

# of operations whose result depends on values: detectors choose boxes, some networks ask a tensor for a number
VALUES_NEEDED = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


def try_out(task: Task) -> None:
    """Computes a training step on blank images of the training size.

    Raises:
        UserError: The network cannot be trained on such images.
    """
    statistics = BatchNormBackup(task.model)
    statistics.keep()  # the fake mode lets batch norms count the step
    with refusals(task), FakeTensorMode(allow_non_fake_inputs=True):
        if task.recipe.engine.grad_checkpointing:
            task.model.set_grad_checkpointing()
        loss(task.train(), 2)
    statistics.restore()


def loss(task: Task, count: int) -> tuple[Tensor, bool]:
    """The loss of ``count`` blank images under fake tensors, and whether it is that of the whole network.

    Where the network needs values, a sum over the maps of its trunk stands in.
    """
    batch: Any = task.example_batch(count)
    try:
        return task.training_step(batch), True
    except VALUES_NEEDED:
        images = batch.images if isinstance(batch.images, Tensor) else batch.images[0]
        found: Any = task.exportable().network(task.prepared(images))
        return sum(
            (part.float().sum() for part in (found if isinstance(found, tuple) else (found,))), start=Tensor()
        ), False


@contextmanager
def refusals(task: Task) -> Iterator[None]:
    """Turns what a network says of a size or of a setting into the user's line."""
    try:
        yield
    except (AssertionError, AttributeError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        images: Any = task.example_batch(1).images
        height, width = (images if isinstance(images, Tensor) else images[0]).shape[-2:]
        name = task.recipe.model.name
        raise UserError(f"{name} cannot be trained on images of {height} x {width} pixels: {one_line(error)}") from None
