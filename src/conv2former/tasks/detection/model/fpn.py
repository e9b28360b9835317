"""The feature pyramid between backbone and detector (Lin et al., arXiv:1612.03144)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

STRIDES = (4, 8, 16, 32, 64)


class FPN(nn.Module):
    """Five maps of one width from the backbone's four; the fifth is every second position of the fourth.

    Args:
        widths: Channels of the backbone's maps of stride 4, 8, 16 and 32.
        channels: Channels of all maps that come out.
    """

    def __init__(self, widths: Sequence[int], channels: int) -> None:
        super().__init__()
        self.fpn = FeaturePyramidNetwork(list(widths), channels, extra_blocks=LastLevelMaxPool())
        for module in self.fpn.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Four maps (B, widths[i], H / s, W / s) -> five maps (B, channels, H / s, W / s) of ``STRIDES``."""
        return list(self.fpn({str(i): feature for i, feature in enumerate(features)}).values())
