"""The operations in C++ (``kernels.cpp``), compiled for this processor when first used.

No PyTorch headers are involved, so compiling takes seconds; the library is kept in the user's cache folder, under a
name that stands for the source, the compiler and the processor. OpenMP's symbols are those of the library that PyTorch
has loaded: one pool of threads.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from conv2former.ops.backend import pixels
from conv2former.ops.cpu.build import load

__all__ = ["mlp_middle", "mlp_middle_backward", "modulation", "modulation_backward", "takes", "unusable"]


def unusable(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device; None where they can. Compiles them when asked for the first time."""
    if device.type != "cpu":
        return "they are for CPUs"
    library = load()
    return library if isinstance(library, str) else None


def takes(dtype: torch.dtype, *, channels: int, kernel_size: int) -> bool:
    """Whether there is code for this dtype (float32, bfloat16), width (at least one vector) and kernel (odd, to 21)."""
    library: Any = load()
    return (
        dtype in (torch.float32, torch.bfloat16)
        and channels >= library.conv2former_lanes()
        and kernel_size <= library.conv2former_largest_kernel()
    )


class OutOfMemory(MemoryError):
    """A kernel found no scratch memory."""


def _call(name: str, u: Tensor, kernel_size: int, *arguments: Any) -> None:
    batch, height, width, channels = u.shape
    if u.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"the C++ kernels compute float32 and bfloat16, not {u.dtype}")
    shape = (ctypes.c_long * 5)(batch, height, width, channels, kernel_size)
    failed = getattr(load(), f"conv2former_{name}")(
        int(u.dtype == torch.bfloat16), shape, *arguments, torch.get_num_threads()
    )
    if failed:
        raise OutOfMemory("no scratch memory for the C++ kernels: lower the batch size or the number of threads")


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr() if tensor is not None else None)


def _strided(x: Tensor) -> tuple[Tensor, ctypes.c_void_p, ctypes.c_long]:
    """A map that the kernels can read, which is to be kept until they have, its address, and the distance of pixels."""
    x, step = pixels(x)
    return x, _pointer(x), ctypes.c_long(step)


def _floats(x: Tensor) -> Tensor:
    return x.detach().to(torch.float32).contiguous()


def modulation(u: Tensor, v: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """``modulation`` and, with ``keep``, the weights A that its backward pass needs (else an empty tensor)."""
    z = u.new_empty(u.shape)
    a = u.new_empty(u.shape if keep else (0,))
    if z.numel():
        (u, *at_u), (v, *at_v) = _strided(u), _strided(v)
        weight, bias = _floats(weight), _floats(bias)
        kept = _pointer(a if keep else None)
        _call("modulation", u, weight.shape[-1], *at_u, *at_v, _pointer(weight), _pointer(bias), _pointer(z), kept)
    return z, a


def modulation_backward(
    g: Tensor, u: Tensor, v: Tensor, a: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, v, weight and bias, from that of the output."""
    if a.shape != u.shape:
        raise ValueError("modulation was computed without keep=True: its backward pass needs A")
    du, dv = u.new_empty(u.shape), v.new_empty(v.shape)
    sums = _partial_sums(u, weight)
    if du.numel():
        (u, *at_u), (v, *at_v) = _strided(u), _strided(v)
        g, a, taps = g.contiguous(), a.contiguous(), _floats(weight)
        arguments = (_pointer(g), *at_u, *at_v, _pointer(a), _pointer(taps), _pointer(du), _pointer(dv), _pointer(sums))
        _call("modulation_backward", u, weight.shape[-1], *arguments)
    return du, dv, *_weight_and_bias(sums, weight)


def mlp_middle(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``mlp_middle``."""
    out = u.new_empty(u.shape)
    if out.numel():
        u, *at_u = _strided(u)
        weight, bias = _floats(weight), _floats(bias)
        _call("mlp_middle", u, 3, *at_u, _pointer(weight), _pointer(bias), _pointer(out))
    return out


def mlp_middle_backward(g: Tensor, u: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u, weight and bias, from that of the output."""
    du = u.new_empty(u.shape)
    sums = _partial_sums(u, weight)
    if du.numel():
        u, *at_u = _strided(u)
        g, taps, offsets = g.contiguous(), _floats(weight), _floats(bias)
        arguments = (_pointer(g), *at_u, _pointer(taps), _pointer(offsets), _pointer(du), _pointer(sums))
        _call("mlp_middle_backward", u, 3, *arguments)
    return du, *_weight_and_bias(sums, weight)


def _partial_sums(u: Tensor, weight: Tensor) -> Tensor:
    """(parts, k * k + 1, C): a part of the images each, the bias last."""
    library: Any = load()
    batch, _, _, channels = u.shape
    parts = library.conv2former_groups(ctypes.c_long(batch), ctypes.c_long(channels)) if u.numel() else 0
    return torch.empty(parts, weight.shape[-1] ** 2 + 1, channels)


def _weight_and_bias(sums: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    taps, bias = sums[:, :-1].sum(0), sums[:, -1].sum(0)
    return taps.t().reshape(weight.shape).to(weight.dtype), bias.to(weight.dtype)
