"""Convolutional modulation behind its two linear layers, Eqs. 3-4: ``Z = DWConv(GELU(U)) * V``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from conv2former.ops.backend import depthwise, fused, in_layout_of, kernels, operator, second_derivative


def modulation_reference(u: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``modulation`` in plain PyTorch: the specification."""
    return depthwise(F.gelu(u), weight, bias) * v


def modulation(u: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``DWConv(GELU(u)) * v`` on NHWC tensors.

    The fused forms add up in float32 whatever the dtype, and keep U, V and A for the backward pass, not GELU(U). A
    second derivative is that of the plain form.

    Args:
        u: (B, H, W, C), the output of W1.
        v: (B, H, W, C), the output of W2; u and v may be halves of one tensor.
        weight: (C, 1, k, k), k odd.
        bias: (C,).

    Returns:
        (B, H, W, C) of u's dtype.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out this branch whole, not a longer condition
        if fused("modulation", u, weight, bias, v):
            return modulation_fused(u, v, weight, bias)
    return modulation_reference(u, v, weight, bias)


def modulation_fused(u: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``modulation`` by a kernel, where ``fused`` or ``passes_by`` allows it."""
    leaves = u.requires_grad or v.requires_grad or weight.requires_grad or bias.requires_grad
    keep = torch.is_grad_enabled() and leaves
    return _FORWARD(u, v, weight, bias, keep)[0]


def _backward(g: Tensor, u: Tensor, v: Tensor, a: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    du, dv, dweight, dbias = kernels(u.device).modulation_backward(g, u, v, a, weight)
    return du, dv, in_layout_of(weight, dweight), dbias


def _shapes_backward(
    g: Tensor, u: Tensor, v: Tensor, a: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return u.new_empty(u.shape), v.new_empty(v.shape), torch.empty_like(weight), weight.new_empty(weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    u, v, weight, bias, _ = inputs
    ctx.set_materialize_grads(False)  # A has none
    ctx.save_for_backward(u, v, output[1], weight, bias)


def _gradients(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if g is None:
        return None, None, None, None, None
    u, v, a, weight, bias = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        return *second_derivative(ctx, modulation_reference, g.to(u.dtype), (u, v, weight, bias)), None
    return *_BACKWARD(g.to(u.dtype), u, v, a, weight), None


_FORWARD = operator(
    "modulation(Tensor u, Tensor v, Tensor weight, Tensor bias, bool keep) -> (Tensor, Tensor)",
    lambda u, v, weight, bias, keep: (u.new_empty(u.shape), u.new_empty(u.shape if keep else (0,))),
    gradients=_gradients,
    save=_save,
    flops=lambda u, v, weight, *_, **__: 2 * math.prod(u) * weight[-1] ** 2,
)
_BACKWARD = operator(
    "modulation_backward(Tensor g, Tensor u, Tensor v, Tensor a, Tensor weight) -> (Tensor, Tensor, Tensor, Tensor)",
    _shapes_backward,
    compute=_backward,
    flops=lambda g, u, v, a, weight, **_: 4 * math.prod(u) * weight[-1] ** 2,
)
