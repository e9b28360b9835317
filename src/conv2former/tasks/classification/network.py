"""The network of a classification recipe, and the names of its classes."""

from __future__ import annotations

from typing import Any

import timm
from timm.data import ImageNetInfo, infer_imagenet_subset

from conv2former import checkpoints
from conv2former.config import ModelSection
from conv2former.errors import UserError, nearest, one_line, some
from conv2former.tasks.backbone import RESERVED


def build_model(section: ModelSection, *, classes: list[str]) -> tuple[Any, dict[str, Any]]:
    """The recipe's network, from scratch or from ``section.weights``.

    The classifier of the weights is kept where its classes have the names of ``classes``, or no names and their number.

    Returns:
        The network, and the arguments that rebuild it with ``timm.create_model``: those of the weights, changed by
        ``section.args``.

    Raises:
        UserError: Unknown model or argument, weights that do not fit.
    """
    if not timm.is_model(section.name):
        raise UserError(f"unknown model {section.name!r}{nearest(section.name, timm.list_models())}")
    source: Any = None
    args = dict(section.args)
    if section.weights:
        source = checkpoints.load_pretrained(section.weights)
        architecture = source.pretrained_cfg["architecture"]
        if architecture != section.name.split(".")[0]:
            raise UserError(
                f"model.weights ({section.weights}) holds a {architecture}, the recipe says {section.name}: "
                f"give --model {architecture} or other weights"
            )
        args = checkpoints.saved_model_args(section.weights) | args
    rates = (("drop_path_rate", section.drop_path_rate), ("drop_rate", section.drop_rate))
    reserved = sorted(RESERVED & args.keys())
    if reserved:
        raise UserError(f"model.args cannot hold {', '.join(reserved)}: weights are given as model.weights")
    options: dict[str, Any] = args | {key: rate for key, rate in rates if rate}  # not every timm model takes both
    try:
        network = timm.create_model(section.name, num_classes=len(classes), **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"model.args of {section.name}: {one_line(error)}") from None
    if source is not None:
        _copy_weights(source, network, classes, origin=str(section.weights))
    return network, args


def _copy_weights(source: Any, target: Any, classes: list[str], *, origin: str) -> None:
    state, wanted = source.state_dict(), target.state_dict()
    if list(source.pretrained_cfg.get("label_names") or classes) != classes or source.num_classes != len(classes):
        classifier = target.pretrained_cfg["classifier"]
        for name in [classifier] if isinstance(classifier, str) else classifier:
            # the new classifier stays as it was initialised
            state |= {key: value for key, value in wanted.items() if key.startswith(f"{name}.")}
    wrong = [key for key in wanted | state if key not in state or key not in wanted]
    wrong += [key for key in wanted if key in state and wanted[key].shape != state[key].shape]
    if wrong:
        raise UserError(f"model.weights ({origin}) does not fit the recipe's model.args: {some(wrong, 3)} differ")
    target.load_state_dict(state)


def class_names(model: Any) -> list[str]:
    """Names by index: those saved with the weights, ImageNet's synsets where the count is ImageNet's, else numbers."""
    names = model.pretrained_cfg.get("label_names")
    if names:
        return [str(name) for name in (names.values() if isinstance(names, dict) else names)]
    subset = infer_imagenet_subset(model)
    if subset:
        return list(ImageNetInfo(subset).label_names())
    return [str(index) for index in range(model.num_classes)]
