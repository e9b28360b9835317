"""The two branches of a block in evaluation, with the normalisation before and the sum behind them, Fig. 3(d).

Norms' factors and layer scales are taken to be in the weights already (``fusing``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from conv2former.ops.backend import in_evaluation, kernels, operator
from conv2former.ops.mlp import mlp_middle
from conv2former.ops.modulation import modulation

__all__ = ["mlp_branch", "modulation_branch"]


def modulation_branch(
    x: Tensor, w: Tensor, w_bias: Tensor, taps: Tensor, taps_bias: Tensor, proj: Tensor, proj_bias: Tensor, eps: float
) -> Tensor:
    """``x + proj(modulation(u, v))`` with u and v the halves of ``w(norm(x))``.

    Args:
        x: (B, H, W, C).
        w: (2C, C) with w_bias (2C,): W1 above W2.
        taps: (C, 1, k, k) with taps_bias (C,), of the depthwise convolution.
        proj: (C, C) with proj_bias (C,).
        eps: Of the normalisation.

    Returns:
        (B, H, W, C).
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  see `modulation`
        if _fits("modulation_branch", x, w, w_bias, taps, taps_bias, proj, proj_bias, parts=2):
            return _MODULATION(x, w, w_bias, taps, taps_bias, proj, proj_bias, eps)
    u, v = F.linear(F.layer_norm(x, x.shape[-1:], eps=eps), w, w_bias).chunk(2, dim=-1)
    return x + F.linear(modulation(u, v, taps, taps_bias), proj, proj_bias)


def mlp_branch(
    x: Tensor, fc1: Tensor, fc1_bias: Tensor, taps: Tensor, taps_bias: Tensor, fc2: Tensor, fc2_bias: Tensor, eps: float
) -> Tensor:
    """``x + fc2(mlp_middle(fc1(norm(x))))``.

    The fused form never has more of the hidden layer than fits a processor's cache. Where there are fewer images than
    threads it adds up parts of the hidden layer in an order that depends on the number of threads.

    Args:
        x: (B, H, W, C).
        fc1: (D, C) with fc1_bias (D,).
        taps: (D, 1, 3, 3) with taps_bias (D,), of the depthwise convolution.
        fc2: (C, D) with fc2_bias (C,).
        eps: Of the normalisation.

    Returns:
        (B, H, W, C).
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  see `modulation`
        if _fits("mlp_branch", x, fc1, fc1_bias, taps, taps_bias, fc2, fc2_bias, parts=1):
            return _MLP(x, fc1, fc1_bias, taps, taps_bias, fc2, fc2_bias, eps)
    h = F.linear(F.layer_norm(x, x.shape[-1:], eps=eps), fc1, fc1_bias)
    return x + F.linear(mlp_middle(h, taps, taps_bias), fc2, fc2_bias)


def _fits(operation: str, x: Tensor, *weights: Tensor, parts: int) -> bool:
    """Whether the fused form is to compute a branch; its first product has ``parts`` outputs a depthwise channel."""
    channels, inner, size = x.shape[-1], weights[2].shape[0], weights[2].shape[-1]
    outs = parts * inner
    shapes = (outs, channels), (outs,), (inner, 1, size, size), (inner,), (channels, inner), (channels,)
    if x.ndim != 4 or any(weight.shape != shape for weight, shape in zip(weights, shapes, strict=True)):
        return False
    return size % 2 == 1 and in_evaluation(operation, x, weights, channels=channels, kernel_size=size)


def _modulation_branch(x: Tensor, *arguments: Any) -> Tensor:
    return kernels(x.device).modulation_branch(x, *arguments)


def _mlp_branch(x: Tensor, *arguments: Any) -> Tensor:
    return kernels(x.device).mlp_branch(x, *arguments)


def _shape(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _flops(x: Any, first: Any, _: Any, taps: Any, __: Any, last: Any, *___: Any, **____: Any) -> int:
    return 2 * math.prod(x[:-1]) * (math.prod(first) + math.prod(taps) + math.prod(last))


_WEIGHTS = "Tensor {0}, Tensor {0}_bias, Tensor taps, Tensor taps_bias, Tensor {1}, Tensor {1}_bias, float eps"
_MODULATION = operator(
    f"modulation_branch(Tensor x, {_WEIGHTS.format('w', 'proj')}) -> Tensor", _modulation_branch, _shape, flops=_flops
)
_MLP = operator(f"mlp_branch(Tensor x, {_WEIGHTS.format('fc1', 'fc2')}) -> Tensor", _mlp_branch, _shape, flops=_flops)
