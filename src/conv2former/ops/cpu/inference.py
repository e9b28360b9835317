"""The operations of evaluation: ``stem.cpp``, ``blocks.cpp``, ``downsample.cpp``, ``head.cpp``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from conv2former.ops.blocks import block_weights
from conv2former.ops.cpu.calls import address, call, pointer
from conv2former.ops.cpu.packing import pack, packed
from conv2former_runtime.packing import Array, block_parts, downsample_parts, head_parts, stem_parts


def blocks(x: Tensor, weights: list[Tensor], dim: int, hidden: int, kernel_size: int, eps: float) -> Tensor:
    x = x.contiguous()
    out, between = torch.empty_like(x), torch.empty_like(x)
    if out.numel():
        found = packed(weights, _packed_branches, dim, hidden, kernel_size)
        shape = *x.shape, hidden, kernel_size, len(weights)
        addresses = (ctypes.c_void_p * len(found))(*(branch.ctypes.data for branch in found))
        call("blocks", x.dtype, shape, pointer(x), ctypes.c_float(eps), addresses, pointer(between), pointer(out))
    return out


def _packed_branches(weights: Sequence[Tensor], dim: int, hidden: int, kernel_size: int) -> list[Array]:
    """Where the weights of each branch begin: those of a branch lie in a row."""
    parts = block_parts(dim, hidden, kernel_size)
    rows = [branches(row, dim, hidden, kernel_size) for row in weights]
    return [pack(each, branch)[0] for row in rows for each, branch in zip(parts, row, strict=True)]


def branches(row: Tensor, dim: int, hidden: int, kernel_size: int) -> tuple[list[Tensor], list[Tensor]]:
    """The weights of a block's two branches, as ``block_parts`` lists them."""
    first, first_bias, *rest = block_weights(row, dim, hidden, kernel_size)
    both = [each for half in zip(first.chunk(2), first_bias.chunk(2), strict=True) for each in half]
    return [*both, *rest[:4]], rest[4:]


def stem(x: Tensor, *rest: Any) -> Tensor:
    *weights, stride1, stride2 = rest
    weight1, _, _, _, weight3, _ = weights
    x = x.permute(0, 2, 3, 1).contiguous()
    height, width = ((side - 1) // stride1 + 1 for side in x.shape[1:3])
    height, width = (((side - 1) // stride2 + 1) // 2 for side in (height, width))
    out = x.new_empty(len(x), height, width, len(weight3))
    if out.numel():
        sizes = x.shape[-1], len(weight1), len(weight3)
        parts = packed(weights, lambda weights: pack(stem_parts(*sizes), weights))
        call("stem", x.dtype, (*x.shape, *sizes[1:], stride1, stride2), pointer(x), *map(address, parts), pointer(out))
    return out.permute(0, 3, 1, 2)


def downsample(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    out = x.new_empty(len(x), x.shape[1] // 2, x.shape[2] // 2, len(weight))
    if out.numel():
        sizes = x.shape[-1], len(weight)
        parts = packed((weight, bias), lambda weights: pack(downsample_parts(*sizes), weights))
        arguments = (pointer(x), ctypes.c_float(eps), *map(address, parts), pointer(out))
        call("downsample", x.dtype, (*x.shape, len(weight)), *arguments)
    return out


def head(x: Tensor, *rest: Any) -> Tensor:
    *weights, eps = rest
    weight1, _, _, _, weight2, _ = weights
    x = x.contiguous()
    out = x.new_empty(len(x), len(weight2))
    if out.numel():
        sizes = x.shape[-1], len(weight1), len(weight2)
        parts = packed(weights, lambda weights: pack(head_parts(*sizes), weights))
        shape = len(x), x.shape[1] * x.shape[2], *sizes
        call("head", x.dtype, shape, pointer(x), ctypes.c_float(eps), *map(address, parts), pointer(out))
    return out
