"""Inference with fewer operations: what ``Conv2Former.fuse`` puts in the place of the network's parts.

Constant factors and offsets go into the linear layer or convolution beside them: batch norm and the affine part of
LayerNorm into what follows, layer scale into what stands before, and W1 and W2 become one product. The stem, the blocks
of a stage, what stands between stages and the head are then one operation each (``ops``). The parts are for evaluation
alone: no dropout, no stochastic depth, no gradients needed.

A part with a hook, another layer or a parametrization stays as it is, and a warning says why. The fused parts hold
weights and no layers. Only the head keeps its layers, and checks at each call whether the operation may replace them.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerScale, SelectAdaptivePool2d
from timm.layers.adaptive_avgmax_pool import FastAdaptiveAvgPool
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from conv2former.models.layers import channels_last, check_image_size
from conv2former.ops import blocks, downsample, guard, join_block_weights, stem

_WITH_STATISTICS = (
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    FrozenBatchNorm2d,
)  # the last where detectors keep the norms of their weights

torch.fx.wrap("blocks")
torch.fx.wrap("downsample")
torch.fx.wrap("stem")


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Factor and offset of each channel, (C,) float64 each, behind a LayerNorm's normalisation or of a BatchNorm."""
    scale, offset = norm.weight.detach().double(), norm.bias.detach().double()
    if isinstance(norm, _WITH_STATISTICS):
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


def constant(value: Tensor, like: Tensor) -> nn.Parameter:
    """A weight of a fused part, in the dtype and on the device of another."""
    return nn.Parameter(value.detach().to(like), requires_grad=False)


class FusedBlock(nn.Module):
    """``Block`` for inference: two normalisations, four products, the two operations between them."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        mod, mlp = block.mod, block.mlp
        self.eps, self.kernel_size = block.norm1.eps, mod.dwconv.weight.shape[-1]
        self.hidden, self.dim = mlp.fc1.weight.shape
        both = [linear_behind(layer, *affine(block.norm1)) for layer in (mod.w1, mod.w2)]
        parts = [torch.cat(each) for each in zip(*both, strict=True)]
        parts += [mod.dwconv.weight, mod.dwconv.bias, *scaled(mod.proj, getattr(block.ls1, "gamma", None))]
        parts += [*linear_behind(mlp.fc1, *affine(block.norm2)), mlp.dwconv.weight, mlp.dwconv.bias]
        parts += scaled(mlp.fc2, getattr(block.ls2, "gamma", None))
        self.weights = constant(join_block_weights([part.detach().double() for part in parts]), mod.w1.weight)

    def forward(self, x: Tensor) -> Tensor:
        return blocks(x, [self.weights], self.dim, self.hidden, self.kernel_size, self.eps)


class FusedBlocks(nn.Sequential):
    """The ``FusedBlock``s of a stage as one operation; one by one where a block has a hook."""

    def __init__(self, *blocks: Any) -> None:
        super().__init__(*blocks)
        first: Any = self[0]
        self.dim, self.hidden, self.kernel_size, self.eps = first.dim, first.hidden, first.kernel_size, first.eps

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out this branch, but not a longer condition
            if guard.hooked(*self) or any(type(block) is not FusedBlock for block in self):
                return super().forward(x)
        weights: list[Tensor] = []
        for block in self:
            weights.append(block.weights)  # type: ignore[arg-type]
        return blocks(x, weights, self.dim, self.hidden, self.kernel_size, self.eps)


class FusedStem(nn.Module):
    """The three-convolution stem or embedding without batch norms.

    The second norm goes into the last convolution. The first stays a factor and an offset, since the next convolution
    pads the map with zeros behind it.
    """

    def __init__(self, convs: Sequence[Any], norms: Sequence[Any], *, min_size: int) -> None:
        super().__init__()
        first, second, third = convs
        self.min_size = min_size
        self.stride1, self.stride2 = first.stride[0], second.stride[0]
        like = second.weight
        self.weight1, self.weight2 = constant(first.weight, like), constant(second.weight, like)
        self.scale, self.offset = (constant(part, like) for part in affine(norms[0]))
        self.weight3, self.bias3 = (constant(part, like) for part in linear_behind(third, *affine(norms[1])))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, dim, H / stride, W / stride), channels last in memory."""
        check_image_size(x, self.min_size)
        return stem(channels_last(x), *self.weights(), self.stride1, self.stride2)

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As ``ops.stem`` takes them."""
        return self.weight1, self.scale, self.offset, self.weight2, self.weight3, self.bias3


class FusedDownsample(nn.Module):
    """Normalisation and 2x2 convolution with stride 2, the norm's factor and offset in the convolution."""

    def __init__(self, norm: Any, conv: Any) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = (constant(part, conv.weight) for part in linear_behind(conv, *affine(norm)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, H / 2, W / 2), channels last in memory."""
        return downsample(x.permute(0, 2, 3, 1), self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


# Below: whether a part may be put in the place of the trained one. A reason is a text, '' where there is none.


def fuse_blocks(stage: nn.Sequential, kinds: Sequence[type]) -> nn.Sequential:
    """The blocks of a stage as one operation; as they are where one of them is not the paper's.

    ``kinds`` are the classes of the row, of a block, its modulation and its MLP.
    """
    row_kind, *block_kinds = kinds
    why = other([(stage, row_kind)]) or touched(stage)
    why = why or next(filter(None, (unlike_block(block, block_kinds) for block in stage)), "")
    fused = [] if why else [FusedBlock(block) for block in stage]
    if len({(block.dim, block.hidden, block.kernel_size, block.eps) for block in fused}) > 1:
        why = "they differ"
    return stage if not len(stage) or stays("the blocks of a stage", why) else FusedBlocks(*fused)


def unlike_block(block: Any, kinds: Sequence[type]) -> str:
    """What keeps a block from being fused."""
    kind, mod_kind, mlp_kind = kinds
    why = other([(block, kind)]) or other([(block.mod, mod_kind), (block.mlp, mlp_kind)])
    if why:
        return why
    mod, mlp = block.mod, block.mlp
    linear: list[Any] = [(layer, nn.Linear) for layer in (mod.w1, mod.w2, mod.proj, mlp.fc1, mlp.fc2)]
    norms = [(norm, nn.LayerNorm) for norm in (block.norm1, block.norm2)]
    scales = [(scale, LayerScale) for scale in (block.ls1, block.ls2) if type(scale) is not nn.Identity]
    drops = [(drop, DropPath) for drop in (block.drop_path1, block.drop_path2) if type(drop) is not nn.Identity]
    why = other(linear + norms + scales + drops) or without_bias(*(layer for layer, _ in linear + norms))
    why = why or guard.not_gelu(mod.act) or guard.not_gelu(mlp.act)
    why = why or guard.not_depthwise(mod.dwconv) or guard.not_depthwise(mlp.dwconv)
    if not why and block.norm1.eps != block.norm2.eps:
        why = "its norms differ"
    return why or ("" if sizes_are_usual(block) else "its layers have other sizes")


def sizes_are_usual(block: Any) -> bool:
    """Whether the layers of a block have the widths of ``block_weights``, and its kernels are square."""
    mod, mlp, dim, hidden = block.mod, block.mlp, block.norm1.weight.numel(), block.mlp.fc1.weight.shape[0]
    side = mod.dwconv.weight.shape[-1]
    layers = mod.w1, mod.w2, mod.proj, mod.dwconv, mlp.fc1, mlp.fc2, mlp.dwconv
    wanted = [(dim, dim)] * 3 + [(dim, 1, side, side), (hidden, dim), (dim, hidden), (hidden, 1, 3, 3)]
    return [layer.weight.shape for layer in layers] == wanted


def fuse_stem(
    part: nn.Module, kind: type, convs: Sequence[Any], norms: Sequence[Any], acts: Sequence[nn.Module], *, min_size: int
) -> nn.Module:
    """A stem or embedding of three convolutions, of this class, as one operation; as it is where it was changed."""
    why = other([(part, kind), *((conv, nn.Conv2d) for conv in convs), *((norm, _batch_norm(norm)) for norm in norms)])
    why = why or without_bias(*norms) or next(filter(None, map(guard.not_gelu, acts)), "") or touched(part)
    settings = [(conv.padding, conv.dilation, conv.groups, conv.padding_mode, conv.bias) for conv in convs if not why]
    square = not why and all(conv.stride[0] == conv.stride[1] for conv in convs) and convs[2].stride == (2, 2)
    square = square and [conv.kernel_size for conv in convs] == [(3, 3), (3, 3), (2, 2)]
    if not why and not (square and settings == [((side, side), (1, 1), 1, "zeros", None) for side in (1, 1, 0)]):
        why = "the settings of its convolutions are others"
    if not why and any(norm.running_var is None for norm in norms):
        why = "its norms keep no statistics"
    return part if stays("the stem", why) else FusedStem(convs, norms, min_size=min_size)


def fuse_downsample(part: Any, kind: type) -> nn.Module:
    """What stands between two stages, of this class, as one operation; as it is where it was changed."""
    norm, conv = part[0], part[-1]
    why = other([(part, kind), (norm, nn.LayerNorm), (conv, nn.Conv2d)]) or ("" if len(part) == 2 else "it is longer")
    why = why or without_bias(norm, conv) or touched(part)
    if not why:
        settings = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
        why = "" if settings == ((2, 2), (2, 2), (0, 0), (1, 1), 1) else f"its convolution is {conv}"
    return part if stays("a downsampling", why) else FusedDownsample(norm, conv)


def fusable_head(head: Any) -> bool:
    """Whether a head may be computed as one operation: it is the paper's, unchanged, with no dropout to be done."""
    conv, act, norm, pool, drop, fc = head.conv, head.act, head.norm, head.global_pool, head.drop, head.fc
    kinds = nn.Linear, nn.LayerNorm, SelectAdaptivePool2d, nn.Dropout, nn.Linear
    if other(zip((conv, norm, pool, drop, fc), kinds, strict=True)) or drop.training:
        return False
    if without_bias(conv, norm, fc) or guard.not_gelu(act):
        return False
    if pool.pool_type != "avg" or other([(pool.pool, FastAdaptiveAvgPool), (pool.flatten, nn.Identity)]):
        return False
    if not pool.pool.flatten or pool.pool.dim != (1, 2):
        return False
    return not guard.hooked(conv, act, norm, pool, pool.pool, pool.flatten, drop, fc)


def _batch_norm(norm: nn.Module) -> type:
    """The class that a stem's norm must have."""
    known = type(norm) in _WITH_STATISTICS or getattr(norm, "plain_in_evaluation", False)
    return type(norm) if known else nn.BatchNorm2d


def other(layers: Iterable[tuple[Any, type]]) -> str:
    """The first layer that is of another class."""
    return next((f"there is a {type(layer).__name__} in it" for layer, kind in layers if type(layer) is not kind), "")


def without_bias(*layers: Any) -> str:
    """The first layer that lacks a factor or an offset."""
    return next((f"{layer} has no bias" for layer in layers if layer.weight is None or layer.bias is None), "")


def touched(part: nn.Module) -> str:
    """What would be lost with the modules of a part: hooks, weights that are more than tensors."""
    weights = list(part.parameters())
    if not all(map(guard.plain, weights)) or len({(weight.device, weight.dtype) for weight in weights}) > 1:
        return "its weights are not all plain tensors of one dtype on one device"
    return guard.hooked(*part.modules()) or guard.exchanged_functions()


def stays(part: str, why: str) -> bool:
    """Whether there is a reason not to fuse a part; a warning says it."""
    if why:
        guard.warn_once(f"fuse() leaves {part} as it is, because {why}")
    return bool(why)
