"""The isotropic models of Sec. 4.4 and Table 7: one resolution throughout, like a plain ViT.

18 blocks, the hierarchical models' block and head; the widths (320 and 640) and the layout of the three-convolution
embedding are settled by counting, the paper gives neither.
"""

from typing import Any

import torch
from timm.layers.trace_utils import _assert
from timm.models import checkpoint, generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from conv2former.models.conv2former import Conv2Former
from conv2former.models.fused import fuse_stem
from conv2former.models.layers import Layer, activation, channels_last, check_image_size
from conv2former.models.variants import create_conv2former, default_cfg, register

__all__ = ["Conv2FormerIsotropic"]


class PatchEmbed(nn.Module):
    """(B, in_chans, H, W) -> (B, dim, H / 16, W / 16).

    Either one 16x16 convolution with stride 16, or three: 3x3 s4, 3x3 s2 and 2x2 s2, half as wide before the last, each
    of the first two followed by GELU and BatchNorm like the hierarchical stem.
    """

    def __init__(self, in_chans: int, dim: int, *, convs: int = 1, act_layer: Layer = nn.GELU) -> None:
        super().__init__()
        self.stride = 16
        if convs == 1:
            self.proj: nn.Module = nn.Conv2d(in_chans, dim, 16, stride=16)
        elif convs == 3:
            mid = dim // 2
            self.proj = nn.Sequential(
                nn.Conv2d(in_chans, mid, 3, stride=4, padding=1, bias=False),
                act_layer(),
                nn.BatchNorm2d(mid),
                nn.Conv2d(mid, mid, 3, stride=2, padding=1, bias=False),
                act_layer(),
                nn.BatchNorm2d(mid),
                nn.Conv2d(mid, dim, 2, stride=2, bias=False),
            )
        else:
            raise ValueError(f"patch_embed_convs is {convs}: use 1 or 3 (Table 7)")

    def forward(self, x: Tensor) -> Tensor:
        check_image_size(x, self.stride)
        return self.proj(channels_last(x))

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """What computes the same in evaluation, without batch norms."""
        if not isinstance(self.proj, nn.Sequential) or len(self.proj) != 7:
            return self
        convs, norms, acts = ([self.proj[i] for i in indices] for indices in ((0, 3, 6), (2, 5), (1, 4)))
        return fuse_stem(self, PatchEmbed, convs, norms, acts, min_size=self.stride)


class Conv2FormerIsotropic(Conv2Former):
    """One stage at stride 16. Intermediate features are those of single blocks, as in timm's ViTs.

    Args:
        dim: Channels.
        depth: Blocks.
        patch_embed_convs: Convolutions of the patch embedding, 1 or 3 (Table 7).
        **kwargs: As for ``Conv2Former``.
    """

    feature_layers = "stages.0.blocks"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        dim: int = 320,
        depth: int = 18,
        patch_embed_convs: int = 1,
        **kwargs: Any,
    ) -> None:
        act_layer = activation(kwargs.get("act_layer"))
        stem = PatchEmbed(in_chans, dim, convs=patch_embed_convs, act_layer=act_layer)
        super().__init__(in_chans, num_classes, global_pool, dims=(dim,), depths=(depth,), stem=stem, **kwargs)
        self.feature_info = [
            dict(num_chs=dim, reduction=stem.stride, module=f"stages.0.blocks.{i}") for i in range(depth)
        ]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """As ``Conv2Former.forward_intermediates``, with an index per block."""
        _assert(output_fmt == "NCHW", "output_fmt must be NCHW")
        blocks: Any = self.stages[0].blocks
        take, last = feature_take_indices(len(blocks), indices)
        x = self.stem(x).permute(0, 2, 3, 1)
        intermediates = []
        for i, block in enumerate(blocks[: last + 1] if stop_early else blocks):
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            if i in take:
                intermediates.append(x.permute(0, 3, 1, 2))
        x = x.permute(0, 3, 1, 2)
        return intermediates if intermediates_only else (x, intermediates)


SIZES: dict[str, dict[str, Any]] = {
    "is": dict(dim=320),
    "ib": dict(dim=640),
    "is_conv3": dict(dim=320, patch_embed_convs=3),
    "ib_conv3": dict(dim=640, patch_embed_convs=3),
}


def _cfg(size: str) -> dict[str, Any]:
    """The hierarchical models' preprocessing with the isotropic layout's names and sizes."""
    first = "stem.proj.0" if "conv3" in size else "stem.proj"
    return default_cfg(pool_size=(14, 14), min_input_size=(3, 16, 16), first_conv=first)


default_cfgs = generate_default_cfgs({f"conv2former_{size}.untrained": _cfg(size) for size in SIZES})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> Conv2FormerIsotropic:
    # four maps, as a feature pyramid wants: after each quarter of the blocks
    depth = kwargs.get("depth", 18)
    feature_cfg = dict(out_indices=tuple(depth * i // 4 - 1 for i in range(1, 5)), feature_cls="getter")
    return create_conv2former(Conv2FormerIsotropic, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


for _size, _args in SIZES.items():
    _doc = f"Conv2Former-{_size[:2].upper()} with {_args.get('patch_embed_convs', 1)} embedding convolutions (Table 7)."
    register(f"conv2former_{_size}", _create, _args, _doc, module=__name__)
