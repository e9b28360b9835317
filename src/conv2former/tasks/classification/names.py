"""The names of a model's classes."""

from __future__ import annotations

from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset


def class_names(model: Any) -> list[str]:
    """Names by index: those saved with the weights, ImageNet's synsets where the count is ImageNet's, else numbers."""
    names = model.pretrained_cfg.get("label_names")
    if names:
        return [str(name) for name in (names.values() if isinstance(names, dict) else names)]
    subset = infer_imagenet_subset(model)
    if subset:
        return list(ImageNetInfo(subset).label_names())
    return [str(index) for index in range(model.num_classes)]
