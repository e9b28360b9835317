"""What segmentation minimises."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from conv2former.tasks.segmentation.masks import IGNORED
from conv2former.tasks.segmentation.upernet import resize


def weighted_loss(outputs: tuple[Tensor, Tensor | None], labels: Tensor, *, aux_weight: float) -> Tensor:
    """The loss of what ``UperNet`` gives in training, against classes (B, H, W)."""
    logits, auxiliary = outputs
    loss = pixel_loss(logits, labels, ignore=IGNORED)
    if auxiliary is not None:
        loss = loss + aux_weight * pixel_loss(auxiliary, labels, ignore=IGNORED)
    return loss


def pixel_loss(logits: Tensor, labels: Tensor, *, ignore: int = 255) -> Tensor:
    """Cross entropy of logits (B, K, h, w) brought to the size of labels (B, H, W).

    The sum is divided by all pixels, ignored ones included, as in mmseg: a crop that is half void counts half.
    """
    scaled = resize(logits.float(), labels)
    return F.cross_entropy(scaled, labels, ignore_index=ignore, reduction="sum") / labels.numel()
