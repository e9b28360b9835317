"""Modulation and the MLP's middle, forward and backward: ``depthwise.cpp``."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from conv2former.ops.cpu.calls import settings, strided
from conv2former_runtime.layers import call
from conv2former_runtime.library import load


def _floats(x: Tensor) -> Tensor:
    return x.detach().to(torch.float32).contiguous()


def modulation(u: Tensor, v: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """``modulation`` and, with ``keep``, the weights A that its backward pass needs (else an empty tensor)."""
    z = u.new_empty(u.shape)
    a = u.new_empty(u.shape if keep else (0,))
    if z.numel():
        at_u, at_v = strided(u), strided(v)
        weight, bias = _floats(weight), _floats(bias)
        arguments = (*at_u, *at_v, weight, bias, z, a if keep else None)
        call("modulation", (*u.shape, weight.shape[-1]), *arguments, **settings(u))
    return z, a


def modulation_backward(
    g: Tensor, u: Tensor, v: Tensor, a: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, v, weight and bias, from that of the output."""
    if a.shape != u.shape:
        raise ValueError("modulation was computed without keep=True: its backward pass needs A")
    du, dv = u.new_empty(u.shape), v.new_empty(v.shape)
    sums = _partial_sums(u, weight)
    if du.numel():
        at_u, at_v = strided(u), strided(v)
        g, a, dw_weight = g.contiguous(), a.contiguous(), _floats(weight)
        arguments = (g, *at_u, *at_v, a, dw_weight, du, dv, sums)
        call("modulation_backward", (*u.shape, weight.shape[-1]), *arguments, **settings(u))
    return du, dv, *_weight_and_bias(sums, weight)


def mlp_middle(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = u.new_empty(u.shape)
    if out.numel():
        at_u = strided(u)
        weight, bias = _floats(weight), _floats(bias)
        call("mlp_middle", (*u.shape, 3), *at_u, weight, bias, out, **settings(u))
    return out


def mlp_middle_backward(g: Tensor, u: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u, weight and bias, from that of the output."""
    du = u.new_empty(u.shape)
    sums = _partial_sums(u, weight)
    if du.numel():
        at_u = strided(u)
        g, dw_weight, offsets = g.contiguous(), _floats(weight), _floats(bias)
        arguments = (g, *at_u, dw_weight, offsets, du, sums)
        call("mlp_middle_backward", (*u.shape, 3), *arguments, **settings(u))
    return du, *_weight_and_bias(sums, weight)


def _partial_sums(u: Tensor, weight: Tensor) -> Tensor:
    """(parts, k * k + 1, C): a part of the images each, the bias last."""
    batch, _, _, channels = u.shape
    parts = load().conv2former_groups(ctypes.c_long(batch), ctypes.c_long(channels)) if u.numel() else 0
    return torch.empty(parts, weight.shape[-1] ** 2 + 1, channels)


def _weight_and_bias(sums: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dw_weight, bias = sums[:, :-1].sum(0), sums[:, -1].sum(0)
    return dw_weight.t().reshape(weight.shape).to(weight.dtype), bias.to(weight.dtype)
