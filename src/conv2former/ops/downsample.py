"""What stands between two stages, in evaluation."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from conv2former.ops.backend import in_evaluation, operator


def downsample(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalisation over channels and 2x2 convolution with stride 2 (Sec. 3.1, "patch embedding" between stages).

    The norm's factor and offset are expected in the weights (``models.fused``). A row or column left over is dropped.

    x (B, H, W, C), weight (D, C, 2, 2), bias (D,), the norm's eps -> (B, H / 2, W / 2, D).
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  see `modulation`
        if _fits(x, weight, bias):
            return _DOWNSAMPLE(x, weight, bias, eps)
    x = F.layer_norm(x, x.shape[-1:], eps=eps).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias, stride=2).permute(0, 2, 3, 1)


def _fits(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    if x.ndim != 4 or weight.shape != (len(bias), x.shape[-1], 2, 2) or bias.ndim != 1 or min(x.shape[1:3]) < 2:
        return False
    return in_evaluation("downsample", x, (weight, bias), channels=min(weight.shape[:2]), kernel_size=3)


_DOWNSAMPLE = operator(
    "downsample(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
    lambda x, weight, bias, eps: x.new_empty(x.shape[0], x.shape[1] // 2, x.shape[2] // 2, weight.shape[0]),
    flops=lambda x, weight, *_, **__: 2 * x[0] * (x[1] // 2) * (x[2] // 2) * math.prod(weight),
)
