"""The operations of evaluation: ``stem.cpp``, ``blocks.cpp``, ``downsample.cpp``, ``head.cpp``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from conv2former.ops.blocks import block_weights
from conv2former.ops.cpu import packing
from conv2former.ops.cpu.calls import call, pointer


def blocks(x: Tensor, weights: list[Tensor], dim: int, hidden: int, kernel_size: int, eps: float) -> Tensor:
    x = x.contiguous()
    out, between = torch.empty_like(x), torch.empty_like(x)
    if out.numel():
        packed = packing.packed(weights, _packed_branches, dim, hidden, kernel_size)
        shape = *x.shape, hidden, kernel_size, len(weights)
        addresses = (ctypes.c_void_p * len(packed))(*(branch.data_ptr() for branch in packed))
        call("blocks", x.dtype, shape, pointer(x), ctypes.c_float(eps), addresses, pointer(between), pointer(out))
    return out


def _packed_branches(weights: Sequence[Tensor], dim: int, hidden: int, kernel_size: int) -> list[Tensor]:
    """Of each branch all weights in a row, as bytes."""
    branches = []
    for row in weights:
        parts = block_weights(row, dim, hidden, kernel_size)
        branches += [_packed_branch(2, *parts[:6]), _packed_branch(1, *parts[6:])]
    return branches


def _packed_branch(
    halves: int, first: Tensor, first_bias: Tensor, dw_weight: Tensor, dw_bias: Tensor, last: Tensor, last_bias: Tensor
) -> Tensor:
    parts = [
        pack(half)
        for each in zip(first.chunk(halves), first_bias.chunk(halves), strict=True)
        for pack, half in zip((packing.panels, packing.vectors), each, strict=True)
    ]
    parts += [packing.depthwise(dw_weight), packing.vectors(dw_bias)]
    parts += [packing.panels(packing.whole_vectors(last)), packing.vectors(last_bias)]
    return torch.cat([part.flatten().view(torch.uint8) for part in parts])


def stem(x: Tensor, *rest: Any) -> Tensor:
    *weights, stride1, stride2 = rest
    weight1, _, _, _, weight3, _ = weights
    x = x.permute(0, 2, 3, 1).contiguous()
    height, width = ((side - 1) // stride1 + 1 for side in x.shape[1:3])
    height, width = (((side - 1) // stride2 + 1) // 2 for side in (height, width))
    out = x.new_empty(len(x), height, width, len(weight3))
    if out.numel():
        parts = packing.packed(weights, _packed_stem)
        shape = *x.shape, len(weight1), len(weight3), stride1, stride2
        call("stem", x.dtype, shape, pointer(x), *map(pointer, parts), pointer(out))
    return out.permute(0, 3, 1, 2)


def _packed_stem(weights: Sequence[Tensor]) -> list[Tensor]:
    return [packing.rows_of_panels(weight) if weight.ndim > 1 else packing.vectors(weight) for weight in weights]


def downsample(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    out = x.new_empty(len(x), x.shape[1] // 2, x.shape[2] // 2, len(weight))
    if out.numel():
        parts = packing.packed((weight, bias), _packed_downsample)
        shape = *x.shape, len(weight)
        call("downsample", x.dtype, shape, pointer(x), ctypes.c_float(eps), *map(pointer, parts), pointer(out))
    return out


def _packed_downsample(weights: Sequence[Tensor]) -> list[Tensor]:
    weight, bias = weights
    padded = packing.whole_vectors(weight.permute(0, 2, 3, 1))
    return [packing.panels(padded.flatten(1)), packing.vectors(bias)]


def head(x: Tensor, *rest: Any) -> Tensor:
    *weights, eps = rest
    weight1, _, _, _, weight2, _ = weights
    x = x.contiguous()
    out = x.new_empty(len(x), len(weight2))
    if out.numel():
        parts = packing.packed(weights, _packed_head)
        shape = len(x), x.shape[1] * x.shape[2], x.shape[3], len(weight1), len(weight2)
        call("head", x.dtype, shape, pointer(x), ctypes.c_float(eps), *map(pointer, parts), pointer(out))
    return out


def _packed_head(weights: Sequence[Tensor]) -> list[Tensor]:
    return [packing.panels(packing.whole_vectors(w)) if w.ndim > 1 else packing.vectors(w) for w in weights]
