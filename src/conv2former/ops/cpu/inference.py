"""The operations of evaluation, on tensors: ``conv2former_runtime.layers``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from conv2former.ops.blocks import block_weights
from conv2former.ops.cpu.calls import settings
from conv2former.ops.cpu.packing import pack, packed
from conv2former_runtime import layers
from conv2former_runtime.packing import Array, block_parts, downsample_parts, head_parts, stem_parts


def blocks(x: Tensor, weights: list[Tensor], dim: int, hidden: int, kernel_size: int, eps: float) -> Tensor:
    x = x.contiguous()
    out, between = torch.empty_like(x), torch.empty_like(x)
    found = packed(weights, _packed_branches, dim, hidden, kernel_size)
    layers.blocks(x, found, between, out, hidden=hidden, kernel_size=kernel_size, eps=eps, **settings(x))
    return out


def _packed_branches(weights: Sequence[Tensor], dim: int, hidden: int, kernel_size: int) -> list[Array]:
    """Where the weights of each branch begin: those of a branch lie in a row."""
    parts = block_parts(dim, hidden, kernel_size)
    rows = [branches(row, dim, hidden, kernel_size) for row in weights]
    return [pack(each, branch)[0] for row in rows for each, branch in zip(parts, row, strict=True)]


def branches(row: Tensor, dim: int, hidden: int, kernel_size: int) -> tuple[list[Tensor], list[Tensor]]:
    """The weights of a block's two branches, as ``block_parts`` lists them."""
    first, first_bias, *rest = block_weights(row, dim, hidden, kernel_size)
    both = [each for half in zip(first.chunk(2), first_bias.chunk(2), strict=True) for each in half]
    return [*both, *rest[:4]], rest[4:]


def stem(x: Tensor, *rest: Any) -> Tensor:
    *weights, stride1, stride2 = rest
    weight1, _, _, _, weight3, _ = weights
    x = x.permute(0, 2, 3, 1).contiguous()
    ins, mid, outs, strides = x.shape[-1], len(weight1), len(weight3), (stride1, stride2)
    out = x.new_empty(layers.stem_shape(tuple(x.shape), outs, strides))
    parts = packed(weights, lambda weights: pack(stem_parts(ins, mid, outs), weights))
    layers.stem(x, parts, out, mid=mid, strides=strides, **settings(x))
    return out.permute(0, 3, 1, 2)


def downsample(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    out = x.new_empty(len(x), x.shape[1] // 2, x.shape[2] // 2, len(weight))
    sizes = x.shape[-1], len(weight)
    parts = packed((weight, bias), lambda weights: pack(downsample_parts(*sizes), weights))
    layers.downsample(x, parts, out, eps=eps, **settings(x))
    return out


def head(x: Tensor, *rest: Any) -> Tensor:
    *weights, eps = rest
    weight1, _, _, _, weight2, _ = weights
    x = x.contiguous()
    out = x.new_empty(len(x), len(weight2))
    sizes = x.shape[-1], len(weight1), len(weight2)
    parts = packed(weights, lambda weights: pack(head_parts(*sizes), weights))
    layers.head(x, parts, out, hidden=len(weight1), eps=eps, **settings(x))
    return out
