"""Features of boxes, and the head that names a box and corrects it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align
from torchvision.ops.misc import Conv2dNormActivation

from conv2former.tasks.detection.model.fpn import STRIDES

LEVELS = 4  # maps that boxes are read from: all but the coarsest
FINEST = 56  # the first map takes boxes of less than twice this side (geometric mean), the next those of less than 4x
POOL = 7  # positions of a box's side that the box head sees


def levels(boxes: Tensor) -> Tensor:
    """(N, 4) -> (N,) long: index of the map that each box is read from."""
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    return (side / FINEST + 1e-6).log2().floor().clamp(0, LEVELS - 1).long()


def pool(maps: Sequence[Tensor], boxes: Tensor, images: Tensor, side: int) -> Tensor:
    """Reads the features of boxes off the pyramid: RoIAlign, aligned, with as many samples as a bin has positions.

    Args:
        maps: Of the pyramid, (B, C, H / s, W / s) each, float32.
        boxes: Of all images, (N, 4).
        images: Index of each box's image, (N,).
        side: Positions of a box's side.

    Returns:
        (N, C, side, side).
    """
    level = levels(boxes)
    order = level.argsort()
    rois = torch.cat([images.unsqueeze(1).to(boxes.dtype), boxes], dim=1)[order]
    counts = level.bincount(minlength=LEVELS).tolist()
    features = [
        roi_align(x, part, side, spatial_scale=1 / stride, sampling_ratio=0, aligned=True)
        for x, part, stride in zip(maps[:LEVELS], rois.split(counts), STRIDES[:LEVELS], strict=True)
    ]
    return torch.cat(features)[order.argsort()]


class BoxHead(nn.Module):
    """Class and correction of a box from its features.

    Args:
        channels: Width of the pyramid.
        hidden: Width of the linear layers.
        num_classes: Classes of objects. One more output stands for background, the last; boxes are corrected for
            each class of objects by itself.
        kind: Two linear layers, or four convolutions with batch norm and one linear layer.
    """

    def __init__(self, channels: int, hidden: int, num_classes: int, *, kind: Literal["2fc", "4conv1fc"]) -> None:
        super().__init__()
        self.num_classes = num_classes
        first: list[nn.Module] = [nn.Flatten(), nn.Linear(channels * POOL**2, hidden), nn.ReLU(inplace=True)]
        if kind == "4conv1fc":
            layers = [Conv2dNormActivation(channels, channels, 3) for _ in range(4)] + first
        else:
            layers = [*first, nn.Linear(hidden, hidden), nn.ReLU(inplace=True)]
        self.trunk = nn.Sequential(*layers)
        self.classes = nn.Linear(hidden, num_classes + 1)
        self.offsets = nn.Linear(hidden, num_classes * 4)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.normal_(self.offsets.weight, std=0.001)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, channels, 7, 7) -> logits (N, num_classes + 1) and offsets (N, num_classes, 4), float32."""
        x = self.trunk(x)
        return self.classes(x).float(), self.offsets(x).float().unflatten(1, (self.num_classes, 4))
