"""Networks that timm does not know, on disk: ``config.json`` and ``model.safetensors``, like a classifier's folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from conv2former.checkpoints.hub import (
    CONFIG_FILE,
    WEIGHT_FILES,
    check_replaceable,
    differences,
    find_model,
    read_json,
    written_whole,
)
from conv2former.checkpoints.reading import StrPath, read_state_dict
from conv2former.config import Recipe
from conv2former.errors import UserError
from conv2former.models.meta import bounded


@dataclass(frozen=True)
class SavedDense:
    """What such a folder holds beside the weights."""

    config_file: Path  # where it is from
    weights: Path  # the file
    recipe: dict[str, Any]  # what it was trained with, not checked; ``model.args`` rebuild the backbone
    classes: list[str]  # K names


def save_dense(
    folder: StrPath,
    recipe: Recipe,
    *,
    state: Mapping[str, Tensor],
    classes: Sequence[str],
    model_args: Mapping[str, Any],
    note: Mapping[str, Any],
) -> None:
    """Writes a model whole or not at all; one that is in ``folder`` already is replaced.

    ``recipe`` is what the model was trained with, ``model_args`` rebuild the backbone by ``timm.create_model``, and
    ``note`` has further facts for ``config.json``.

    Raises:
        UserError: ``folder`` is a file, holds something else than a model, or cannot be written.
    """
    folder = Path(folder)
    check_replaceable(folder, overwrite=True)
    config = dict(
        architecture=recipe.model.name,
        task=recipe.task,
        pretrained_cfg=dict(mean=recipe.data.mean, std=recipe.data.std),
        label_names=list(classes),
        recipe=portable(recipe, model_args),
        conv2former=dict(note),
    )
    with written_whole(folder.resolve()) as new:
        new.mkdir()
        (new / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, new / WEIGHT_FILES[0], metadata=dict(format="pt"))


def portable(recipe: Recipe, model_args: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe for JSON that needs no other weights; ``model_args`` rebuild the backbone by ``timm.create_model``."""
    section = recipe.model.model_copy(update=dict(weights=None, args=dict(model_args)))
    return recipe.model_copy(update=dict(model=section)).model_dump(mode="json")


def read_dense(path: StrPath, task: str) -> SavedDense:
    """What a saved model says of itself; raises UserError where it is none of that task."""
    folder, weights = find_model(Path(path))
    config = read_json(folder)
    found = config.get("task", "classification")
    if found != task:
        raise UserError(f"{folder} holds a {found} model: {task} needs one that was trained for it")
    recipe, classes = config.get("recipe") or {}, config.get("label_names")
    if not isinstance(classes, list) or not classes or len({*classes}) < len(classes):
        raise UserError(f"{folder / CONFIG_FILE} names no classes, or one twice: save the model again")
    return SavedDense(folder / CONFIG_FILE, weights, recipe, [str(name) for name in classes])


def load_dense(saved: SavedDense, make: Callable[[], nn.Module]) -> nn.Module:
    """The network that ``make`` builds, with the saved weights.

    Raises:
        UserError: The weights do not fit, or the network gets far larger than they are.
    """
    state = read_state_dict(saved.weights)
    # the backbone is built with the head of a classifier, which is then taken off
    with bounded(str(saved.config_file), most=1e8 + 4 * sum(tensor.numel() for tensor in state.values())):
        model = make()
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if difference := differences(expected, state):
        raise UserError(f"{saved.weights} does not fit {CONFIG_FILE} beside it: {difference}")
    model.load_state_dict(state)
    return model.eval()
