"""What may change when a run goes on, and what may not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from conv2former.config import Recipe
from conv2former.engine.batch import KEYS, BatchPlan, fitting_worlds, plan_batch
from conv2former.engine.checkpointing import CheckpointManager
from conv2former.engine.run_dir import RunDir
from conv2former.errors import UserError, resume_command, some

# another network cannot take the checkpoint's weights
KEPT = ("name", "args", "weights", "freeze_batchnorm")


def has_checkpoints(run: RunDir, recipe: Recipe) -> bool:
    """Whether there is something to go on from; nothing is needed where the run was stopped before its first step.

    Raises:
        UserError: The run has been trained, its checkpoints are gone, and it is not finished.
    """
    if CheckpointManager(run.checkpoints).newest_first():
        return True
    traces = run.traces()
    if traces and not is_finished(run, recipe):
        raise UserError(
            f"{run.path} has been trained ({some(traces)}), but no checkpoint is left in {run.checkpoints}: copy one "
            "back there, or start the run anew with --overwrite in the place of --resume"
        )
    return False


def is_finished(run: RunDir, recipe: Recipe) -> bool:
    """Whether a run has come to the end of a recipe, and its best weights are there."""
    own = run.facts().get("recipe_hash")  # older versions do not say it there
    ends = [row.get("recipe_hash", own) for row in run.events() if row.get("event") == "finished"]
    return recipe.digest() in ends and run.best.is_dir()


def resumed_recipe(run: RunDir, own: Recipe, given: Recipe | None, *, force: bool) -> Recipe:
    """The recipe to go on with: the run's own, with what a given one changes.

    What moves no weight (``config.FREE``) may always change, the rest with ``force``, the network and the
    optimizer never. What the given one leaves to the machine ('auto') stays as it was decided when the run was started.

    Raises:
        UserError: The given recipe would do something else.
    """
    if given is None:
        return own
    given = given.decided(own.engine.compile)
    if own.task == given.task:
        given = given.settled({key: own.value(key) for key in given.auto})
    if given.digest() == own.digest():
        return given.model_copy(update=dict(name=own.name, claim=own.claim))
    if not force:
        raise UserError(
            f"the run in {run.path} was made with other settings ({difference(own, given)}): go on with its own "
            f"by `{resume_command(run.path)}`, start a new run elsewhere, or add --force to go on with the new ones"
        )
    fixed = ["task"] * (own.task != given.task)
    heads = sorted({*type(own).model_fields, *type(given).model_fields} - {*Recipe.model_fields, "augment"})
    fixed += [f"{section}.*" for section in heads if getattr(own, section, None) != getattr(given, section, None)]
    fixed += [f"model.{key}" for key in KEPT if getattr(own.model, key) != getattr(given.model, key)]
    fixed += [f"optim.{key}" for key in ("name", "layer_decay") if getattr(own.optim, key) != getattr(given.optim, key)]
    # the optimizer's groups of parameters, which the checkpoint holds, depend on it
    fixed += ["optim.weight_decay (to or from 0)"] * (bool(own.optim.weight_decay) != bool(given.optim.weight_decay))
    fixed += ["optim.ema_decay"] * ((own.optim.ema_decay is None) != (given.optim.ema_decay is None))
    if fixed:
        raise UserError(f"{fixed[0]} cannot change in a run, not even with --force: start a new one in another folder")
    return given


def resumed_batch(
    run: RunDir, facts: dict[str, Any], *, own: Recipe, recipe: Recipe, world: int, force: bool
) -> BatchPlan:
    """The optimizer step of a run that goes on: the same micro-batches, whatever the number of processes.

    Raises:
        UserError: That many processes cannot go on as those before, and ``force`` is off.
    """
    then, size = int(facts.get("processes") or 1), ("batch_size", "accumulate", "global_batch")
    if any(getattr(own.optim, key) != getattr(recipe.optim, key) for key in size):
        return plan_batch(recipe, world=world)  # forced, else it were refused
    if recorded := facts.get("batch"):
        images, parts, keys = recorded["images"], recorded["micro_batches"], recorded["keys"]
        before = BatchPlan(images, then, max(parts // then, 1), keys)
    else:  # made before random choices belonged to micro-batches; those of one process are the same
        before = replace(plan_batch(own, world=then), keys=1 if then > 1 else KEYS)
    fitting, reason = fitting_worlds(own, before)
    if world in fitting:
        return replace(before, world=world, accumulate=before.micro_batches // world)
    if not force:
        raise UserError(
            f"the run in {run.path} was started on {then} processes and cannot go on with {world}: {reason}; resume it "
            f"on {some([*map(str, fitting)])}, or add --force to go on with other random choices"
        )
    return plan_batch(recipe, world=world)


def difference(own: Recipe, given: Recipe) -> str:
    """The settings in which two recipes differ, the first five of those that move weights."""
    mine, other = own.settings(), given.settings()
    if own.task != given.task:
        return f"task: run {own.task!r}, given {given.task!r}"
    changes = [
        f"{section}.{key}: run {mine[section][key]!r}, given {other[section][key]!r}"
        for section in mine
        if isinstance(mine[section], dict)
        for key in mine[section]
        if mine[section][key] != other[section][key]
    ]
    return "; ".join(changes[:5])


def check_same(
    run: RunDir, facts: dict[str, Any], found: dict[str, Any], *, own: Recipe, recipe: Recipe, force: bool
) -> list[str]:
    """Refuses to resume on other images.

    Returns:
        What differs all the same, also between the recipes.

    Raises:
        UserError: Something differs, and ``force`` is off or it is the classes.
    """
    then, now = facts.get("processes"), found["processes"]
    changes = [f"processes: {then}, now {now}"] * (then != now)
    for key in ("classes", "images", "images_hash"):
        then, now = facts.get(key), found[key]
        if then == now:
            continue
        what = "other files" if key == "images_hash" else f"{key} {then}, now they are {now}"
        if key == "classes" or not force:
            way = "" if key == "classes" else ", or add --force"
            raise UserError(
                f"the run in {run.path} was started with {what}: resume it on what it was started with{way}"
            )
        changes.append(f"{key}: {then}, now {now}")
    return changes + [difference(own, recipe)] * (own.digest() != recipe.digest())


def recorded_data(facts: dict[str, Any]) -> Path | None:
    """The data that a run was started on."""
    return Path(facts["data"]) if facts.get("data") else None
