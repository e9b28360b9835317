"""The registered names of the hierarchical networks (Table 1, and small ones of our own), as timm's entrypoints."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from conv2former.models.conv2former import Conv2Former


def create_conv2former(model_cls: type[nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """Builds a registered model through timm, with one clear error where weights are asked for that nobody publishes.

    ``variant`` is the registered name; the other arguments are timm's own and those of ``model_cls``.

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


def register(name: str, create: Callable[..., Any], model_args: dict[str, Any], doc: str, *, module: str) -> None:
    """Registers a model with timm: makes its entrypoint, the function ``name`` of the module that has its default_cfgs.

    The entrypoint calls ``create`` with the name, ``pretrained`` and ``model_args``, which its caller can change.
    """

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(name, pretrained, **(model_args | kwargs))

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__, entrypoint.__module__ = doc, module
    setattr(sys.modules[module], name, register_model(entrypoint))


def default_cfg(**overrides: Any) -> dict[str, Any]:
    """What timm knows about a model without building it: image size, normalisation, crop, first and last layer.

    ImageNet mean and standard deviation: the authors' README. The paper says nothing of the crop: 0.9 at 224 is Swin's
    (ConvNeXt evaluates at 0.875), 1.0 at 384 is what both use for fine-tuned models.
    """
    cfg = dict(
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
    return cfg | overrides


# Table 1; the kernel of N is the released checkpoint's.
SIZES: dict[str, dict[str, Any]] = {
    "n": dict(dims=(64, 128, 256, 512), depths=(2, 2, 8, 2), kernel_size=7),
    "t": dict(dims=(72, 144, 288, 576), depths=(3, 3, 12, 3)),
    "s": dict(dims=(72, 144, 288, 576), depths=(4, 4, 32, 4)),
    "b": dict(dims=(96, 192, 384, 768), depths=(4, 4, 34, 4)),
    "l": dict(dims=(128, 256, 512, 1024), depths=(4, 4, 48, 4)),
}

# Not in the paper. Depths and the steps from width to width follow ConvNeXt V2's small line. From femto on the head is
# halved, so that the stages get the parameters.
SMALL_SIZES: dict[str, dict[str, Any]] = {
    # for CPUs: about 9M and 5M parameters
    "pico": dict(dims=(48, 96, 192, 384), depths=(2, 2, 8, 2), kernel_size=7),
    "femto": dict(dims=(40, 80, 160, 320), depths=(2, 2, 6, 2), kernel_size=7, head_hidden_size=640),
    # for edge devices: about 3.8M parameters
    "atto": dict(dims=(32, 64, 128, 256), depths=(2, 2, 6, 2), kernel_size=7, head_hidden_size=640),
    # for tests and quick trials
    "test": dict(dims=(16, 24, 32, 48), depths=(1, 1, 2, 1), kernel_size=5, head_hidden_size=64),
}

CFG_384 = dict(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0)

_cfgs: dict[str, Any] = {f"conv2former_{size}.untrained": default_cfg() for size in (*SIZES, *SMALL_SIZES)}
_cfgs |= {f"conv2former_{size}.untrained_384": default_cfg(**CFG_384) for size in ("b", "l")}
_cfgs["conv2former_test.untrained"] = default_cfg(input_size=(3, 64, 64), pool_size=(2, 2))
default_cfgs = generate_default_cfgs(_cfgs)

for _size, _args in (SIZES | SMALL_SIZES).items():
    _doc = f"Conv2Former-{_size.upper()} (Table 1)." if _size in SIZES else f"Conv2Former {_size}, not in the paper."
    register(f"conv2former_{_size}", partial(create_conv2former, Conv2Former), _args, _doc, module=__name__)
