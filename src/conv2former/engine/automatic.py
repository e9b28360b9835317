"""Settings that a recipe leaves open ('auto'): they follow from the images, the weights and the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conv2former.checkpoints.weights import Weights, check_start, open_weights
from conv2former.config import COUNTERPARTS, NORMALISATION, Choices, Recipe, Start
from conv2former.data.sources import Splits
from conv2former.engine.launch import on_nvidia_gpu, world_size
from conv2former.engine.progress import Ticker
from conv2former.errors import UserError, is_first, plural, say_once
from conv2former.tasks import task_class

HELD_OUT = "data.val_fraction"
MOST_MEAN = 2  # above, it is of values to 255


def settled(recipe: Recipe, data: Path | None, weights: Weights | None) -> tuple[Recipe, Splits]:
    """The recipe with its open settings decided, and its images; says what was decided, and why.

    Args:
        recipe: With open settings.
        data: Of the images.
        weights: ``checked_weights``.

    Raises:
        UserError: Anything about the images.
    """

    def open_splits(recipe: Recipe, data: Path | None) -> Splits:
        with Ticker(lambda: f"looking for images in {data}", enabled=is_first()):
            return task_class(recipe.task).open_splits(recipe, data)

    splits, said = open_splits(recipe, data), Choices()
    held = getattr(splits, "held_out", False)
    if HELD_OUT in recipe.auto:
        fraction = choices(recipe, weights, len(splits.train) + len(splits.val))[HELD_OUT]
        if fraction[0] != recipe.value(HELD_OUT):
            splits = open_splits(recipe.settled({HELD_OUT: fraction[0]}), data)
        recipe = recipe.settled({HELD_OUT: fraction[0]})
        said = {HELD_OUT: fraction} if held else {}
    elif held and not recipe.brings_data:
        count = plural(len(splits.val), "image")
        say_once(f"no validation set: holding out {count} for validation ({HELD_OUT}={recipe.value(HELD_OUT):g})")
    found = choices(recipe, weights, len(splits.train), masks=getattr(splits, "has_masks", True))
    # nothing is to be told where what nobody has set stays as it is
    usual = [key for key in recipe.auto if key in recipe.left_open and found[key][0] == recipe.value(key)]
    _say(said | {key: found[key] for key in recipe.auto if key not in (*NORMALISATION, *usual)})
    return recipe.settled({key: value for key, (value, _) in found.items()}), splits


def checked_weights(recipe: Recipe) -> Weights | None:
    """What the recipe starts from.

    Raises:
        UserError: Weights are needed and none are given, they are not there, or they expect other images.
    """
    if max(recipe.data.mean) > MOST_MEAN:
        raise UserError("data.mean is subtracted from values of 0 to 1: divide it, and data.std, by 255")
    if warning := check_start(recipe.model):
        say_once(warning)
    weights = open_weights(recipe.model)
    expected = weights.normalisation if weights else {}
    if weights and any(len(values) != 3 for values in expected.values()):
        channels = len(next(iter(expected.values())))
        raise UserError(
            f"{weights.origin} is for images of {plural(channels, 'channel')}, ours have 3: give other weights"
        )
    given = {key: tuple(getattr(recipe.data, key)) for key in expected}
    wrong = [key for key in expected if f"data.{key}" not in recipe.auto and expected[key] != given[key]]
    if wrong:
        there, here = (", ".join(f"{key} {found[key]}" for key in wrong) for found in (expected, given))
        raise UserError(
            f"model.weights ({recipe.model.weights}) expects images of {there}, the recipe gives {here}: add "
            + " ".join(f"--set data.{key}=auto" for key in wrong)
        )
    known = weights.cfg.get("input_size") if weights else None
    own, side = known[-1] if known else None, getattr(recipe.data, "input_size", None)
    if own and side and max(own, side) >= 2 * min(own, side):
        say_once(
            f"the weights are of images of {own} pixels, this trains with {side}; with their size: "
            f"--set data.input_size={own}"
        )
    return weights


def choices(recipe: Recipe, weights: Weights | None, images: int, *, masks: bool = True) -> Choices:
    """What is chosen for each setting that may be 'auto', for that number of training images."""
    known: dict[str, Any] = dict(weights.normalisation if weights else {})
    schedule, machine = recipe.schedule, on_nvidia_gpu(recipe)
    epochs = None if "schedule.epochs" in recipe.auto else schedule.epochs
    counted = frozenset(key for key in COUNTERPARTS if getattr(schedule, key) is not None)
    known |= dict(short_side=None if "data.short_side" in recipe.auto else getattr(recipe.data, "short_side", None))
    known |= dict(epochs=epochs, counted=counted, world=world_size(recipe), sharded=recipe.engine.strategy == "fsdp")
    found = recipe.choices(Start(images=images, weights=weights is not None, gpu=machine, masks=masks, **known))
    if weights is not None and weights.task == recipe.task:  # its head has the shape that it was trained with
        for key in set(found) - {*recipe.left_open}:
            section, _, name = key.partition(".")
            own = weights.recipe.get(section)
            if section not in Recipe.model_fields and section != "augment" and isinstance(own, dict) and name in own:
                found[key] = (own[name], "of the weights")
    return found


def _say(found: Choices) -> None:
    if found:
        say_once("decided by the images, the weights and the machine (--set changes any of it):")
    for key, (value, reason) in found.items():
        say_once(f"  {key}={value}  ({reason})")
