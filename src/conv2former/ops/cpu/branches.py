"""The stem and the branches of a block in evaluation: ``stem.cpp`` and ``branches.cpp``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from conv2former.ops.cpu import packing
from conv2former.ops.cpu.calls import call, pointer


def modulation_branch(
    x: Tensor, w: Tensor, w_bias: Tensor, taps: Tensor, taps_bias: Tensor, proj: Tensor, proj_bias: Tensor, eps: float
) -> Tensor:
    """``modulation_branch``."""
    ways = packing.panels, packing.vectors, packing.floats, packing.floats, packing.panels, packing.vectors
    weights = w, w_bias, taps, taps_bias, proj, proj_bias
    return _branch("modulation_branch", x, eps, taps.shape[-1], weights, ways)


def mlp_branch(
    x: Tensor, fc1: Tensor, fc1_bias: Tensor, taps: Tensor, taps_bias: Tensor, fc2: Tensor, fc2_bias: Tensor, eps: float
) -> Tensor:
    """``mlp_branch``."""
    first, last = (packing.panels, packing.vectors), (packing.panels_of_whole_vectors, packing.vectors)
    weights = fc1, fc1_bias, taps, taps_bias, fc2, fc2_bias
    return _branch("mlp_branch", x, eps, len(fc1), weights, (*first, packing.taps, packing.vectors, *last))


def _branch(
    name: str, x: Tensor, eps: float, number: int, weights: Sequence[Tensor], ways: Sequence[packing.Packing]
) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    if out.numel():
        packed = [packing.packed(weight, way) for weight, way in zip(weights, ways, strict=True)]
        call(name, x.dtype, (*x.shape, number), pointer(x), ctypes.c_float(eps), *map(pointer, packed), pointer(out))
    return out


def stem(
    x: Tensor,
    weight1: Tensor,
    scale: Tensor,
    offset: Tensor,
    weight2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    stride1: int,
    stride2: int,
) -> Tensor:
    """``stem``."""
    x = x.permute(0, 2, 3, 1).contiguous()
    height, width = ((side - 1) // stride1 + 1 for side in x.shape[1:3])
    height, width = (((side - 1) // stride2 + 1) // 2 for side in (height, width))
    out = x.new_empty(len(x), height, width, len(weight3))
    if out.numel():
        none, one = torch.zeros_like(scale), torch.ones_like(scale)
        vectors = [packing.vectors(v) for v in (none, scale, offset, one)]
        ways = packing.rows_of_panels, packing.rows_of_panels, packing.rows_of_panels, packing.vectors
        first, second, third, bias = (
            packing.packed(weight, way) for weight, way in zip((weight1, weight2, weight3, bias3), ways, strict=True)
        )
        parts = first, *vectors[:3], second, vectors[3], third, bias, out
        call(
            "stem", x.dtype, (*x.shape, len(weight1), len(weight3), stride1, stride2), pointer(x), *map(pointer, parts)
        )
    return out.permute(0, 3, 1, 2)
