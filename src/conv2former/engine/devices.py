"""Where and how a trained model computes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from timm.utils.model import reparameterize_model
from torch import nn

from conv2former.errors import UserError
from conv2former.tasks.base import Task


def pick_device(name: str = "auto") -> torch.device:
    """'auto' is the GPU where there is one.

    Raises:
        UserError: A device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"device {name!r} is not there: use --device cpu") from None
    return device


def for_inference(task: Task, device: str | torch.device, *, fuse: bool = True) -> Task:
    """A model on a device, in evaluation mode; its backbone re-parameterized, which trains no more, unless not wanted.

    Raises:
        UserError: A device that is not there.
    """
    task.to(pick_device(device) if isinstance(device, str) else device).eval()
    if fuse:
        reparameterize_model(task.backbone, inplace=True)
    return task


@contextlib.contextmanager
def fused_copy(task: Task) -> Iterator[None]:
    """Evaluation on a CPU in float32 by a re-parameterized copy of the network, of which there are kernels.

    It takes as much memory again as the weights.
    """
    weight = next(task.model.parameters())
    plain = type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32
    if plain and not torch.is_autocast_enabled("cpu"):
        place = next(name for name, module in task.model.named_modules() if module is task.backbone)
        copied = copy.deepcopy(task.evaluated).eval()
        reparameterize_model(copied.get_submodule(place), inplace=True)
        task.fused = (copied,)
    try:
        yield
    finally:
        task.fused = ()
