"""The classifier in evaluation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from conv2former.ops.backend import in_evaluation, operator


def head(
    x: Tensor, weight1: Tensor, bias1: Tensor, scale: Tensor, offset: Tensor, weight2: Tensor, bias2: Tensor, eps: float
) -> Tensor:
    """Linear layer, GELU, LayerNorm, mean over positions, linear layer; scale, offset and eps are the norm's.

    x (B, H, W, C), weight1 (D, C), bias1, scale and offset (D,), weight2 (K, D), bias2 (K,) -> (B, K).
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  see `modulation`
        if _fits(x, weight1, bias1, scale, offset, weight2, bias2):
            return _HEAD(x, weight1, bias1, scale, offset, weight2, bias2, eps)
    hidden = F.gelu(F.linear(x, weight1, bias1))
    return F.linear(F.layer_norm(hidden, scale.shape, scale, offset, eps).mean((1, 2)), weight2, bias2)


def _fits(x: Tensor, *weights: Tensor) -> bool:
    c, d, k = weights[0].shape[-1], len(weights[1]), len(weights[5])
    shapes = (d, c), (d,), (d,), (d,), (k, d), (k,)
    if x.ndim != 4 or x.shape[-1] != c or min(x.shape[1:3]) < 1:
        return False
    if any(weight.shape != shape for weight, shape in zip(weights, shapes, strict=True)):
        return False
    return in_evaluation("head", x, weights, channels=min(c, d), kernel_size=1)


def _flops(x: Any, weight1: Any, bias1: Any, scale: Any, offset: Any, weight2: Any, *_: Any, **__: Any) -> int:
    return 2 * (math.prod(x[:3]) * math.prod(weight1) + x[0] * math.prod(weight2))


_HEAD = operator(
    "head(Tensor x, Tensor weight1, Tensor bias1, Tensor scale, Tensor offset, Tensor weight2, Tensor bias2, "
    "float eps) -> Tensor",
    lambda x, weight1, bias1, scale, offset, weight2, bias2, eps: x.new_empty(x.shape[0], weight2.shape[0]),
    flops=_flops,
)
