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
    u, v = (packing.panels_of_first_half, packing.first_half), (packing.panels_of_second_half, packing.second_half)
    parts = [(w, u[0]), (w_bias, u[1]), (w, v[0]), (w_bias, v[1])]
    return _branch(x, eps, parts, (taps, taps_bias, proj, proj_bias))


def mlp_branch(
    x: Tensor, fc1: Tensor, fc1_bias: Tensor, taps: Tensor, taps_bias: Tensor, fc2: Tensor, fc2_bias: Tensor, eps: float
) -> Tensor:
    """``mlp_branch``."""
    parts = [(fc1, packing.panels), (fc1_bias, packing.vectors), None, None]
    return _branch(x, eps, parts, (taps, taps_bias, fc2, fc2_bias))


def _branch(
    x: Tensor, eps: float, first: Sequence[tuple[Tensor, packing.Packing] | None], others: tuple[Tensor, ...]
) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    if out.numel():
        ways = packing.taps, packing.vectors, packing.panels_of_whole_vectors, packing.vectors
        wanted = [*first, *zip(others, ways, strict=True)]
        parts = [part and packing.packed(*part) for part in wanted]
        shape = *x.shape, len(others[0]), others[0].shape[-1]
        call("branch", x.dtype, shape, pointer(x), ctypes.c_float(eps), *map(pointer, parts), pointer(out))
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
