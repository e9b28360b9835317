"""The registered names of the hierarchical networks (Table 1, and small ones of our own), as timm's entrypoints."""

from __future__ import annotations

from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from conv2former.models.conv2former import Conv2Former


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
            "pretrained=True), or --model local-dir:DST in timm's scripts, which also take --checkpoint FILE"
        )
    stages = tuple(range(len(kwargs.get("dims", ()))))
    kwargs.setdefault("feature_cfg", dict(out_indices=stages, flatten_sequential=True))
    dtype = kwargs.pop("dtype", None)
    with torch.device(kwargs.pop("device", None) or torch.get_default_device()):
        return build_model_with_cfg(model_cls, variant, pretrained, **kwargs).to(dtype=dtype)


def default_cfg(**overrides: Any) -> dict[str, Any]:
    """What timm knows about a model without building it: image size, normalisation, crop, first and last layer.

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
