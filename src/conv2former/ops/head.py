"""The classifier in evaluation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from conv2former.ops.backend import in_evaluation, operator


def head_reference(
    x: Tensor, weight1: Tensor, bias1: Tensor, scale: Tensor, offset: Tensor, weight2: Tensor, bias2: Tensor, eps: float
) -> Tensor:
    """``head`` in plain PyTorch: the specification."""
    hidden = F.gelu(F.linear(x, weight1, bias1))
    return F.linear(F.layer_norm(hidden, scale.shape, scale, offset, eps).mean((1, 2)), weight2, bias2)


def head(
    x: Tensor, weight1: Tensor, bias1: Tensor, scale: Tensor, offset: Tensor, weight2: Tensor, bias2: Tensor, eps: float
) -> Tensor:
    """Linear layer, GELU, LayerNorm, mean over positions, linear layer.

    Args:
        x: (B, H, W, C).
        weight1: (D, C), with bias1 (D,).
        scale: Of the norm, (D,), with offset (D,).
        weight2: (K, D), with bias2 (K,).
        eps: Of the norm.

    Returns:
        (B, K).
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  see `modulation`
        if _fits(x, weight1, bias1, scale, offset, weight2, bias2):
            return _HEAD(x, weight1, bias1, scale, offset, weight2, bias2, eps)
    return head_reference(x, weight1, bias1, scale, offset, weight2, bias2, eps)


def _fits(x: Tensor, *weights: Tensor) -> bool:
    c, d, k = weights[0].shape[-1], len(weights[1]), len(weights[5])
    shapes = (d, c), (d,), (d,), (d,), (k, d), (k,)
    if (
        x.ndim != 4
        or x.shape[-1] != c
        or min(x.shape[1:3]) < 1
        or any(w.shape != s for w, s in zip(weights, shapes, strict=True))
    ):
        return False
    return in_evaluation("head", x, weights, channels=min(c, d), kernel_size=1)


def _shape(
    x: Tensor, weight1: Tensor, bias1: Tensor, scale: Tensor, offset: Tensor, weight2: Tensor, bias2: Tensor, eps: float
) -> Tensor:
    return x.new_empty(x.shape[0], weight2.shape[0])


def _flops(x: Any, weight1: Any, bias1: Any, scale: Any, offset: Any, weight2: Any, *_: Any, **__: Any) -> int:
    return 2 * (math.prod(x[:3]) * math.prod(weight1) + x[0] * math.prod(weight2))


_HEAD = operator(
    "head(Tensor x, Tensor weight1, Tensor bias1, Tensor scale, Tensor offset, Tensor weight2, Tensor bias2, "
    "float eps) -> Tensor",
    _shape,
    flops=_flops,
)
