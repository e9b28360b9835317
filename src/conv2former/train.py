"""Training: everything is checked first, then the run folder is made, then the loop runs."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch

from conv2former import checkpoints
from conv2former.data.sampling import Purpose, derive_seed, seed_all
from conv2former.data.splits import Splits, open_splits
from conv2former.errors import UserError, one_line
from conv2former.evaluate import Evaluation
from conv2former.loop import Interrupted, Loop, StopRequest
from conv2former.recipes.batch import plan_batch
from conv2former.recipes.schema import Recipe
from conv2former.run import RunFolder
from conv2former.tasks.classification import build_model

__all__ = ["Interrupted", "train"]

PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def train(
    recipe: Recipe | None, *, data: Path | None, out: Path, resume: bool = False, overwrite: bool = False
) -> Evaluation | None:
    """Trains, evaluates and reports one recipe.

    Args:
        recipe: What to do; None with ``resume`` for the run's own recipe.
        data: Folder of images; None for recipes that bring their data, or with ``resume``.
        out: The run folder.
        resume: Continue the run in ``out``.
        overwrite: Replace a run in ``out``.

    Returns:
        The best weights' evaluation; None on all processes but the first.

    Raises:
        UserError: Anything wrong with what was given.
        Interrupted: Stopped by a signal, state saved.
    """
    run, facts = RunFolder(out), {}
    if resume:
        facts = RunFolder.open(out).facts()
        recipe, data = _resumed(run, recipe, data)
    if recipe is None:
        raise UserError("no recipe given: name one with --recipe (`conv2former recipes` lists them)")
    splits = open_splits(recipe.data, data, seed=recipe.engine.seed)
    if not resume:
        _refuse_overlap(out, recipe, data)
    seed_all(derive_seed(Purpose.INIT, recipe.engine.seed))
    model, model_args = _build(recipe, splits, run, facts)

    fabric = _fabric(recipe)
    fabric.launch()
    with StopRequest() as stop:
        _check_batch(recipe, len(splits.train), fabric.world_size)
        loop = Loop(recipe, splits, model, model_args, fabric, stop)
        found = dict(
            data=str(data.resolve()) if data else None,
            classes=splits.train.classes,
            images=dict(train=len(splits.train), val=len(splits.val)),
            images_hash=splits.digest(),
            processes=fabric.world_size,
            model_args=model_args,
        )
        if resume:
            _check_same(run, facts, found)
        elif fabric.is_global_zero:
            RunFolder.create(out, recipe, found, overwrite=overwrite)
        fabric.barrier()
        return loop.fit(run, resume=resume)


def _build(recipe: Recipe, splits: Splits, run: RunFolder, facts: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The network and the arguments that rebuild it; a run that has a checkpoint no longer needs its first weights."""
    section = recipe.model
    if run.checkpoint.exists() and facts:
        section = section.model_copy(update=dict(weights=None, args=facts["model_args"]))
    elif section.weights:
        _check_normalisation(recipe)
    model, model_args = build_model(section, classes=splits.train.classes)
    size = recipe.data.input_size
    try:
        if recipe.engine.grad_checkpointing:
            model.set_grad_checkpointing()
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError, AttributeError) as error:
        raise UserError(f"{section.name} cannot be trained at data.input_size={size}: {one_line(error)}") from None
    return model, model_args


def _check_normalisation(recipe: Recipe) -> None:
    """Refuses weights that were trained on images normalised in another way."""
    cfg = checkpoints.saved_pretrained_cfg(str(recipe.model.weights))
    for key in ("mean", "std"):
        wanted, given = tuple(cfg[key]), tuple(getattr(recipe.data, key))
        if wanted != given:
            raise UserError(
                f"model.weights ({recipe.model.weights}) expects images of {key} {wanted}, the recipe gives {given}: "
                f"add --set data.{key}={list(wanted)}"
            )


def _fabric(recipe: Recipe) -> L.Fabric:
    # Lightning's tips and device report are left out; our own summary says what matters
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    engine = recipe.engine
    accelerator = engine.accelerator
    if accelerator == "auto":  # Lightning's own choice may fall on Apple's MPS, which lacks float64
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cpu" and engine.precision == "16":
        raise UserError("engine.precision=16 needs a GPU: use bf16 on a CPU")  # Lightning would take bf16 in silence
    devices = 1 if accelerator == "cpu" and engine.devices == "auto" else engine.devices
    try:
        return L.Fabric(accelerator=accelerator, devices=devices, precision=PRECISIONS[engine.precision])
    except Exception as error:  # Lightning has several kinds for devices that are not there
        raise UserError(
            f"engine.accelerator={engine.accelerator} with engine.devices={engine.devices}: {one_line(error)}"
        ) from None


def _check_batch(recipe: Recipe, images: int, world: int) -> None:
    """Refuses a batch that the training set cannot fill once."""
    batch = plan_batch(recipe, world=world)
    if images >= batch.total:
        return
    if recipe.optim.global_batch is not None:
        raise UserError(f"{images} training images are fewer than one batch of {batch.total}: lower optim.global_batch")
    fitting = images // (batch.accumulate * world)
    mixing = bool(recipe.augment.mixup or recipe.augment.cutmix)
    fitting -= fitting % 2 if mixing else 0
    advice = f"lower it with --set optim.batch_size={fitting}" if fitting else "use fewer processes or more images"
    raise UserError(f"{images} training images are fewer than one batch of {batch.total}: {advice}")


def _refuse_overlap(out: Path, recipe: Recipe, data: Path | None) -> None:
    """Refuses a run folder that holds what the run reads: --overwrite would delete it."""
    for what, path in (("--data", data), ("model.weights", recipe.model.weights)):
        if path and Path(path).resolve().is_relative_to(out.resolve()):
            raise UserError(f"{what} ({path}) lies in the run folder {out}: choose another --out")


def _resumed(run: RunFolder, recipe: Recipe | None, data: Path | None) -> tuple[Recipe, Path | None]:
    """The run's own recipe and data; refuses a given recipe that would do something else."""
    own = run.recipe()
    if recipe is not None and recipe.digest() != own.digest():
        raise UserError(
            f"the run in {run.path} was made with other settings ({_difference(own, recipe)}): resume it without "
            "--recipe and --set, or start a new run in another folder"
        )
    if recipe is not None:  # the number of readers changes no result and may be another
        own = own.model_copy(update=dict(data=own.data.model_copy(update=dict(workers=recipe.data.workers))))
    recorded = run.facts().get("data")
    return own, data or (Path(recorded) if recorded else None)


def _check_same(run: RunFolder, facts: dict[str, Any], found: dict[str, Any]) -> None:
    """Refuses to resume on other images or another number of processes, with which a step means something else."""
    for key in ("processes", "classes", "images", "images_hash"):
        then, now = facts.get(key), found[key]
        if then != now:
            what = "other files" if key == "images_hash" else f"{key} {then}, now they are {now}"
            raise UserError(f"the run in {run.path} was started with {what}: resume it on what it was started with")


def _difference(own: Recipe, given: Recipe) -> str:
    mine, other = own.model_dump(mode="json"), given.model_dump(mode="json")
    changes = [
        f"{section}.{key}: run {mine[section][key]!r}, given {other[section][key]!r}"
        for section in mine
        if section not in ("name", "claim")
        for key in mine[section]
        if mine[section][key] != other[section][key]
    ]
    return "; ".join(changes[:5])
