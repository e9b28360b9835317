"""Inference with fewer operations: what ``Conv2Former.fuse`` puts in the place of the network's parts.

Constant factors and offsets go into the linear layer or convolution beside them: batch norm and the affine part of
LayerNorm into what follows, layer scale into what stands before, and W1 and W2 become one product. The parts are for
evaluation alone: no dropout, no stochastic depth, no gradients needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.layers.trace_utils import _assert
from torch import Tensor, nn
from torch.nn import functional as F

from conv2former.ops import mlp_branch, modulation_branch

torch.fx.wrap("mlp_branch")
torch.fx.wrap("modulation_branch")


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Factor and offset of each channel, (C,) float64 each, behind a LayerNorm's normalisation or of a BatchNorm."""
    scale, offset = norm.weight.detach().double(), norm.bias.detach().double()
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        assert norm.running_mean is not None and norm.running_var is not None
        scale = scale / (norm.running_var.double() + norm.eps).sqrt()
        offset = offset - norm.running_mean.double() * scale
    return scale, offset


def linear_behind(layer: Any, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias, float64, of ``layer(scale * x + offset)`` as one layer on x: linear, or unpadded convolution."""
    weight = layer.weight.detach().double()
    shape = (1, -1) + (1,) * (weight.ndim - 2)
    bias = (weight * offset.view(shape)).flatten(1).sum(1)
    if layer.bias is not None:
        bias = bias + layer.bias.detach().double()
    return weight * scale.view(shape), bias


def scaled(layer: Any, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``scale * layer(x)``, in float64."""
    factor = torch.ones_like(layer.bias) if scale is None else scale.detach()
    return layer.weight.detach().double() * factor.double()[:, None], layer.bias.detach().double() * factor.double()


def set_linear(like: Any, weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer of these numbers, (out, in) and (out,), with the dtype and device of ``like``."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight.to(like.weight), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(like.weight), requires_grad=False)
    return layer


def set_conv(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> None:
    """Gives a convolution other numbers."""
    kept = conv.weight
    conv.weight = nn.Parameter(weight.to(kept), requires_grad=False)
    conv.bias = None if bias is None else nn.Parameter(bias.to(kept), requires_grad=False)


class FusedBlock(nn.Module):
    """``Block`` for inference: two normalisations, four products, the two operations between them.

    Args:
        block: Of the trained network, with ``ConvMod``.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.eps = block.norm1.eps
        mod, mlp = block.mod, block.mlp
        parts = [linear_behind(layer, *affine(block.norm1)) for layer in (mod.w1, mod.w2)]
        self.w = set_linear(mod.w1, *(torch.cat(both) for both in zip(*parts, strict=True)))
        self.mod_dwconv = mod.dwconv
        self.proj = set_linear(mod.proj, *scaled(mod.proj, getattr(block.ls1, "gamma", None)))
        self.fc1 = set_linear(mlp.fc1, *linear_behind(mlp.fc1, *affine(block.norm2)))
        self.mlp_dwconv = mlp.dwconv
        self.fc2 = set_linear(mlp.fc2, *scaled(mlp.fc2, getattr(block.ls2, "gamma", None)))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        w, proj, fc1, fc2 = self.w, self.proj, self.fc1, self.fc2
        taps, offsets = self.mod_dwconv.taps()
        x = modulation_branch(x, w.weight, w.bias, taps, offsets, proj.weight, proj.bias, self.eps)
        taps, offsets = self.mlp_dwconv.taps()
        return mlp_branch(x, fc1.weight, fc1.bias, taps, offsets, fc2.weight, fc2.bias, self.eps)


class ConvBehindNorm(nn.Module):
    """A convolution with what a batch norm before it adds and multiplies.

    Zero padding comes behind the norm, so the offset's share of the output is smaller at the borders of the map: it is
    found by the convolution of a map of 8 or 9 positions a side, whose rows are the first, one of the middle, the last.

    Args:
        conv: The convolution, without bias; no kernel above 3 and no padding above 1 where it is padded. Its output is
            to have at least two positions a side, which the networks' smallest images give.
        norm: The batch norm.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module) -> None:
        super().__init__()
        scale, offset = affine(norm)
        weight, bias = linear_behind(conv, scale, offset)
        padded = any(conv.padding)
        self.taps, self.offset = None, None
        if padded:
            self.taps = nn.Parameter(conv.weight.detach().clone(), requires_grad=False)
            self.offset = nn.Parameter(offset.to(conv.weight), requires_grad=False)
        self.stride, self.padding = cast(tuple[int, int], conv.stride), cast(tuple[int, int], conv.padding)
        set_conv(conv, weight, None if padded else bias)
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        y = self.conv(x)
        if self.taps is None or self.offset is None:
            return y
        height, width = 8 + x.shape[-2] % 2, 8 + x.shape[-1] % 2
        constant = self.offset.view(1, -1, 1, 1).expand(-1, -1, height, width)
        share = F.conv2d(constant, self.taps, stride=self.stride, padding=self.padding)
        for dim in (2, 3):
            position = torch.arange(y.shape[dim], device=y.device)
            last = share.shape[dim] - 1
            row = (position > 0).long() + (position == y.shape[dim] - 1) * (last - 1)
            share = share.index_select(dim, row)
        return y + share


class FusedStem(nn.Module):
    """The three-convolution stem or embedding without batch norms: convolution, GELU, twice, convolution.

    Args:
        convs: The three convolutions.
        norms: The batch norms behind the first two.
        min_size: Smaller images are refused.
    """

    def __init__(self, convs: Sequence[Any], norms: Sequence[Any], *, min_size: int) -> None:
        super().__init__()
        self.conv1, self.min_size = convs[0], min_size
        self.conv2, self.conv3 = (ConvBehindNorm(conv, norm) for conv, norm in zip(convs[1:], norms, strict=True))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, dim, H / stride, W / stride), channels last in memory."""
        check_image_size(x, self.min_size)
        x = x.contiguous(memory_format=torch.channels_last)
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


def norm_into_conv(norm: Any, conv: nn.Conv2d) -> nn.Sequential:
    """A LayerNorm over channels and an unpadded convolution, with the norm's factor and offset in the convolution."""
    set_conv(conv, *linear_behind(conv, *affine(norm)))
    return nn.Sequential(type(norm)(norm.normalized_shape, eps=norm.eps, elementwise_affine=False), conv)


def check_image_size(x: Tensor, min_size: int) -> None:
    """Refuses images that would leave less than one position in the last stage (below the network's total stride)."""
    message = f"the image is smaller than {min_size} pixels, the network's total stride: resize it to at least that"
    _assert(x.shape[-2] >= min_size, message)  # two calls: `and` would be control flow, which torch.fx cannot trace
    _assert(x.shape[-1] >= min_size, message)
