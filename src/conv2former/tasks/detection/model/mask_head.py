"""Masks of boxes: the head that predicts them, what it should predict, and back into the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import roi_align

POOL = 14  # positions of a box's side that the mask head sees
SIDE = 28  # of the masks that it predicts
THRESHOLD = 0.5  # from which a pixel belongs to the object


class MaskHead(nn.Sequential):
    """Four 3x3 convolutions, one transposed that doubles the side, and a mask for each class.

    Initialised as torchvision does, which is the toolbox's way: normal after He et al. by the outputs, bias 0.

    (N, channels, 14, 14) -> logits (N, num_classes, 28, 28).
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(
            MaskRCNNHeads(channels, [channels] * 4, dilation=1), MaskRCNNPredictor(channels, channels, num_classes)
        )


def mask_targets(masks: Tensor, boxes: Tensor, objects: Tensor, padded: tuple[int, int]) -> Tensor:
    """The part of each box's object that lies in the box, at the resolution of the predicted masks.

    Args:
        masks: Of one image's objects, (K, h, w), 0 or 1.
        boxes: Within the image, (N, 4).
        objects: Index of each box's object, (N,).
        padded: Height and width of the images in the batch.

    Returns:
        (N, 28, 28), 0.0 or 1.0.
    """
    if not len(boxes):
        return boxes.new_zeros(0, SIDE, SIDE)
    used, index = objects.unique(return_inverse=True)
    height, width = masks.shape[1:]
    # Where the batch pads the image, the last pixels fade into background, as if the masks were padded as well.
    border = (0, int(width < padded[1]), 0, int(height < padded[0]))
    pixels = F.pad(masks[used], border).to(boxes.dtype).unsqueeze(1)
    rois = torch.cat([index.unsqueeze(1).to(boxes.dtype), boxes], dim=1)
    return (roi_align(pixels, rois, SIDE, sampling_ratio=0, aligned=True).squeeze(1) >= 0.5).to(boxes.dtype)


@torch.no_grad()
def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Puts predicted masks where they belong in the image.

    Args:
        masks: Probabilities, (N, 28, 28).
        boxes: Where they lie, (N, 4), pixels of the image.
        size: Height and width of the image.

    Returns:
        (N, height, width) bool, on the device of ``masks``.
    """
    height, width = size
    boxes = boxes.float()
    with torch.autocast(masks.device.type, enabled=False):
        down = _interpolation(boxes[:, 1], boxes[:, 3], height, masks.shape[1])
        across = _interpolation(boxes[:, 0], boxes[:, 2], width, masks.shape[2])
        return down @ masks.float() @ across.mT >= THRESHOLD


def _interpolation(start: Tensor, stop: Tensor, pixels: int, positions: int) -> Tensor:
    """(N,) ends of boxes on one axis -> (N, pixels, positions): weight of each position of a mask in each pixel.

    Linear between the centres of the positions, falling to nothing outside the outermost.
    """
    centres = torch.arange(pixels, device=start.device) + 0.5
    where = (centres - start.unsqueeze(1)) / (stop - start).unsqueeze(1) * positions - 0.5
    return (1 - (where.unsqueeze(2) - torch.arange(positions, device=start.device)).abs()).clamp(min=0)
