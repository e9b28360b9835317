"""The weights that a recipe starts from: a run, a folder, a repository on the hub, or what timm publishes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from conv2former.checkpoints.exported import refuse_exported
from conv2former.checkpoints.folder import read_dense
from conv2former.checkpoints.hub import (
    FROM_FOLDER,
    download_failure,
    find_model,
    hub_if_reachable,
    load_pretrained,
    read_config,
    read_json,
)
from conv2former.checkpoints.reading import check_finite, read_state_dict
from conv2former.config import ModelSection
from conv2former.errors import UserError, nearest, one_line, some
from conv2former.models.meta import check_args

TIMM = "timm"  # in the place of a path: what timm publishes for the model
WAYS = (
    "--pretrained with the --model NAME.TAG of a model whose weights timm publishes (convnext_nano.in12k_ft_in1k), "
    "--weights with a run, a folder or hf-hub:OWNER/NAME, or --from-scratch for random weights"
)


@dataclass(frozen=True)
class Weights:
    """Weights and what is known of them before they are read.

    Attributes:
        origin: As the recipe names them.
        file: Where they are; None if timm publishes them.
        task: For which the model was trained.
        architecture: timm's name of it, or of its backbone.
        args: Of ``timm.create_model`` that rebuild it, without the number of classes.
        cfg: timm's ``pretrained_cfg``; at least ``mean`` and ``std``.
        recipe: What a detector or segmentation model was trained with, not checked.
        classes: Of such a model.
    """

    origin: str
    file: Path | None
    task: str
    architecture: str
    args: dict[str, Any]
    cfg: dict[str, Any]
    recipe: dict[str, Any] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)

    @property
    def normalisation(self) -> dict[str, tuple[float, ...]]:
        """``mean`` and ``std`` of the images that the model was trained on, where they are known."""
        return {key: tuple(self.cfg[key]) for key in ("mean", "std") if self.cfg.get(key)}

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """Names to tensors, of the whole model; raises UserError."""
        if self.file is None:
            return _downloaded(".".join(filter(None, (self.architecture, self.cfg.get("tag")))))
        if self.task == "classification":
            return load_pretrained(self.file).state_dict()
        return read_state_dict(self.file)


def _downloaded(name: str) -> dict[str, Tensor]:
    """What timm publishes for a model's name."""
    try:
        with hub_if_reachable():
            return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # of timm, the hub's client or the HTTP library beneath it
        instead = f"--weights with {FROM_FOLDER}, or --from-scratch"
        raise download_failure(f"timm's weights of {name}", error, instead) from error


def open_weights(section: ModelSection) -> Weights | None:
    """What ``model.weights`` names; None where there are none.

    Raises:
        UserError: Nothing there, or weights of another architecture than ``model.name``.
    """
    if not section.weights:
        return None
    weights = _published(section.name) if section.weights == TIMM else saved_weights(section.weights)
    if weights.architecture.split(".")[0] != section.name.split(".")[0]:
        raise UserError(
            f"model.weights ({section.weights}) holds a {weights.architecture}, the recipe says {section.name}: "
            f"give --model {weights.architecture} or other weights"
        )
    return weights


def saved_weights(path: str) -> Weights:
    """Those of a run or a saved model of any task; raises UserError."""
    refuse_exported(Path(path))
    folder, file = find_model(path)
    config = read_json(folder)
    task = str(config.get("task", "classification"))
    if task == "classification":
        cfg, architecture, args = read_config(folder)
        return Weights(path, file, task, architecture, {k: v for k, v in args.items() if k != "num_classes"}, cfg)
    dense = read_dense(folder, task)
    recipe = dense.recipe
    section = recipe.get("model")
    own = section.get("args", {}) if isinstance(section, dict) else None
    if not isinstance(own, dict):
        raise UserError(f"the recipe in the config.json of {path} is damaged: save the model again")
    check_args(own, f"model.args in the config.json of {path}")
    return Weights(
        path, file, task, config["architecture"], own, config.get("pretrained_cfg") or {}, recipe, dense.classes
    )


def _published(name: str) -> Weights:
    if not timm.is_model(name.split(".")[0]):
        raise UserError(f"unknown model {name!r}{nearest(name, timm.list_models())}")
    if not has_published_weights(name):
        raise UserError(f"timm publishes no weights for {name}: start from {WAYS}")
    cfg: Any = get_pretrained_cfg(name)
    return Weights(TIMM, None, "classification", cfg.architecture, {}, cfg.to_dict())


def has_published_weights(name: str) -> bool:
    """Whether timm publishes weights for a model's name, with or without a tag; raises UserError for an unknown tag."""
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UserError(f"timm does not know {name}: {one_line(error)}") from None
    return bool(cfg and (cfg.url or cfg.file or cfg.hf_hub_id))


def check_start(section: ModelSection) -> str | None:
    """Refuses to start at random where weights are needed; a line to print where a tag may be mistaken for them.

    Raises:
        UserError: Weights are needed and none are named.
    """
    if section.weights:
        return None
    if section.needs_weights:
        raise UserError(f"this recipe fine-tunes, and no weights are given: {WAYS}")
    if "." in section.name and has_published_weights(section.name):
        return (
            f"warning: {section.name} names weights, and training starts from random ones: add --pretrained for those "
            f"that timm publishes, or give --model {section.name.split('.')[0]}"
        )
    return None


def copy_weights(
    weights: Weights, model: nn.Module, *, prefix: str = "", needed: str = "", new: Mapping[str, str] | None = None
) -> str:
    """Copies weights into a network; what they lack, or have in another shape, stays as it was initialised.

    Args:
        weights: To copy from.
        model: To copy into.
        prefix: What the network's names have before those of the weights.
        needed: How the names begin that the weights must have.
        new: How names begin that are not copied in any case, with the reason.

    Returns:
        A line that says what was loaded, what starts new, and what is not used.

    Raises:
        UserError: The weights lack what is needed.
    """
    check_finite(weights.state, weights.origin)
    own, skipped = model.state_dict(), tuple(new or ())
    state = {f"{prefix}{name}": tensor for name, tensor in weights.state.items()}
    fitting = {
        name: tensor
        for name, tensor in state.items()
        if name in own and own[name].shape == tensor.shape and not name.startswith(skipped)
    }
    missing = [name for name in own if name not in fitting]
    unused = [name for name in state if name not in fitting]
    lacking = [name for name in missing if name.startswith(needed) and not name.startswith(skipped)]
    if lacking:
        raise UserError(
            f"model.weights ({weights.origin}) does not fit the recipe's model.args: {some(lacking, 3)} differ"
        )
    model.load_state_dict(fitting, strict=False)
    reasons = some(list(dict.fromkeys((new or {}).values())))
    parts = [f"weights: {len(fitting)} tensors of {weights.origin} ({weights.architecture}) loaded"]
    parts += [f"{len(missing)} start new ({_groups(missing)}{': ' + reasons if reasons else ''})"] * bool(missing)
    parts += [f"{len(unused)} of the weights not used ({_groups(unused)})"] * bool(unused)
    return ", ".join(parts)


def _groups(names: list[str]) -> str:
    """The parts of a network that tensors belong to."""
    return some(list(dict.fromkeys(name.removeprefix("backbone.model.").rsplit(".", 1)[0] for name in names)), 3)
