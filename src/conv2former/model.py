"""Conv2Former: a hierarchical ConvNet whose blocks modulate values with large-kernel convolutions.

Hou et al., "Conv2Former: A Simple Transformer-Style ConvNet for Visual Recognition", arXiv:2211.11943.

The file reads top to bottom like the paper: the modulation layer (Sec. 3.2), the MLP, the block, the stem, the stage,
the head, the network (Sec. 3.1), and the entrypoints that timm knows (Table 1).

Layout: the public interface is timm's NCHW. Inside a stage tensors are NHWC, so that LayerNorm and the 1x1
convolutions (kept as ``nn.Linear``) work on the last dimension; the change of layout is a view of channels-last memory.
What stands between the linear layers of a block is one operation each (``ops``), fused where there is a kernel for it.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerScale, SelectAdaptivePool2d, trunc_normal_
from timm.layers.trace_utils import _assert
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from conv2former.fusing import FusedBlock, FusedBlocks, FusedDownsample, FusedStem, check_image_size
from conv2former.ops import head, mlp_middle, modulation

__all__ = ["Conv2Former"]

torch.fx.wrap("head")  # which code computes them depends on the tensor, so a symbolic trace keeps them whole
torch.fx.wrap("mlp_middle")
torch.fx.wrap("modulation")

LAYER_NORM_EPS = 1e-6


class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution with bias and "same" zero padding on NHWC tensors.

    The weight keeps the shape of a PyTorch depthwise convolution, (C, 1, k, k). The map may be smaller than the kernel.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return self._conv_forward(x.permute(0, 3, 1, 2), self.weight, self.bias).permute(0, 2, 3, 1)

    def taps(self) -> tuple[Tensor, Tensor]:
        """(C, 1, k, k) and (C,): weight and bias, for ``ops``."""
        bias = self.bias
        assert bias is not None  # TorchScript does not know
        return self.weight, bias


class ConvMod(nn.Module):
    """Convolutional modulation, Eqs. 3-5: ``Z = A * V`` with ``A = DWConv_kxk(GELU(W1 X))`` and ``V = W2 X``.

    The GELU before the depthwise convolution is in the released network and not in Eq. 4. Nothing stands between
    the convolution and the product (Sec. 3.3, "Weighting strategy").

    Args:
        dim: Channels C.
        kernel_size: Odd side k of the depthwise kernel.

    Attributes:
        dwconv: Holds the taps and the bias of the depthwise convolution, which ``ops.modulation`` reads from it.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, dim)
        self.act = nn.GELU()
        self.dwconv = DepthwiseConv(dim, kernel_size)
        self.w2 = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def weigh(self, x: Tensor) -> Tensor:
        """The weights A of Eq. 4, (B, H, W, C) -> (B, H, W, C)."""
        return self.dwconv(self.act(self.w1(x)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        weight, bias = self.dwconv.taps()
        return self.proj(modulation(self.w1(x), self.w2(x), weight, bias))


class Mlp(nn.Module):
    """The FFN: expansion by 4 with a residual 3x3 depthwise convolution on the hidden layer.

    The depthwise convolution is not in the paper's text; the printed multiply-adds of Table 1 need it.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = DepthwiseConv(hidden_dim, 3)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        weight, bias = self.dwconv.taps()
        return self.fc2(mlp_middle(self.fc1(x), weight, bias))


class Block(nn.Module):
    """One block of Fig. 3(d): modulation and MLP, each normalised before, scaled and added to its input.

    Args:
        dim: Channels C.
        kernel_size: Side of the modulation kernel.
        mlp_ratio: Hidden width of the MLP over C.
        drop_path: Probability of dropping a branch (stochastic depth).
        ls_init_value: Initial value of both layer scales; None leaves them out.
        mod_layer: Class of the modulation layer, called with ``(dim, kernel_size)``.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        ls_init_value: float | None = 1e-6,
        mod_layer: type[nn.Module] = ConvMod,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mod = mod_layer(dim, kernel_size)
        self.ls1 = nn.Identity() if ls_init_value is None else LayerScale(dim, ls_init_value)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = nn.Identity() if ls_init_value is None else LayerScale(dim, ls_init_value)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = x + self.drop_path1(self.ls1(self.mod(self.norm1(x))))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


class Blocks(nn.Sequential):
    """The blocks of a stage."""

    @torch.jit.ignore
    def fuse(self) -> nn.Sequential:
        """What computes the same in evaluation, faster; itself with another modulation layer."""
        blocks: Any = list(self)
        if not blocks or any(type(block.mod) is not ConvMod for block in blocks):
            return self
        return FusedBlocks(*map(FusedBlock, blocks))


class Stem(nn.Module):
    """Patch embedding of the hierarchical models: three convolutions without bias, stride 4 in all.

    3x3 s2, GELU, BatchNorm, 3x3 s1, GELU, BatchNorm, 2x2 s2. ``stride=2`` leaves the first convolution at stride 1:
    for small pictures (CIFAR), not in the paper.

    Args:
        in_chans: Channels of the image.
        dim: Channels of the first stage.
        stride: Total stride, 4 or 2.
        min_size: Smallest height and width that the whole network takes; smaller images are refused here.
    """

    def __init__(self, in_chans: int, dim: int, *, stride: int = 4, min_size: int = 32) -> None:
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
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, dim, H / stride, W / stride), channels last in memory."""
        check_image_size(x, self.min_size)
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.norm1(self.act(self.conv1(x)))
        x = self.norm2(self.act(self.conv2(x)))
        return self.conv3(x)

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """What computes the same in evaluation, without batch norms."""
        return FusedStem([self.conv1, self.conv2, self.conv3], [self.norm1, self.norm2], min_size=self.min_size)


class Stage(nn.Module):
    """Downsampling (LayerNorm, 2x2 s2 convolution; none in the first stage) and a row of blocks.

    Args:
        in_dim: Channels of the stage before.
        dim: Channels of this stage; equal to ``in_dim`` without downsampling.
        kernel_size: Side of the modulation kernel.
        drop_path: One rate per block; its length is the depth of the stage.
        downsample: Whether to halve the resolution first.
        **block_args: Passed to every ``Block``.
    """

    def __init__(
        self, in_dim: int, dim: int, kernel_size: int, drop_path: list[float], *, downsample: bool, **block_args: Any
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample: nn.Module = (
            nn.Sequential(ChannelNorm(in_dim, eps=LAYER_NORM_EPS), nn.Conv2d(in_dim, dim, 2, stride=2))
            if downsample
            else nn.Identity()
        )
        self.blocks: nn.Sequential = Blocks(
            *(Block(dim, kernel_size, drop_path=rate, **block_args) for rate in drop_path)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim, H, W) -> (B, dim, H / 2, W / 2), or the same size without downsampling; rows left over go."""
        x = self.downsample(x).permute(0, 2, 3, 1)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2)

    @torch.jit.ignore
    def fuse(self) -> Stage:
        """The downsampling's norm goes into its convolution; the blocks are asked by themselves."""
        if isinstance(self.downsample, nn.Sequential):
            self.downsample = FusedDownsample(*self.downsample)
        return self


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of an NCHW tensor."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x.permute(0, 2, 3, 1)
        x = nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Head(nn.Module):
    """Classifier: 1x1 convolution to ``hidden_size``, GELU, LayerNorm, global pooling, dropout, linear.

    Args:
        in_features: Channels C4 of the last stage.
        num_classes: Classes; 0 leaves the linear layer out.
        hidden_size: Width of the 1x1 convolution (1280 in the released network).
        pool_type: A pooling of timm's, or '' for none: the output is then a map (B, classes, H, W).
        drop_rate: Dropout before the linear layer.
    """

    fused = False  # see `fuse`

    def __init__(
        self, in_features: int, num_classes: int, *, hidden_size: int, pool_type: str = "avg", drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.hidden_size = hidden_size
        self.conv: Any = nn.Linear(in_features, hidden_size)
        self.act: nn.Module = nn.GELU()
        self.norm: Any = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type)

    def reset(self, num_classes: int, pool_type: str | None = None, *, reset_other: bool = False) -> None:
        """Makes a new linear layer, and a new pooling where ``pool_type`` is given.

        ``reset_other`` takes out the convolution and its norm too, so that the head passes its input through.
        """
        if pool_type is not None:
            self.global_pool = SelectAdaptivePool2d(
                pool_type=pool_type, flatten=bool(pool_type), input_fmt="NHWC" if pool_type else "NCHW"
            )
        if reset_other:
            self.conv, self.act, self.norm = nn.Identity(), nn.Identity(), nn.Identity()
        width = self.hidden_size if isinstance(self.conv, nn.Linear) else self.in_features
        self.num_features = width * self.global_pool.feat_mult()
        if num_classes > 0:
            self.fc: Any = nn.Linear(self.num_features, num_classes)
            init_weights(self.fc)
        else:
            self.fc = nn.Identity()
        self.train(self.training)  # the new modules too

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C4, H, W) -> (B, num_classes); with ``pre_logits`` (B, hidden_size); unpooled (B, ..., H, W)."""
        x = x.permute(0, 2, 3, 1)
        if not torch.jit.is_scripting():  # noqa: SIM102  see `ops.modulation`
            if self.fused and not pre_logits and self._is_the_papers():
                conv, norm, fc = self.conv, self.norm, self.fc
                return head(x, conv.weight, conv.bias, norm.weight, norm.bias, fc.weight, fc.bias, norm.eps)
        x = self.norm(self.act(self.conv(x)))
        x = self.drop(self.global_pool(x))
        if not pre_logits:
            x = self.fc(x)
        return x.permute(0, 3, 1, 2) if self.global_pool.is_identity() else x

    def _is_the_papers(self) -> bool:
        """Whether nothing was exchanged, and there is no dropout to be done."""
        layers = self.conv, self.norm, self.fc
        if [type(layer) for layer in layers] != [nn.Linear, nn.LayerNorm, nn.Linear] or self.drop.training:
            return False
        return all(layer.bias is not None for layer in layers) and self.global_pool.pool_type == "avg"

    @torch.jit.ignore
    def fuse(self) -> Head:
        """In evaluation it is one operation from now on, as long as it has both layers and averages."""
        self.fused = True
        return self


def init_weights(module: nn.Module) -> None:
    """Truncated normal (std 0.02) for convolutions and linear layers, zero biases."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_path_rates(drop_path_rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Rates that rise linearly from 0 at the first block to ``drop_path_rate`` at the last, a list per stage."""
    last = max(sum(depths) - 1, 1)
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [[drop_path_rate * (start + j) / last for j in range(n)] for start, n in zip(starts, depths, strict=True)]


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
        mod_layer: Class of the modulation layer, ``ConvMod`` or one of ``conv2former.ablations``.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block (Table 10).

    Attributes:
        num_features: Channels of ``forward_features``.
        head_hidden_size: Channels of ``forward_head(..., pre_logits=True)``.
    """

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

        if stem is None:
            stem = Stem(in_chans, dims[0], stride=stem_stride, min_size=stem_stride * 2 ** (len(dims) - 1))
        else:
            stem_stride = stem.stride
        self.stem = stem

        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.Sequential(
            *(
                Stage(
                    dims[max(i - 1, 0)],
                    dim,
                    kernel_size,
                    rates[i],
                    downsample=i > 0,
                    mlp_ratio=mlp_ratio,
                    ls_init_value=ls_init_value,
                    mod_layer=mod_layer,
                )
                for i, dim in enumerate(dims)
            )
        )
        self.feature_info = [
            dict(num_chs=dim, reduction=stem_stride * 2**i, module=f"stages.{i}") for i, dim in enumerate(dims)
        ]
        self.num_features = dims[-1]
        self.head = Head(
            dims[-1], num_classes, hidden_size=head_hidden_size, pool_type=global_pool, drop_rate=drop_rate
        )
        self.head_hidden_size = self.head.num_features
        self.apply(init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that a decay by tensor rank would not already spare: none (norms, biases, scales are vectors)."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups for layer-wise decay: the stem, then every block; the head counts as last."""
        return dict(
            stem=r"^stem",
            blocks=r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^head\.(?:conv|norm)", (99999,)),  # no capture: timm sorts by what is captured
            ],
        )

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
        """Drops the stages behind the last one asked for, and the head; returns the indices kept."""
        take, last = feature_take_indices(len(self.stages), indices)
        pruned = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if pruned:
            self.num_features = self.feature_info[last]["num_chs"]
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
    def fuse(self) -> Conv2Former:
        """Turns the network, in place, into one for evaluation alone that computes the same with fewer operations.

        Norms' factors and offsets and the layer scale go into the layers beside them, W1 and W2 become one product
        (``conv2former.fusing``). Weights are loaded before; the state dict is no longer that of the trained network.
        """
        reparameterize_model(self.eval(), inplace=True)
        return self.requires_grad_(False)


def create_conv2former(model_cls: type[nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """Builds a registered model through timm, with one clear error where weights are asked for that nobody publishes.

    Args:
        model_cls: Class of the network.
        variant: Registered name.
        pretrained: Whether to load weights.
        **kwargs: timm's own arguments and those of ``model_cls``; ``device`` and ``dtype`` as timm's models take them.

    Raises:
        RuntimeError: ``pretrained=True`` and no source of weights for ``variant``.
    """
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        raise RuntimeError(
            f"no weights are published for {variant}: train some, or turn the authors' checkpoint into a folder with "
            f"`conv2former convert CHECKPOINT DST --model {variant}`, then timm.create_model('local-dir:DST', "
            "pretrained=True)"
        )
    stages = tuple(range(len(kwargs.get("dims", ()))))
    kwargs.setdefault("feature_cfg", dict(out_indices=stages, flatten_sequential=True))
    dtype = kwargs.pop("dtype", None)
    with torch.device(kwargs.pop("device", None) or torch.get_default_device()):
        return build_model_with_cfg(model_cls, variant, pretrained, **kwargs).to(dtype=dtype)


def default_cfg(**overrides: Any) -> dict[str, Any]:
    """The preprocessing that goes with the models.

    ImageNet mean and standard deviation: the authors' README. The paper says nothing of the crop: 0.9 at 224 is Swin's
    (ConvNeXt evaluates at 0.875), 1.0 at 384 is what both use for fine-tuned models.
    """
    return (
        dict(
            url="",
            num_classes=1000,
            input_size=(3, 224, 224),
            min_input_size=(3, 32, 32),
            pool_size=(7, 7),
            crop_pct=0.9,
            interpolation="bicubic",
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            first_conv="stem.conv1",
            classifier="head.fc",
            license="apache-2.0",
            paper_ids="arXiv:2211.11943",
            paper_name="Conv2Former: A Simple Transformer-Style ConvNet for Visual Recognition",
        )
        | overrides
    )


CFG_384 = dict(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0)

default_cfgs = generate_default_cfgs(
    {
        "conv2former_n.untrained": default_cfg(),
        "conv2former_t.untrained": default_cfg(),
        "conv2former_s.untrained": default_cfg(),
        "conv2former_b.untrained": default_cfg(),
        "conv2former_b.untrained_384": default_cfg(**CFG_384),
        "conv2former_l.untrained": default_cfg(),
        "conv2former_l.untrained_384": default_cfg(**CFG_384),
        # below: not in the paper
        "conv2former_pico.untrained": default_cfg(),
        "conv2former_femto.untrained": default_cfg(),
        "conv2former_atto.untrained": default_cfg(),
        "conv2former_test.untrained": default_cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
    }
)

# Table 1; the kernel of N is the released checkpoint's.
SIZES: dict[str, dict[str, Any]] = {
    "n": dict(dims=(64, 128, 256, 512), depths=(2, 2, 8, 2), kernel_size=7),
    "t": dict(dims=(72, 144, 288, 576), depths=(3, 3, 12, 3)),
    "s": dict(dims=(72, 144, 288, 576), depths=(4, 4, 32, 4)),
    "b": dict(dims=(96, 192, 384, 768), depths=(4, 4, 34, 4)),
    "l": dict(dims=(128, 256, 512, 1024), depths=(4, 4, 48, 4)),
}


@register_model
def conv2former_n(pretrained: bool = False, **kwargs: Any) -> Conv2Former:
    """Conv2Former-N (Table 1), kernel 7 as released."""
    return create_conv2former(Conv2Former, "conv2former_n", pretrained, **(SIZES["n"] | kwargs))


@register_model
def conv2former_t(pretrained: bool = False, **kwargs: Any) -> Conv2Former:
    """Conv2Former-T (Table 1)."""
    return create_conv2former(Conv2Former, "conv2former_t", pretrained, **(SIZES["t"] | kwargs))


@register_model
def conv2former_s(pretrained: bool = False, **kwargs: Any) -> Conv2Former:
    """Conv2Former-S (Table 1)."""
    return create_conv2former(Conv2Former, "conv2former_s", pretrained, **(SIZES["s"] | kwargs))


@register_model
def conv2former_b(pretrained: bool = False, **kwargs: Any) -> Conv2Former:
    """Conv2Former-B (Table 1)."""
    return create_conv2former(Conv2Former, "conv2former_b", pretrained, **(SIZES["b"] | kwargs))


@register_model
def conv2former_l(pretrained: bool = False, **kwargs: Any) -> Conv2Former:
    """Conv2Former-L (Table 1)."""
    return create_conv2former(Conv2Former, "conv2former_l", pretrained, **(SIZES["l"] | kwargs))


@register_model
def conv2former_pico(pretrained: bool = False, **kwargs: Any) -> Conv2Former:
    """Not in the paper: about 9M parameters, for CPUs; depths and width steps after ConvNeXt V2's small line."""
    sizes: dict[str, Any] = dict(dims=(48, 96, 192, 384), depths=(2, 2, 8, 2), kernel_size=7)
    return create_conv2former(Conv2Former, "conv2former_pico", pretrained, **(sizes | kwargs))


@register_model
def conv2former_femto(pretrained: bool = False, **kwargs: Any) -> Conv2Former:
    """Not in the paper: about 5M parameters, for CPUs; the head is halved so that the stages get the parameters."""
    sizes: dict[str, Any] = dict(dims=(40, 80, 160, 320), depths=(2, 2, 6, 2), kernel_size=7, head_hidden_size=640)
    return create_conv2former(Conv2Former, "conv2former_femto", pretrained, **(sizes | kwargs))


@register_model
def conv2former_atto(pretrained: bool = False, **kwargs: Any) -> Conv2Former:
    """Not in the paper: about 3.8M parameters, for edge devices; the head is halved like femto's."""
    sizes: dict[str, Any] = dict(dims=(32, 64, 128, 256), depths=(2, 2, 6, 2), kernel_size=7, head_hidden_size=640)
    return create_conv2former(Conv2Former, "conv2former_atto", pretrained, **(sizes | kwargs))


@register_model
def conv2former_test(pretrained: bool = False, **kwargs: Any) -> Conv2Former:
    """Not in the paper: for tests and quick trials."""
    sizes: dict[str, Any] = dict(dims=(16, 24, 32, 48), depths=(1, 1, 2, 1), kernel_size=5, head_hidden_size=64)
    return create_conv2former(Conv2Former, "conv2former_test", pretrained, **(sizes | kwargs))
