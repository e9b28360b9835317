"""The network of a classification recipe, and the names of its classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from conv2former.checkpoints.weights import Weights, copy_weights, open_weights
from conv2former.config import ModelSection
from conv2former.errors import UserError, failing, nearest, say_once
from conv2former.models.meta import check_args
from conv2former.ops import use_backend
from conv2former.tasks.backbone import RESERVED, created

SMALL = 64  # pixels; some networks take no smaller images


def build_model(section: ModelSection, *, classes: list[str]) -> tuple[Any, dict[str, Any], bool]:
    """The recipe's network, from scratch or from ``section.weights``.

    The classifier of the weights is kept where its classes have the names of ``classes``, or no names and their number.

    Returns:
        The network, the arguments that rebuild it with ``timm.create_model`` (those of the weights, changed by
        ``section.args``), and whether the classifier is that of the weights. What was loaded is said.

    Raises:
        UserError: Unknown model or argument, weights that do not fit.
    """
    if not timm.is_model(section.name):
        raise UserError(f"unknown model {section.name!r}{nearest(section.name, timm.list_models())}")
    weights = open_weights(section)
    args = (weights.args if weights else {}) | section.args
    rates = (("drop_path_rate", section.drop_path_rate), ("drop_rate", section.drop_rate))
    check_args(args, "model.args", reserved=RESERVED)
    options: dict[str, Any] = args | {key: rate for key, rate in rates if rate}  # not every timm model takes both
    network = created(section.name, num_classes=len(classes), **options)
    new = _new_classifier(weights, network, classes) if weights else {}
    if weights:
        say_once(copy_weights(weights, network, new=new))
        for name, parameter in network.named_parameters():
            if name.startswith(tuple(new)):  # so small that the first loss is that of guessing
                nn.init.normal_(parameter, std=0.01) if parameter.ndim > 1 else nn.init.zeros_(parameter)
    return network, args, bool(weights) and not new


def classifier_names(network: Any) -> tuple[str, ...]:
    """How the names of the classifier's parameters begin."""
    names = network.pretrained_cfg["classifier"]
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def _new_classifier(weights: Weights, network: Any, classes: list[str]) -> dict[str, str]:
    """The classifier, with the reason, if it is for other classes than the weights'."""
    there = weights.cfg.get("num_classes", 0)
    if there == len(classes) and list(weights.cfg.get("label_names") or classes) == classes:
        return {}
    reason = f"{there} classes there, {len(classes)} here" if there != len(classes) else "its classes are others"
    return dict.fromkeys(classifier_names(network), reason)


def class_names(model: Any) -> list[str]:
    """Names by index: those saved with the weights, ImageNet's synsets where the count is ImageNet's, else numbers."""
    names = model.pretrained_cfg.get("label_names")
    if names:
        return [str(name) for name in (names.values() if isinstance(names, dict) else names)]
    subset = infer_imagenet_subset(model)
    if subset:
        return list(ImageNetInfo(subset).label_names())
    return [str(index) for index in range(model.num_classes)]


@torch.inference_mode()
def check_answers(model: Any, config: Mapping[str, Any], args: Mapping[str, Any], what: str) -> None:
    """Refuses a classifier that does not answer to the images that its own preprocessing makes.

    Args:
        model: A timm classifier.
        config: timm's data configuration.
        args: What the network was built with.
        what: What messages call it.

    Raises:
        UserError: It takes no such images, or gives no number for each class.
    """
    channels, *size = config["input_size"]
    if channels != 3 or len(config["mean"]) not in (1, 3) or not args.get("global_pool", "avg"):
        raise UserError(f"{what} does not make one number for each class of RGB images: save the model again")
    if min(size) > SMALL:
        return
    with failing(f"{what} does not take the images that its preprocessing makes"), use_backend("reference"):
        model(torch.zeros(1, 3, *size))  # many networks take no images so small
