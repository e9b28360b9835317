"""Conv2Former: a hierarchical ConvNet whose blocks modulate values with large-kernel convolutions.

Hou et al., "Conv2Former: A Simple Transformer-Style ConvNet for Visual Recognition", arXiv:2211.11943.

The file reads top to bottom like the paper: the modulation layer (Sec. 3.2), the MLP, the block, the stem, the stage,
the network (Sec. 3.1). Its head is in ``classifier``; the sizes of Table 1 and timm's names are in ``variants``.

Layout: the public interface is timm's NCHW. Inside a stage tensors are NHWC, so that LayerNorm and the 1x1
convolutions (kept as ``nn.Linear``) work on the last dimension; the change of layout is a view of channels-last memory.
What stands between the linear layers of a block has a fused operation each (``ops``). It runs in the place of the
modules wherever that makes no difference but the time: see ``ops.guard``.
"""

from typing import Any

import torch
from timm.layers import DropPath, LayerScale
from timm.layers.trace_utils import _assert
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from conv2former.models.classifier import Head
from conv2former.models.fused import fuse_blocks, fuse_downsample, fuse_stem
from conv2former.models.layers import (
    Layer,
    LayerNorm,
    activation,
    channels_last,
    check_image_size,
    depthwise_conv,
    drop_path_rates,
    init_weights,
    last_dim_norm,
    strides_and_dilations,
)
from conv2former.ops import mlp_middle_fused, modulation_fused, passes_by

__all__ = ["Conv2Former"]


class ConvMod(nn.Module):
    """Convolutional modulation, Eqs. 3-5: ``Z = A * V`` with ``A = DWConv_kxk(GELU(W1 X))`` and ``V = W2 X``.

    The GELU before the depthwise convolution is in the released network and not in Eq. 4. Nothing stands between
    the convolution and the product (Sec. 3.3, "Weighting strategy").

    Args:
        dim: Channels C.
        kernel_size: Odd side k of the depthwise kernel.
        act_layer: Makes the activation.
        dilation: Of the depthwise convolution.
    """

    def __init__(self, dim: int, kernel_size: int, *, act_layer: Layer = nn.GELU, dilation: int = 1) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, dim)
        self.act = act_layer()
        self.dwconv = depthwise_conv(dim, kernel_size, dilation)
        self.w2 = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def modulation_weights(self, x: Tensor) -> Tensor:
        """The weights A of Eq. 4, (B, H, W, C) -> (B, H, W, C)."""
        return self.dwconv(self.act(self.w1(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        u, v = self.w1(x), self.w2(x)
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out this branch, but not a longer condition
            if passes_by("modulation", self.act, self.dwconv, u, v):
                return self.proj(modulation_fused(u, v, self.dwconv.weight, self.dwconv.bias))  # type: ignore[arg-type]
        a = self.dwconv(self.act(u).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # Eq. 4
        return self.proj(a * v)  # Eq. 3


class Mlp(nn.Module):
    """The FFN: expansion by 4 with a residual 3x3 depthwise convolution on the hidden layer.

    The depthwise convolution is not in the paper's text; the printed multiply-adds of Table 1 need it.
    """

    def __init__(self, dim: int, hidden_dim: int, *, act_layer: Layer = nn.GELU, dilation: int = 1) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = act_layer()
        self.dwconv = depthwise_conv(hidden_dim, 3, dilation)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        u = self.fc1(x)
        if not torch.jit.is_scripting():  # noqa: SIM102  see `ConvMod`
            if passes_by("mlp_middle", self.act, self.dwconv, u):
                return self.fc2(mlp_middle_fused(u, self.dwconv.weight, self.dwconv.bias))  # type: ignore[arg-type]
        h = self.act(u).permute(0, 3, 1, 2)
        h = h + self.act(self.dwconv(h))
        return self.fc2(h.permute(0, 2, 3, 1))


class Block(nn.Module):
    """One block of Fig. 3(d): modulation and MLP, each normalised before, scaled and added to its input.

    ``drop_path`` is the probability of dropping a branch (stochastic depth). ``ls_init_value`` is the initial value of
    both layer scales; None leaves them out. The other arguments are those of ``Conv2Former``.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        ls_init_value: float | None = 1e-6,
        mod_layer: Layer = ConvMod,
        norm_layer: Layer = LayerNorm,
        act_layer: Layer = nn.GELU,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.mod = mod_layer(dim, kernel_size, act_layer=act_layer, dilation=dilation)
        self.ls1 = nn.Identity() if ls_init_value is None else LayerScale(dim, ls_init_value)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, dilation=dilation)
        self.ls2 = nn.Identity() if ls_init_value is None else LayerScale(dim, ls_init_value)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = x + self.drop_path1(self.ls1(self.mod(self.norm1(x))))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


class Blocks(nn.Sequential):
    @torch.jit.ignore
    def fuse(self) -> nn.Sequential:
        """What computes the same in evaluation, faster; itself where a block is not the paper's (``models.fused``)."""
        return fuse_blocks(self, (Blocks, Block, ConvMod, Mlp))


class Stem(nn.Module):
    """Patch embedding of the hierarchical models: three convolutions without bias, stride 4 in all.

    3x3 s2, GELU, BatchNorm, 3x3 s1, GELU, BatchNorm, 2x2 s2. ``stride=2`` leaves the first convolution at stride 1:
    for small images (CIFAR), not in the paper. Images below ``min_size``, which the whole network needs, are refused.
    """

    def __init__(
        self, in_chans: int, dim: int, *, stride: int = 4, min_size: int = 32, act_layer: Layer = nn.GELU
    ) -> None:
        super().__init__()
        if stride not in (2, 4):
            raise ValueError(f"stem_stride is {stride}: use 4 (the paper's) or 2 (small images)")
        self.min_size = min_size
        mid = dim // 2
        self.conv1 = nn.Conv2d(in_chans, mid, 3, stride=stride // 2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(mid, mid, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(mid)
        self.conv3 = nn.Conv2d(mid, dim, 2, stride=2, bias=False)
        self.act = act_layer()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, dim, H / stride, W / stride), channels last in memory."""
        check_image_size(x, self.min_size)
        x = channels_last(x)
        x = self.norm1(self.act(self.conv1(x)))
        x = self.norm2(self.act(self.conv2(x)))
        return self.conv3(x)

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """What computes the same in evaluation, without batch norms."""
        convs, norms = [self.conv1, self.conv2, self.conv3], [self.norm1, self.norm2]
        return fuse_stem(self, Stem, convs, norms, [self.act], min_size=self.min_size)


class Downsample(nn.Sequential):
    """Between stages: a norm over the channels and a 2x2 convolution with stride 2.

    The stride is 1 where the network's ``output_stride`` is reached: the map then keeps its size.
    """

    def __init__(self, in_dim: int, dim: int, *, stride: int, dilation: int, norm_layer: Layer) -> None:
        padding: Any = 0 if stride == 2 else "same"
        super().__init__(
            norm_layer(in_dim), nn.Conv2d(in_dim, dim, 2, stride=stride, padding=padding, dilation=dilation)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim, H, W) -> (B, dim, H / stride, W / stride); a row or column left over goes."""
        x = x.permute(0, 2, 3, 1)
        for i, layer in enumerate(self):
            x = layer(x) if i > 0 else layer(x).permute(0, 3, 1, 2)
        return x

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """The norm's factor and offset go into the convolution."""
        return fuse_downsample(self, Downsample)


class Stage(nn.Module):
    """Downsampling (none in the first stage) and a row of blocks.

    ``drop_path`` has one rate per block; its length is the depth of the stage. ``dilation`` is that of the downsampling
    and that of the blocks; both are 1 but for a reduced ``output_stride``. ``block_args`` go to every ``Block``.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int,
        drop_path: list[float],
        *,
        downsample: bool,
        stride: int = 2,
        dilation: tuple[int, int] = (1, 1),
        norm_layer: Layer = LayerNorm,
        **block_args: Any,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        first, rest = dilation
        self.downsample: nn.Module = nn.Identity()
        if downsample:
            self.downsample = Downsample(in_dim, dim, stride=stride, dilation=first, norm_layer=norm_layer)
        block_args |= dict(norm_layer=norm_layer, dilation=rest)
        blocks = [Block(dim, kernel_size, drop_path=rate, **block_args) for rate in drop_path]
        self.blocks: nn.Sequential = Blocks(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim, H, W) -> (B, dim, H / stride, W / stride), or the same size without downsampling."""
        x = self.downsample(x).permute(0, 2, 3, 1)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2)


class Conv2Former(nn.Module):
    """The hierarchical network of Fig. 2.

    Any image of at least the total stride (32 pixels; 16 with ``stem_stride=2``) on each side is taken; rows and
    columns that a stride-2 convolution leaves over are dropped, as in ConvNeXt. Smaller images are refused.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 for pooled features.
        global_pool: Pooling of the head, '' for none.
        dims: Channels of each stage.
        depths: Blocks of each stage.
        kernel_size: Side of the modulation kernel in all stages, odd (5 to 21 in the paper, 11 by default).
        stem_stride: Total stride of the stem, 4 in the paper.
        stem: A module that replaces the three-convolution stem, (B, in_chans, H, W) -> (B, dims[0], ...). Its
            ``stride`` attribute is its total stride.
        mlp_ratio: Hidden width of the MLPs over their input's.
        head_hidden_size: Width of the head's 1x1 convolution.
        ls_init_value: Initial layer scale (Sec. 4.1); None for none.
        mod_layer: Class of the modulation layer, ``ConvMod`` or one of ``conv2former.models.ablations``.
        output_stride: 32, 16 or 8: of the last stage. Below 32 the last stages keep the size of their maps and dilate
            their convolutions, which then are not fused.
        act_layer: timm's name or a class. The fused operations know GELU alone.
        norm_layer: timm's name or a class, of a norm over the last dimension: in blocks, between stages, in the head.
        head_init_scale: Factor on the classifier's initial weights.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block (Table 10).

    Attributes:
        num_features: Channels of ``forward_features``.
        head_hidden_size: Channels of ``forward_head(..., pre_logits=True)``.
    """

    uses_ops = True  # of ``conv2former.ops``: a training says what computes them
    feature_layers = "stages"  # the submodule whose layers' outputs are the intermediate features

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        dims: tuple[int, ...] = (72, 144, 288, 576),
        depths: tuple[int, ...] = (3, 3, 12, 3),
        kernel_size: int = 11,
        stem_stride: int = 4,
        stem: Any = None,
        mlp_ratio: float = 4.0,
        head_hidden_size: int = 1280,
        ls_init_value: float | None = 1e-6,
        mod_layer: type[nn.Module] = ConvMod,
        output_stride: int = 32,
        act_layer: str | Layer | None = None,
        norm_layer: str | Layer | None = None,
        head_init_scale: float = 1.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}: use an odd number (the paper's are 5, 7, 9, 11, 15, 21)")
        if len(dims) != len(depths):
            raise ValueError(f"dims has {len(dims)} stages and depths {len(depths)}: give one number a stage to both")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.grad_checkpointing = False

        stem_stride = stem_stride if stem is None else stem.stride
        reductions, strides, dilations = zip(*strides_and_dilations(len(dims), stem_stride, output_stride), strict=True)
        layers: dict[str, Any] = dict(act_layer=activation(act_layer), norm_layer=last_dim_norm(norm_layer))
        if stem is None:
            stem = Stem(in_chans, dims[0], stride=stem_stride, min_size=reductions[-1], act_layer=layers["act_layer"])
        self.stem = stem

        rates = drop_path_rates(drop_path_rate, depths)
        block_args: dict[str, Any] = dict(mlp_ratio=mlp_ratio, ls_init_value=ls_init_value, mod_layer=mod_layer)
        stages = []
        for i, dim in enumerate(dims):
            sampling: dict[str, Any] = dict(downsample=i > 0, stride=strides[i], dilation=dilations[i])
            stages.append(Stage(dims[max(i - 1, 0)], dim, kernel_size, rates[i], **sampling, **block_args, **layers))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            dict(num_chs=dim, reduction=reductions[i], module=f"stages.{i}") for i, dim in enumerate(dims)
        ]
        self.num_features = dims[-1]
        self.head = Head(
            dims[-1], num_classes, hidden_size=head_hidden_size, pool_type=global_pool, drop_rate=drop_rate, **layers
        )
        self.head_hidden_size = self.head.num_features
        self.apply(init_weights)
        for parameter in self.head.fc.parameters():
            parameter.data.mul_(head_init_scale)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that a decay by tensor rank would not already spare: none (norms, biases, scales are vectors)."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups for layer-wise decay: the stem, then every block; the head counts as last."""
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^head\.(?:conv|norm)", (99999,)),  # no capture: timm sorts by what is captured
        ]
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the blocks' activations in the backward pass instead of storing them."""
        self.grad_checkpointing = enable
        stage: Any
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer (identity where there are no classes)."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Makes a new classifier for ``num_classes``; see ``Head.reset``."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, reset_other=reset_other)
        reference = next(self.parameters())
        self.head.fc.to(device=reference.device, dtype=reference.dtype)
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of chosen stages, as timm's other models give them.

        Args:
            x: Images, (B, in_chans, H, W).
            indices: The last n stages if a number, all if None, these if a sequence.
            norm: Without effect: the network has no norm after its last stage.
            stop_early: Do not run the stages behind the last one asked for.
            output_fmt: 'NCHW', the only one.
            intermediates_only: Leave out the final features.

        Returns:
            The list of stage outputs, or the final features (B, C4, H/32, W/32) and that list.
        """
        _assert(output_fmt == "NCHW", "output_fmt must be NCHW")
        take, last = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        intermediates = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the layers behind the last one asked for, and the head; returns the indices kept."""
        layers: Any = self.get_submodule(self.feature_layers)
        take, last = feature_take_indices(len(layers), indices)
        pruned = last < len(layers) - 1
        self.set_submodule(self.feature_layers, layers[: last + 1])
        if pruned:
            self.num_features = int(self.feature_info[last]["num_chs"])
            self.head.in_features = self.num_features
        if prune_head or pruned:
            self.reset_classifier(0, "", reset_other=True)
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_features, H / 32, W / 32), not pooled."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The head on the output of ``forward_features``; with ``pre_logits`` all but the last linear layer."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def fuse(self) -> "Conv2Former":
        """Turns the network, in place, into one for evaluation alone that computes the same with fewer operations.

        Norms' factors and offsets and the layer scale go into the layers beside them, W1 and W2 become one product
        (``conv2former.models.fused``). Weights are loaded before; the state dict is no longer that of the trained
        network.
        """
        reparameterize_model(self.eval(), inplace=True)
        return self.requires_grad_(False)
