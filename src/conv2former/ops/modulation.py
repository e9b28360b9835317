"""Convolutional modulation behind its two linear layers, Eqs. 3-4: ``Z = DWConv(GELU(U)) * V``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from conv2former.ops.backend import depthwise, fused, kernels, operator, refuse_gradients

__all__ = ["modulation", "modulation_reference"]


def modulation_reference(u: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``modulation`` in plain PyTorch: the specification."""
    return depthwise(F.gelu(u), weight, bias) * v


def modulation(u: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``DWConv(GELU(u)) * v`` on NHWC tensors.

    The fused forms compute in float32 whatever the dtype, and keep U, V and A for the backward pass, not GELU(U). They
    have no second derivative.

    Args:
        u: (B, H, W, C), the output of W1.
        v: (B, H, W, C), the output of W2; u and v may be halves of one tensor.
        weight: (C, 1, k, k), k odd.
        bias: (C,).

    Returns:
        (B, H, W, C) of u's dtype.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out this branch whole, not a longer condition
        if fused(u, weight) and u.dtype == v.dtype:
            keep = torch.is_grad_enabled() and (u.requires_grad or v.requires_grad or weight.requires_grad)
            return _FORWARD(u, v, weight, bias, keep)[0]
    return modulation_reference(u, v, weight, bias)


def _modulation(u: Tensor, v: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    return kernels(u.device).modulation(u, v, weight, bias, keep)


def _shapes(u: Tensor, v: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), u.new_empty(u.shape if keep else (0,))


def _modulation_backward(
    g: Tensor, u: Tensor, v: Tensor, a: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return kernels(u.device).modulation_backward(g, u, v, a, weight)


def _shapes_backward(
    g: Tensor, u: Tensor, v: Tensor, a: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return u.new_empty(u.shape), v.new_empty(v.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    u, v, weight, _, _ = inputs
    ctx.save_for_backward(u, v, output[1], weight)


def _gradients(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    u, v, a, weight = ctx.saved_tensors
    return *_BACKWARD(g.to(u.dtype), u, v, a, weight), None


_FORWARD = operator(
    "modulation(Tensor u, Tensor v, Tensor weight, Tensor bias, bool keep) -> (Tensor, Tensor)", _modulation, _shapes
)
_BACKWARD = operator(
    "modulation_backward(Tensor g, Tensor u, Tensor v, Tensor a, Tensor weight) -> (Tensor, Tensor, Tensor, Tensor)",
    _modulation_backward,
    _shapes_backward,
)
torch.library.register_autograd("conv2former::modulation", _gradients, setup_context=_save)
refuse_gradients("modulation_backward")
