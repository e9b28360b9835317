"""The fused network as other runtimes like it: 1x1 convolutions on NCHW.

Our own kernels want channels last and linear layers. Other runtimes then transpose around every depthwise convolution;
here there is nothing to transpose. Normalisations are written out over the channels, since no runtime has an operation
of its own for that. Numbers differ by rounding alone.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conv2former.models.classifier import Head
from conv2former.models.conv2former import Stage
from conv2former.models.fused import FusedBlocks, FusedDownsample, FusedStem, fusable_head
from conv2former.ops import stem
from conv2former.ops.blocks import block_weights


def channels_first(network: nn.Module) -> nn.Module:
    """A copy of a network whose fused parts compute on NCHW; it has the same weights in memory."""
    made = copy.deepcopy(network, {id(weight): weight for weight in network.parameters()})
    for parent in list(made.modules()):
        for name, child in parent.named_children():
            if (other := _replaced(child)) is not None:
                setattr(parent, name, other)
    return made


def _replaced(part: Any) -> nn.Module | None:
    if isinstance(part, FusedStem):
        return _Stem(part)
    if isinstance(part, Head) and part.fused and fusable_head(part):
        return _Head(part)
    if isinstance(part, Stage) and isinstance(part.blocks, FusedBlocks):
        down: Any = part.downsample
        if isinstance(down, nn.Identity | FusedDownsample):
            first = [] if isinstance(down, nn.Identity) else [_Downsample(down)]
            return nn.Sequential(*first, *map(_Block, part.blocks)).eval()
    return None


def normalised(x: Tensor, eps: float) -> Tensor:
    """(B, C, H, W), each position's channels with mean 0 and variance 1."""
    x = x - x.mean(1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps)


class _Stem(nn.Module):
    def __init__(self, fused: FusedStem) -> None:
        super().__init__()
        self.stem = fused

    def forward(self, x: Tensor) -> Tensor:
        return stem(x, *self.stem.weights(), self.stem.stride1, self.stem.stride2)


class _Downsample(nn.Module):
    def __init__(self, down: FusedDownsample) -> None:
        super().__init__()
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(normalised(x, self.down.eps), self.down.weight, self.down.bias, stride=2)


class _Block(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """``ops.blocks`` on NCHW."""
        block = self.block
        parts = block_weights(block.weights, block.dim, block.hidden, block.kernel_size)
        parts = [part[..., None, None] if part.ndim == 2 else part for part in parts]
        w, w_bias, dw_weight, dw_bias, proj, proj_bias = parts[:6]
        h = normalised(x, block.eps)  # two products: a runtime may then do GELU and the product with v on the way
        u, v = (F.conv2d(h, *half) for half in zip(w.chunk(2), w_bias.chunk(2), strict=True))
        a = F.conv2d(F.gelu(u), dw_weight, dw_bias, padding=block.kernel_size // 2, groups=block.dim)
        x = x + F.conv2d(a * v, proj, proj_bias)
        fc1, fc1_bias, dw_weight, dw_bias, fc2, fc2_bias = parts[6:]
        h = F.gelu(F.conv2d(normalised(x, block.eps), fc1, fc1_bias))
        h = h + F.gelu(F.conv2d(h, dw_weight, dw_bias, padding=1, groups=block.hidden))
        return x + F.conv2d(h, fc2, fc2_bias)


class _Head(nn.Module):
    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, fc = self.head.conv, self.head.norm, self.head.fc
        x = F.gelu(F.conv2d(x, conv.weight[..., None, None], conv.bias))
        return F.linear(normalised(x, norm.eps).mean((2, 3)) * norm.weight + norm.bias, fc.weight, fc.bias)
