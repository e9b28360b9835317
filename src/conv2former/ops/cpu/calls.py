"""Calls of the C++ functions with tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from conv2former.ops.backend import pixels
from conv2former_runtime.library import load
from conv2former_runtime.packing import Array


def call(name: str, dtype: torch.dtype, shape: Sequence[int], *arguments: Any) -> None:
    """Calls ``conv2former_NAME`` for tensors of a dtype, with the numbers that it takes as their shape.

    Raises:
        TypeError: There is no code for this dtype.
        MemoryError: There was no scratch memory.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"the C++ kernels compute float32 and bfloat16, not {dtype}")
    numbers = (ctypes.c_long * len(shape))(*shape)
    half = int(dtype == torch.bfloat16)
    if getattr(load(), f"conv2former_{name}")(half, numbers, *arguments, torch.get_num_threads()):
        raise MemoryError("no scratch memory for the C++ kernels: lower the batch size or the number of threads")


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where the numbers lie; null without a tensor. The tensor is to be kept until the call is over."""
    return ctypes.c_void_p(tensor.data_ptr() if tensor is not None else None)


def address(array: Array) -> ctypes.c_void_p:
    """Where packed weights begin. The array is to be kept until the call is over."""
    return ctypes.c_void_p(array.ctypes.data)


def strided(x: Tensor) -> tuple[Tensor, ctypes.c_void_p, ctypes.c_long]:
    """A map that the kernels can read, which is to be kept until they have, its address, and the distance of pixels."""
    x, step = pixels(x)
    return x, pointer(x), ctypes.c_long(step)
