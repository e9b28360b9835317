"""Between the two linear layers of the MLP: ``H + GELU(DWConv3x3(H))`` with ``H = GELU(U)``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from conv2former.ops.backend import depthwise, fused, in_layout_of, kernels, operator, second_derivative


def mlp_middle_reference(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``mlp_middle`` in plain PyTorch: the specification."""
    h = F.gelu(u)
    return h + F.gelu(depthwise(h, weight, bias))


def mlp_middle(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``h + GELU(DWConv(h))`` with ``h = GELU(u)`` on NHWC tensors.

    The fused forms add up in float32 whatever the dtype and keep nothing but u for the backward pass. A second
    derivative is that of the plain form.

    Args:
        u: (B, H, W, C), the output of the first linear layer.
        weight: (C, 1, 3, 3).
        bias: (C,).

    Returns:
        (B, H, W, C) of u's dtype.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out this branch whole, not a longer condition
        if fused("mlp_middle", u, weight, bias):
            return mlp_middle_fused(u, weight, bias)
    return mlp_middle_reference(u, weight, bias)


def mlp_middle_fused(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``mlp_middle`` by a kernel, where ``fused`` or ``passes_by`` allows it."""
    return _FORWARD(u, weight, bias)


def _backward(g: Tensor, u: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    du, dweight, dbias = kernels(u.device).mlp_middle_backward(g, u, weight, bias)
    return du, in_layout_of(weight, dweight), dbias


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    u, weight, bias = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        return second_derivative(ctx, mlp_middle_reference, g.to(u.dtype), (u, weight, bias))
    return _BACKWARD(g.to(u.dtype), u, weight, bias)


_FORWARD = operator(
    "mlp_middle(Tensor u, Tensor weight, Tensor bias) -> Tensor",
    lambda u, weight, bias: u.new_empty(u.shape),
    gradients=_gradients,
    save=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    flops=lambda u, *_, **__: 2 * math.prod(u) * 9,
)
_BACKWARD = operator(
    "mlp_middle_backward(Tensor g, Tensor u, Tensor weight, Tensor bias) -> (Tensor, Tensor, Tensor)",
    lambda g, u, weight, bias: (u.new_empty(u.shape), torch.empty_like(weight), bias.new_empty(bias.shape)),
    compute=_backward,
    flops=lambda g, u, *_, **__: 4 * math.prod(u) * 9,
)
