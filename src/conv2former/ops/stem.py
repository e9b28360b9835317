"""The stem of three convolutions in evaluation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from conv2former.ops.backend import in_evaluation, operator


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
    """3x3 convolution, GELU, factor and offset, 3x3 convolution, GELU, 2x2 convolution with stride 2.

    The fused form computes a few rows of the output at a time, so that what lies between stays in a cache. The 3x3
    convolutions pad by one. ``scale`` and ``offset`` are the first batch norm's; the second is in weight3 and bias3.

    x (B, I, H, W), weight1 (M, I, 3, 3), scale and offset (M,), weight2 (M, M, 3, 3), weight3 (C, M, 2, 2), bias3 (C,)
    -> (B, C, H / (2 * stride1 * stride2), W / ...), channels last in memory.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  see `modulation`
        if _fits(x, stride1, stride2, weight1, scale, offset, weight2, weight3, bias3):
            return _STEM(x, weight1, scale, offset, weight2, weight3, bias3, stride1, stride2)
    y = F.gelu(F.conv2d(x, weight1, stride=stride1, padding=1)) * scale.view(-1, 1, 1) + offset.view(-1, 1, 1)
    y = F.gelu(F.conv2d(y, weight2, stride=stride2, padding=1))
    return F.conv2d(y, weight3, bias3, stride=2)


def _fits(x: Tensor, stride1: int, stride2: int, *weights: Tensor) -> bool:
    outs, between, ins = weights[4].shape[0], weights[0].shape[0], x.shape[1]
    shapes = (between, ins, 3, 3), (between,), (between,), (between, between, 3, 3), (outs, between, 2, 2), (outs,)
    if x.ndim != 4 or any(weight.shape != shape for weight, shape in zip(weights, shapes, strict=True)):
        return False
    if min(x.shape[2:]) < 1 or min(_sides(x.shape[2], x.shape[3], stride1, stride2)[-1]) < 1:
        return False
    return in_evaluation("stem", x, weights, channels=outs, kernel_size=3)


def _sides(height: int, width: int, stride1: int, stride2: int) -> list[tuple[int, int]]:
    """Height and width behind each convolution."""
    first = (height - 1) // stride1 + 1, (width - 1) // stride1 + 1
    second = (first[0] - 1) // stride2 + 1, (first[1] - 1) // stride2 + 1
    return [first, second, (second[0] // 2, second[1] // 2)]


def _shape(x: Tensor, *rest: Any) -> Tensor:
    *weights, stride1, stride2 = rest
    height, width = _sides(x.shape[2], x.shape[3], stride1, stride2)[-1]
    return x.new_empty(x.shape[0], height, width, weights[4].shape[0]).permute(0, 3, 1, 2)


def _flops(x: Any, weight1: Any, scale: Any, offset: Any, weight2: Any, weight3: Any, *rest: Any, **_: Any) -> int:
    maps = [math.prod(sides) for sides in _sides(x[2], x[3], *rest[1:])]
    weights = weight1, weight2, weight3
    return 2 * x[0] * sum(size * math.prod(weight) for size, weight in zip(maps, weights, strict=True))


_STEM = operator(
    "stem(Tensor x, Tensor weight1, Tensor scale, Tensor offset, Tensor weight2, Tensor weight3, Tensor bias3, "
    "int stride1, int stride2) -> Tensor",
    _shape,
    flops=_flops,
)
