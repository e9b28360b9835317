"""mmdetection and mmsegmentation as oracles: how they run without compiled operations.

mmcv-lite has none. The three that detectors need are torchvision's here; whatever else is called raises.
Import this module before anything of mmcv, mmdet or mmseg.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor


class _Operations(types.ModuleType):
    """Stands for the compiled module ``mmcv._ext``."""

    def __init__(self) -> None:
        super().__init__("mmcv._ext")
        self.__spec__ = importlib.machinery.ModuleSpec("mmcv._ext", None)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"the oracle has no {name}: it is one of mmcv's compiled operations")

        return missing

    def nms(self, boxes: Tensor, scores: Tensor, *, iou_threshold: float, offset: int) -> Tensor:
        assert offset == 0
        return torchvision.ops.nms(boxes, scores, iou_threshold)

    def roi_align_forward(self, x: Tensor, rois: Tensor, output: Tensor, *_: Tensor, **settings: Any) -> None:
        assert settings["pool_mode"] == 1  # the mean
        output.copy_(
            torchvision.ops.roi_align(
                x,
                rois,
                (settings["aligned_height"], settings["aligned_width"]),
                settings["spatial_scale"],
                settings["sampling_ratio"],
                settings["aligned"],
            )
        )


sys.modules["mmcv._ext"] = _Operations()


class SharedBackbone(torch.nn.Module):
    """Gives the project's backbone the interface of mmdetection's and mmsegmentation's."""

    def __init__(self, backbone: torch.nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(x))

    def init_weights(self) -> None:
        """Nothing: the weights are the project's."""


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


def report(worst: Mapping[tuple[str, str], float], limits: Mapping[str, float], *, each: Collection[str]) -> bool:
    """Prints differences beside their limits, and says whether one is passed.

    Args:
        worst: Largest difference by kind and name.
        limits: Of each kind, in the order of the lines.
        each: Kinds of which every name has a line, of the others the one that differs most.
    """
    failed = False
    for what, limit in limits.items():
        of_it = [key for key in worst if key[0] == what]
        if of_it and what not in each:
            of_it = [max(of_it, key=lambda key: (np.isnan(worst[key]), worst[key]))]
        for key in of_it:
            passed = not worst[key] <= limit  # NaN, too
            failed |= passed
            print(f"  {what:<11} {key[1]:<45} {worst[key]:.1e}  limit {limit:g}{'  FAILED' if passed else ''}")
    return failed


def use_torchvision(config: Any) -> None:
    """RoIAlign with a gradient, and batch norm of one process, wherever a configuration says otherwise."""
    if isinstance(config, list):
        for item in config:
            use_torchvision(item)
    elif isinstance(config, dict):
        if config.get("type") == "RoIAlign":
            config["use_torchvision"] = True
        elif config.get("type") == "SyncBN":
            config["type"] = "BN"
        for item in config.values():
            use_torchvision(item)
