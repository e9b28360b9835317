"""Inference with fewer operations: what ``Conv2Former.fuse`` puts in the place of the network's parts.

Constant factors and offsets go into the linear layer or convolution beside them: batch norm and the affine part of
LayerNorm into what follows, layer scale into what stands before, and W1 and W2 become one product. The stem, the blocks
of a stage, what stands between stages and the head are then one operation each (``ops``). The parts are for evaluation
alone: no dropout, no stochastic depth, no gradients needed. The layers that they are made of are gone or not called:
hooks, quantisation and adapters belong on the network before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.trace_utils import _assert
from torch import Tensor, nn

from conv2former.ops import blocks, downsample, join_block_weights, stem

torch.fx.wrap("blocks")
torch.fx.wrap("downsample")
torch.fx.wrap("stem")


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
        mod, mlp = block.mod, block.mlp
        self.eps, self.kernel_size = block.norm1.eps, mod.dwconv.weight.shape[-1]
        self.hidden, self.dim = mlp.fc1.weight.shape
        both = [linear_behind(layer, *affine(block.norm1)) for layer in (mod.w1, mod.w2)]
        parts = [torch.cat(each) for each in zip(*both, strict=True)]
        parts += [*mod.dwconv.taps(), *scaled(mod.proj, getattr(block.ls1, "gamma", None))]
        parts += [*linear_behind(mlp.fc1, *affine(block.norm2)), *mlp.dwconv.taps()]
        parts += scaled(mlp.fc2, getattr(block.ls2, "gamma", None))
        row = join_block_weights([part.detach().double() for part in parts])
        self.weights = nn.Parameter(row.to(mod.w1.weight), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return blocks(x, [self.weights], self.dim, self.hidden, self.kernel_size, self.eps)


class FusedBlocks(nn.Sequential):
    """The ``FusedBlock``s of a stage as one operation. Hooks of single blocks are not called."""

    def __init__(self, *blocks: Any) -> None:
        super().__init__(*blocks)
        first: Any = self[0]
        self.dim, self.hidden, self.kernel_size, self.eps = first.dim, first.hidden, first.kernel_size, first.eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        weights: list[Tensor] = []
        for block in self:
            weights.append(block.weights)  # type: ignore[arg-type]
        return blocks(x, weights, self.dim, self.hidden, self.kernel_size, self.eps)


class FusedStem(nn.Module):
    """The three-convolution stem or embedding without batch norms.

    The second norm goes into the last convolution. The first stays a factor and an offset, since the zeros around the
    map come behind it.

    Args:
        convs: The three convolutions, 3x3, 3x3 and 2x2 with stride 2, without bias.
        norms: The batch norms behind the first two.
        min_size: Smaller images are refused.
    """

    def __init__(self, convs: Sequence[Any], norms: Sequence[Any], *, min_size: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = convs
        self.min_size = min_size
        self.strides = self.conv1.stride[0], self.conv2.stride[0]
        self.scale, self.offset = (nn.Parameter(part.to(self.conv2.weight)) for part in affine(norms[0]))
        set_conv(self.conv3, *linear_behind(self.conv3, *affine(norms[1])))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, dim, H / stride, W / stride), channels last in memory."""
        check_image_size(x, self.min_size)
        x = x.contiguous(memory_format=torch.channels_last)
        first, second, third = self.conv1.weight, self.conv2.weight, self.conv3.weight
        bias = self.conv3.bias
        assert bias is not None  # TorchScript does not know
        return stem(x, first, self.scale, self.offset, second, third, bias, self.strides[0], self.strides[1])


class FusedDownsample(nn.Module):
    """Normalisation and 2x2 convolution with stride 2, the norm's factor and offset in the convolution.

    Args:
        norm: Over channels, with factor and offset.
        conv: Unpadded, with bias.
    """

    def __init__(self, norm: Any, conv: Any) -> None:
        super().__init__()
        self.eps, self.conv = norm.eps, conv
        set_conv(conv, *linear_behind(conv, *affine(norm)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, H / 2, W / 2), channels last in memory."""
        bias = self.conv.bias
        assert bias is not None  # TorchScript does not know
        return downsample(x.permute(0, 2, 3, 1), self.conv.weight, bias, self.eps).permute(0, 3, 1, 2)


def check_image_size(x: Tensor, min_size: int) -> None:
    """Refuses images that would leave less than one position in the last stage (below the network's total stride)."""
    message = f"the image is smaller than {min_size} pixels, the network's total stride: resize it to at least that"
    _assert(x.shape[-2] >= min_size, message)  # two calls: `and` would be control flow, which torch.fx cannot trace
    _assert(x.shape[-1] >= min_size, message)
