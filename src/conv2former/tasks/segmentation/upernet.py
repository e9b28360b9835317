"""UperNet: pyramid pooling, a feature pyramid and their fusion, with an auxiliary FCN head.

Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018, in the form that Sec. 4.6 of the paper
refers to (Swin's settings in mmseg), with which it agrees to the last bit (docs/parity.md). Batch norm here becomes
synchronised batch norm by ``engine.sync_batchnorm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conv2former.config import ModelSection
from conv2former.tasks.backbone import Backbone, OnBackbone
from conv2former.tasks.segmentation.config import SegmenterSection

AUX_LEVEL = 2  # the stage-3 map


class ConvNorm(nn.Sequential):
    """Convolution without bias, batch norm, ReLU; (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class PyramidPooling(nn.Module):
    """The map beside its averages over grids of each scale, fused.

    Args:
        in_channels: Channels of the map.
        channels: Of each average, and of the result.
        scales: Cells on a side of the grids.
    """

    def __init__(self, in_channels: int, channels: int, scales: Sequence[int]) -> None:
        super().__init__()
        self.scales = list(scales)
        self.averages = nn.ModuleList(ConvNorm(in_channels, channels, 1) for _ in scales)
        self.fuse = ConvNorm(in_channels + len(self.scales) * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, channels, H, W)."""
        pooled = (conv(average_cells(x, scale)) for conv, scale in zip(self.averages, self.scales, strict=True))
        return self.fuse(torch.cat([x, *(resize(average, x) for average in pooled)], dim=1))


class UperNetDecoder(nn.Module):
    """From four maps to one of stride 4.

    Args:
        widths: Channels of the maps, finest first.
        channels: Width of all layers and of the result.
        scales: Of the pyramid pooling on the coarsest map.
    """

    def __init__(self, widths: Sequence[int], *, channels: int, scales: Sequence[int]) -> None:
        super().__init__()
        self.pooling = PyramidPooling(widths[-1], channels, scales)
        self.lateral = nn.ModuleList(ConvNorm(width, channels, 1) for width in widths[:-1])
        self.smooth = nn.ModuleList(ConvNorm(channels, channels, 3) for _ in widths[:-1])
        self.fuse = ConvNorm(len(widths) * channels, channels, 3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C, H / stride, W / stride) -> (B, channels, H / 4, W / 4)."""
        top = self.pooling(maps[-1])
        merged = [top]
        for x, lateral in zip(reversed(maps[:-1]), reversed(self.lateral), strict=True):
            x = lateral(x)
            merged.insert(0, x + resize(merged[0], x))
        smoothed = [smooth(x) for smooth, x in zip(self.smooth, merged[:-1], strict=True)]
        return self.fuse(torch.cat([smoothed[0], *(resize(x, smoothed[0]) for x in [*smoothed[1:], top])], dim=1))


class Classifier(nn.Sequential):
    """Dropout of whole channels and a class for each position; (B, C, H, W) -> (B, K, H, W)."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        conv = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(conv.weight, std=0.01)
        nn.init.constant_(conv.bias, 0.0)  # type: ignore[arg-type]
        super().__init__(nn.Dropout2d(dropout), conv)


class UperNet(OnBackbone):
    """A segmentation model.

    Args:
        backbone: Gives four maps.
        section: Widths of the decoder.
        num_classes: Classes K.
    """

    def __init__(self, backbone: Backbone, section: SegmenterSection, *, num_classes: int) -> None:
        super().__init__()
        self.backbone, self.num_classes = backbone, num_classes
        self.decoder = UperNetDecoder(backbone.widths, channels=section.channels, scales=section.pool_scales)
        self.classifier = Classifier(section.channels, num_classes, section.dropout)
        self.auxiliary: nn.Module | None = None
        if section.aux_weight:
            self.auxiliary = nn.Sequential(
                ConvNorm(backbone.widths[AUX_LEVEL], section.aux_channels, 3),
                Classifier(section.aux_channels, num_classes, section.dropout),
            )

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) -> logits (B, K, H / 4, W / 4); in training also the auxiliary ones (B, K, H / 16, W / 16)."""
        maps = self.backbone(images)
        logits = self.classifier(self.decoder(maps))
        if not self.training:
            return logits
        return logits, self.auxiliary(maps[AUX_LEVEL]) if self.auxiliary is not None else None


def build_upernet(model: ModelSection, section: SegmenterSection, *, num_classes: int) -> UperNet:
    """From a recipe; raises UserError where the backbone does not fit."""
    return UperNet(Backbone(model), section, num_classes=num_classes)


def average_cells(x: Tensor, cells: int) -> Tensor:
    """(B, C, H, W) -> (B, C, cells, cells), as PyTorch's adaptive average pooling."""
    if not (torch.compiler.is_exporting() and any(isinstance(side, torch.SymInt) for side in x.shape[-2:])):
        return F.adaptive_avg_pool2d(x, cells)
    return average_by_products(x, cells)  # exporters have no other form for it where a side is free


def average_by_products(x: Tensor, cells: int) -> Tensor:
    """The same to rounding."""
    down, across = (_cell_weights(side, cells, x) for side in x.shape[-2:])
    return down @ x @ across.mT


def _cell_weights(side: int, cells: int, like: Tensor) -> Tensor:
    """(cells, side): what each position of a side counts in the average of each cell, of the type of ``like``."""
    position, cell = torch.arange(side, device=like.device), torch.arange(cells, device=like.device)[:, None]
    # a cell goes from floor(cell * side / cells) to ceil((cell + 1) * side / cells); cells may overlap
    inside = ((position + 1) * cells > cell * side) & (position * cells < (cell + 1) * side)
    weights = inside.to(like.dtype)
    return weights / weights.sum(dim=1, keepdim=True)


def resize(x: Tensor, like: Tensor | tuple[int, int] | Any) -> Tensor:
    """Bilinear to the size of another map, or to (H, W)."""
    size = like.shape[-2:] if isinstance(like, Tensor) else like
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
