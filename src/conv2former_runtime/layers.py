"""The operations of inference on maps (B, H, W, C) of float32 or bfloat16 (``half``): calls of the C++ functions.

Maps are arrays, bfloat16 as uint16, or whatever else has a ``shape`` and a ``data_ptr()``, as tensors have; they lie in
one piece. Weights are packed (``packing``). Outputs are the caller's memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from conv2former_runtime.library import load
from conv2former_runtime.packing import Array

Shape = Sequence[int]


def stem_shape(images: Shape, outs: int, strides: Sequence[int]) -> tuple[int, ...]:
    """(B, H, W, C) of the output of ``stem`` for images of a shape."""
    batch, *sides, _ = images
    for stride in strides:  # of the two 3x3 convolutions; behind them is a 2x2 convolution of stride 2
        sides = [(side - 1) // stride + 1 for side in sides]
    return batch, *(side // 2 for side in sides), outs


def stem(
    images: Any, weights: Sequence[Array], out: Any, *, half: bool, mid: int, strides: Sequence[int], threads: int
) -> None:
    """The three convolutions; ``mid`` are the channels between them."""
    if all(out.shape):
        shape = (*images.shape, mid, out.shape[-1], *strides)
        call("stem", shape, images, *weights, out, half=half, threads=threads)


def blocks(
    x: Any,
    branches: Sequence[Array],
    between: Any,
    out: Any,
    *,
    half: bool,
    hidden: int,
    kernel_size: int,
    eps: float,
    threads: int,
) -> None:
    """The blocks of a stage; of each both ``branches``. ``between`` is scratch memory as large as ``out``."""
    if all(out.shape):
        addresses = (ctypes.c_void_p * len(branches))(*(branch.ctypes.data for branch in branches))
        shape = (*x.shape, hidden, kernel_size, len(branches) // 2)
        call("blocks", shape, x, ctypes.c_float(eps), addresses, between, out, half=half, threads=threads)


def downsample(x: Any, weights: Sequence[Array], out: Any, *, half: bool, eps: float, threads: int) -> None:
    """The normalisation and the 2x2 convolution of stride 2."""
    if all(out.shape):
        shape = (*x.shape, out.shape[-1])
        call("downsample", shape, x, ctypes.c_float(eps), *weights, out, half=half, threads=threads)


def head(x: Any, weights: Sequence[Array], out: Any, *, half: bool, hidden: int, eps: float, threads: int) -> None:
    """The classifier, (B, H, W, C) -> (B, classes)."""
    if all(out.shape):
        shape = (len(x), x.shape[1] * x.shape[2], x.shape[3], hidden, out.shape[1])
        call("head", shape, x, ctypes.c_float(eps), *weights, out, half=half, threads=threads)


def call(name: str, shape: Sequence[int], *arguments: Any, half: bool, threads: int) -> None:
    """Calls ``conv2former_NAME`` with the numbers that it takes as its shape.

    Maps and weights are given by their address, what belongs to ``ctypes`` as it is.

    Raises:
        MemoryError: There was no scratch memory.
    """
    numbers = (ctypes.c_long * len(shape))(*shape)
    if getattr(load(), f"conv2former_{name}")(int(half), numbers, *map(_given, arguments), threads):
        raise MemoryError("no scratch memory for the C++ kernels: lower the batch size or the number of threads")


def _given(argument: Any) -> Any:
    if isinstance(argument, np.ndarray):
        return ctypes.c_void_p(argument.ctypes.data)
    return ctypes.c_void_p(argument.data_ptr()) if hasattr(argument, "data_ptr") else argument
