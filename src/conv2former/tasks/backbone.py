"""A timm backbone under a detector or a segmentation model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from conv2former.config import ModelSection
from conv2former.errors import UserError, failing, nearest
from conv2former.models.meta import bounded, check_args

RESERVED = ("num_classes",)  # beside what timm's factory takes: the data say it
STRIDES = [4, 8, 16, 32]
LAST_LAYER = 10_000  # of the heads, in layer-wise decay


class Backbone(nn.Module):
    """Four maps of stride 4, 8, 16 and 32 from any timm model that has them; names of the weights as in ``model``.

    What only a classifier needs, timm's head and norms behind the last stage, is taken off.

    Attributes:
        widths: Channels of the four maps.

    Args:
        section: Name, arguments and stochastic depth; its weights are not looked at.

    Raises:
        UserError: Unknown model or argument, or one without such maps.
    """

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        self.model: Any = _create(section)
        info = feature_info(self.model)
        strides = [entry["reduction"] for entry in info]
        if not set(STRIDES) <= set(strides):
            found = ", ".join(str(stride) for stride in sorted(set(strides)))
            raise UserError(
                f"{section.name} has maps of stride {found}; detection and segmentation need 4, 8, 16 and 32: take a "
                "hierarchical model with the paper's stem, conv2former_t for example"
            )
        # the last entry of each stride
        self.indices = [len(strides) - 1 - strides[::-1].index(stride) for stride in STRIDES]
        self.widths = [info[index]["num_chs"] for index in self.indices]
        self.model.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> four maps (B, C, H / stride, W / stride)."""
        return self.model.forward_intermediates(
            images, indices=self.indices, intermediates_only=True, output_fmt="NCHW"
        )


def feature_info(model: Any) -> list[dict[str, Any]]:
    """timm's description of each intermediate map of a model: some keep a list, some an object around one."""
    return [dict(entry) for entry in getattr(model.feature_info, "info", model.feature_info)]


def _create(section: ModelSection) -> Any:
    if not timm.is_model(section.name):
        raise UserError(f"unknown model {section.name!r}{nearest(section.name, timm.list_models())}")
    check_args(section.args, "model.args", reserved=RESERVED)
    options: dict[str, Any] = dict(section.args, num_classes=0)
    if section.drop_path_rate:
        options["drop_path_rate"] = section.drop_path_rate
    if section.drop_rate:
        raise UserError("model.drop_rate is a classifier's: leave it out")
    # Swin and its kin take any size only when told so; others do not know the argument
    model = created(section.name, dict(strict_img_size=False), **options)
    for needed in ("feature_info", "forward_intermediates", "prune_intermediate_layers"):
        if not hasattr(model, needed):
            raise UserError(f"{section.name} gives no maps of its stages (timm): take another model as backbone")
    return model


def created(name: str, attempt: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """timm's model for a recipe, its size bounded; ``attempt`` holds arguments that not every model knows.

    Raises:
        UserError: Whatever a network's constructor raises for arguments that it does not like.
    """
    with failing(what := f"model.args of {name}"), bounded(what):
        try:
            return timm.create_model(name, **(attempt or {}), **options)
        except TypeError:
            if not attempt:
                raise
            return timm.create_model(name, **options)


class OnBackbone(nn.Module):
    """What stands on a ``Backbone``, with the methods that the engine asks of a timm model."""

    backbone: Any
    num_classes: int

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Any:
        """Layers for layer-wise decay: the backbone's own, then all that stands on it."""
        model = self.backbone.model
        layers = group_with_matcher(model.named_parameters(), model.group_matcher(coarse=coarse), reverse=True)

        def layer(name: str) -> int:
            return layers.get(name.removeprefix("backbone.model."), LAST_LAYER)

        return layer

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The backbone's."""
        own: set[str] = getattr(self.backbone.model, "no_weight_decay", set)()
        return {f"backbone.model.{name}" for name in own}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the backbone's activations in the backward pass instead of storing them."""
        self.backbone.model.set_grad_checkpointing(enable)
