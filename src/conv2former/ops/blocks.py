"""Blocks in evaluation, from the first normalisation to the last sum, Fig. 3(d).

Norms' factors and layer scales are taken to be in the weights already (``fusing``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from conv2former.ops.backend import in_evaluation, kernels, operator
from conv2former.ops.mlp import mlp_middle
from conv2former.ops.modulation import modulation

__all__ = ["blocks"]

EACH = 12  # tensors of a block; `blocks` has the number itself, since TorchScript sees no constants


def blocks(x: Tensor, weights: list[Tensor], eps: float) -> Tensor:
    """Blocks of one width, one after the other: a modulation branch and an MLP branch each.

    ``x = x + proj(modulation(u, v))`` with u and v the halves of ``w(norm(x))``, then ``x = x +
    fc2(mlp_middle(fc1(norm(x))))``. The fused form never has more of the MLP's hidden layer than fits a processor's
    cache. Where there are fewer images than threads it adds up parts of that layer in an order that depends on the
    number of threads.

    Args:
        x: (B, H, W, C).
        weights: Of each block w (2C, C), that is W1 above W2, its bias, taps (C, 1, k, k) of the depthwise convolution,
            its bias, proj (C, C), its bias; fc1 (D, C), its bias, taps (D, 1, 3, 3), their bias, fc2 (C, D), its bias.
        eps: Of the normalisations.

    Returns:
        (B, H, W, C).
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  see `modulation`
        if _fits(x, weights):
            return _BLOCKS(x, weights, eps)
    for i in range(0, len(weights), 12):
        w, w_bias, taps, taps_bias, proj, proj_bias = weights[i : i + 6]
        u, v = F.linear(F.layer_norm(x, x.shape[-1:], eps=eps), w, w_bias).chunk(2, dim=-1)
        x = x + F.linear(modulation(u, v, taps, taps_bias), proj, proj_bias)
        fc1, fc1_bias, taps, taps_bias, fc2, fc2_bias = weights[i + 6 : i + 12]
        h = F.linear(F.layer_norm(x, x.shape[-1:], eps=eps), fc1, fc1_bias)
        x = x + F.linear(mlp_middle(h, taps, taps_bias), fc2, fc2_bias)
    return x


def _fits(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the fused form is to compute them: it can, and the shapes are those of blocks that are all alike."""
    if x.ndim != 4 or len(weights) < EACH or len(weights) % EACH:
        return False
    c, d, k = x.shape[-1], weights[6].shape[0], weights[2].shape[-1]
    modulation_shapes = (2 * c, c), (2 * c,), (c, 1, k, k), (c,), (c, c), (c,)
    shapes = *modulation_shapes, (d, c), (d,), (d, 1, 3, 3), (d,), (c, d), (c,)
    if k % 2 == 0 or any(weight.shape != shapes[i % EACH] for i, weight in enumerate(weights)):
        return False
    return in_evaluation("blocks", x, weights, channels=c, kernel_size=k)


def _blocks(x: Tensor, weights: list[Tensor], eps: float) -> Tensor:
    return kernels(x.device).blocks(x, weights, eps)


def _shape(x: Tensor, weights: list[Tensor], eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _flops(x: Any, weights: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * sum(math.prod(weight) for weight in weights if len(weight) > 1)


_BLOCKS = operator("blocks(Tensor x, Tensor[] weights, float eps) -> Tensor", _blocks, _shape, flops=_flops)
