"""Blocks in evaluation, from the first normalisation to the last sum, Fig. 3(d).

Norms' factors and layer scales are expected in the weights (``models.fused``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from conv2former.ops.backend import in_evaluation, operator
from conv2former.ops.mlp import mlp_middle
from conv2former.ops.modulation import modulation


def blocks(x: Tensor, weights: list[Tensor], dim: int, hidden: int, kernel_size: int, eps: float) -> Tensor:
    """Blocks of one width, one after the other: a modulation branch and an MLP branch each.

    ``x = x + proj(modulation(u, v))`` with u and v the halves of ``w(norm(x))``, then ``x = x +
    fc2(mlp_middle(fc1(norm(x))))``. The fused form never has more of the hidden layer than fits a processor's cache,
    or, where there are fewer images than threads, that of some 16,000 positions.

    Args:
        x: (B, H, W, C); the output has the same shape.
        weights: Those of each block in one row, see ``block_weights``: PyTorch then checks one tensor and not twelve.
        dim: Channels C, since a compiler may leave the sizes of x open.
        hidden: Width D of the MLP's hidden layer.
        kernel_size: Side k of the modulation's kernel.
        eps: Of the normalisations.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  see `modulation`
        if _fits(x, weights, dim, hidden, kernel_size):
            return _BLOCKS(x, weights, dim, hidden, kernel_size, eps)
    for row in weights:
        parts = block_weights(row, dim, hidden, kernel_size)
        w, w_bias, dw_weight, dw_bias, proj, proj_bias = parts[:6]
        u, v = F.linear(F.layer_norm(x, x.shape[-1:], eps=eps), w, w_bias).chunk(2, dim=-1)
        x = x + F.linear(modulation(u, v, dw_weight, dw_bias), proj, proj_bias)
        fc1, fc1_bias, dw_weight, dw_bias, fc2, fc2_bias = parts[6:]
        h = F.linear(F.layer_norm(x, x.shape[-1:], eps=eps), fc1, fc1_bias)
        x = x + F.linear(mlp_middle(h, dw_weight, dw_bias), fc2, fc2_bias)
    return x


def block_weights(row: Tensor, dim: int, hidden: int, kernel_size: int) -> list[Tensor]:
    """The weights of a block, views of the tensor (n,) that has them one after the other.

    Each begins at a multiple of 64 numbers, as kernels like it.

    Returns:
        W1 above W2 (2C, C) and its bias; the depthwise weight (C, 1, k, k) and its bias; proj (C, C) and its bias; fc1
        (D, C) and its bias; the depthwise weight (D, 1, 3, 3) and its bias; fc2 (C, D) and its bias.

    Raises:
        ValueError: There are more or fewer numbers than that.
    """
    parts: list[Tensor] = []
    start = 0
    for shape in _shapes(dim, hidden, kernel_size):
        size = 1
        for side in shape:
            size *= side
        if start + size <= len(row):
            parts.append(row[start : start + size].view(shape))
        start += (size + 63) // 64 * 64
    if start != len(row):  # not its shape, which a trace would record
        raise ValueError(f"the weights of a block are {len(row)} numbers, and {start} are needed")
    return parts


def join_block_weights(parts: Sequence[Tensor]) -> Tensor:
    """The opposite of ``block_weights``, a copy."""
    return torch.cat([F.pad(part.flatten(), (0, -part.numel() % 64)) for part in parts])


def _shapes(dim: int, hidden: int, kernel_size: int) -> list[list[int]]:
    shapes = [[2 * dim, dim], [2 * dim], [dim, 1, kernel_size, kernel_size], [dim], [dim, dim], [dim]]
    shapes += [[hidden, dim], [hidden], [hidden, 1, 3, 3], [hidden], [dim, hidden], [dim]]
    return shapes


def _fits(x: Tensor, weights: Sequence[Tensor], dim: int, hidden: int, kernel_size: int) -> bool:
    if x.ndim != 4 or x.shape[-1] != dim or not weights or hidden < 1 or kernel_size < 1 or kernel_size % 2 == 0:
        return False
    size = sum((math.prod(shape) + 63) // 64 * 64 for shape in _shapes(dim, hidden, kernel_size))
    if any(row.ndim != 1 or len(row) != size for row in weights):
        return False
    return in_evaluation("blocks", x, weights, channels=dim, kernel_size=kernel_size)


def _flops(x: Any, weights: Any, dim: int, hidden: int, kernel_size: int, *_: Any, **__: Any) -> int:
    batch, height, width, _ = x
    each = 3 * dim**2 + 2 * dim * hidden + kernel_size**2 * dim + 9 * hidden
    return 2 * batch * height * width * len(weights) * each


_BLOCKS = operator(
    "blocks(Tensor x, Tensor[] weights, int dim, int hidden, int kernel_size, float eps) -> Tensor",
    lambda x, *_: x.new_empty(x.shape),
    flops=_flops,
)
