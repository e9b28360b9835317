"""The stem and the branches of a block in evaluation: ``stem.cpp`` and ``branches.cpp``."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from conv2former.ops.cpu import packing
from conv2former.ops.cpu.calls import call, pointer


def modulation_branch(
    x: Tensor, w: Tensor, w_bias: Tensor, taps: Tensor, taps_bias: Tensor, proj: Tensor, proj_bias: Tensor, eps: float
) -> Tensor:
    """``modulation_branch``."""
    u, v = (packing.panels_of_first_half, packing.first_half), (packing.panels_of_second_half, packing.second_half)
    parts = (w, u[0]), (w_bias, u[1]), (w, v[0]), (w_bias, v[1])
    return _branch(x, eps, parts, (taps, taps_bias, proj, proj_bias))


def mlp_branch(
    x: Tensor, fc1: Tensor, fc1_bias: Tensor, taps: Tensor, taps_bias: Tensor, fc2: Tensor, fc2_bias: Tensor, eps: float
) -> Tensor:
    """``mlp_branch``."""
    parts = (fc1, packing.panels), (fc1_bias, packing.vectors), None, None
    return _branch(x, eps, parts, (taps, taps_bias, fc2, fc2_bias))


def _branch(x: Tensor, eps: float, first: tuple[packing.Wanted, ...], others: tuple[Tensor, ...]) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    if out.numel():
        ways = packing.taps, packing.vectors, packing.panels_of_whole_vectors, packing.vectors
        parts = packing.packed([*first, *zip(others, ways, strict=True)])
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
        parts = packing.packed(
            [
                (weight1, packing.rows_of_panels),
                (scale, packing.vectors),
                (offset, packing.vectors),
                (weight2, packing.rows_of_panels),
                (weight3, packing.rows_of_panels),
                (bias3, packing.vectors),
            ]
        )
        shape = *x.shape, len(weight1), len(weight3), stride1, stride2
        call("stem", x.dtype, shape, pointer(x), *map(pointer, parts), pointer(out))
    return out.permute(0, 3, 1, 2)
