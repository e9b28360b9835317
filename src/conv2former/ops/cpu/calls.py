"""What the C++ functions are given for tensors."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from conv2former.ops.backend import pixels


def settings(x: Tensor) -> dict[str, Any]:
    """The dtype and the threads, as ``layers`` take them; raises TypeError where there is no code for the dtype."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"the C++ kernels compute float32 and bfloat16, not {x.dtype}")
    return dict(half=x.dtype == torch.bfloat16, threads=torch.get_num_threads())


def strided(x: Tensor) -> tuple[Tensor, ctypes.c_long]:
    """A map that the kernels can read, and the distance of its pixels."""
    x, step = pixels(x)
    return x, ctypes.c_long(step)
