"""Training: everything is checked first, then the run folder is made, then the trainer runs."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from conv2former.checkpoints.weights import TIMM
from conv2former.config import Recipe
from conv2former.data.images import BadImage
from conv2former.data.loading import killed_reader
from conv2former.data.sampling import Purpose, derive_seed, seed_all
from conv2former.data.sources import Splits, remarks
from conv2former.engine.automatic import checked_weights, settled
from conv2former.engine.batch import BatchPlan, plan_batch, recorded_batch
from conv2former.engine.batchnorm import freeze
from conv2former.engine.distributed import Processes, agreed, met_by_all
from conv2former.engine.head import fit_head, fits_head
from conv2former.engine.launch import make_fabric, on_nvidia_gpu
from conv2former.engine.logging import check_loggers
from conv2former.engine.machine import machine_facts
from conv2former.engine.report import write_final_report
from conv2former.engine.resuming import (
    check_same,
    has_checkpoints,
    is_finished,
    recorded_data,
    resumed_batch,
    resumed_recipe,
)
from conv2former.engine.run_dir import RunDir
from conv2former.engine.signals import Interrupted, StopRequest
from conv2former.engine.torch_settings import applied, check_cuda_graphs, compiler_failure, start_lines
from conv2former.engine.trainer import Trainer
from conv2former.engine.trial import refusals, try_out
from conv2former.errors import UserError, is_first, one_line, resume_command, say, say_once
from conv2former.recipes.load import load_recipe
from conv2former.tasks import task_class
from conv2former.tasks.base import Evaluation, Task

__all__ = ["Interrupted", "train"]


def train(
    recipe: Recipe | Path | str | None,
    *,
    data: Path | str | None,
    out: Path | str,
    resume: bool | Literal["auto"] = False,
    overwrite: bool = False,
    force: bool = False,
) -> Evaluation | None:
    """Trains, evaluates and reports one recipe.

    Args:
        recipe: What to do, or the name or file of it; None with ``resume`` for the run's own recipe.
        data: Folder of images; None for recipes that bring their data, or with ``resume``.
        out: The run folder.
        resume: Continue the run in ``out``; 'auto' starts it where there is none yet.
        overwrite: Replace a run in ``out``.
        force: Go on with settings or images that differ from the run's.

    Returns:
        The best weights' evaluation; None on all processes but the first.

    Raises:
        UserError: Anything wrong with what was given.
        Interrupted: Stopped by a signal, state saved.
    """
    data, out = None if data is None else Path(data), Path(out)
    recipe = load_recipe(recipe) if isinstance(recipe, (str, Path)) else recipe
    run, facts, own, begun = RunDir(out), {}, None, False
    resume = run.exists() if resume == "auto" else resume
    if resume:
        facts = RunDir.open(out).facts()
        own = run.recipe()
        recipe = resumed_recipe(run, own, recipe, force=force)
        data = data or recorded_data(facts)
        begun = has_checkpoints(run, recipe)
        if not begun and is_finished(run, recipe):
            return _reported_again(run, recipe, facts, data, force=force)
    if recipe is None:
        raise UserError("no recipe given: name one with --recipe (`conv2former recipes` lists them)")
    asked, recipe = recipe, recipe.decided(on_nvidia_gpu(recipe))
    check_loggers(recipe.engine.loggers)
    if not resume:
        _refuse_overlap(out, recipe, data)
        RunDir.check_free(out, overwrite=overwrite)
    recipe, splits = _opened(recipe, data) if begun else settled(recipe, data, checked_weights(recipe))
    model_args = facts["model_args"] if begun else None
    task = _build(recipe, splits.train.classes, model_args=model_args, trained=begun and own == recipe)

    fabric = make_fabric(recipe)
    fabric.launch()
    found = dict(
        data=_recorded(data),
        classes=splits.train.classes,
        images=dict(train=len(splits.train), val=len(splits.val)),
        images_hash=splits.digest(),
        processes=fabric.world_size,
        model_args=task.model_args,
    )
    with StopRequest() as stop, contextlib.ExitStack() as ending:  # a stop comes too late while the report is written
        ending.callback(lambda: run.unlock())
        try:
            with Processes(fabric, patience=recipe.engine.stall_seconds) as processes, _one_line_errors(run):
                with met_by_all():
                    changes = check_same(run, facts, found, own=own, recipe=recipe, force=force) if own else []
                    batch = _batch(recipe, run, facts, own, fabric, force=force)
                    _check_batch(task, len(splits.train), batch, fabric)
                found |= dict(batch=recorded_batch(batch))
                if not begun and fits_head(task):
                    fit_head(task, splits.train, out, fabric=fabric, processes=processes, stop=stop)
                trainer = Trainer(task, splits, fabric, processes, stop, batch)
                if resume:
                    trainer.load(run)
                if fabric.is_global_zero:
                    event = dict(changes=changes, operations=trainer.operations)
                    run = _written(run, recipe, own, facts, found, splits, overwrite=overwrite, event=event)
                fabric.barrier()
                for line in _first_lines(asked, trainer) if fabric.is_global_zero else ():
                    say_once(line)
                _fit(trainer, run, resumed=resume)
                processes.part()
                return _report(run, trainer) if fabric.is_global_zero else None
        except (UserError, Interrupted) as error:
            if not fabric.is_global_zero and getattr(error, "agreed", False):
                return None  # the first process reports what all have met
            raise


def _report(run: RunDir, trainer: Trainer) -> Evaluation:
    """What a run leaves at its end."""
    size, device = trainer.batch.per_process, trainer.fabric.device
    evaluation = write_final_report(run, trainer.splits.val, batch_size=size, device=device)
    end = dict(step=trainer.state.step, recipe_hash=trainer.recipe.digest())
    run.add_event("finished", **end, **evaluation.metrics)
    return evaluation


def _reported_again(
    run: RunDir, recipe: Recipe, facts: dict[str, Any], data: Path | None, *, force: bool
) -> Evaluation | None:
    """The report of a finished run whose checkpoints are gone."""
    if not is_first():
        return None
    say(f"{run.path} is finished and has no checkpoints: its best weights are evaluated")
    with contextlib.ExitStack() as ending, _one_line_errors(run):
        ending.callback(run.unlock)
        run.lock()
        splits = _opened(recipe, data)[1]
        check_same(run, facts, facts | dict(images_hash=splits.digest()), own=recipe, recipe=recipe, force=force)
        size = plan_batch(recipe, world=1).per_process
        return write_final_report(run, splits.val, batch_size=size, device=make_fabric(recipe).device)


def _opened(recipe: Recipe, data: Path | None) -> tuple[Recipe, Splits]:
    """A recipe that was decided when the run was started, and its images."""
    return recipe, task_class(recipe.task).open_splits(recipe, data)


def _first_lines(asked: Recipe, trainer: Trainer) -> list[str]:
    """What is to be said of the images and the machine before the first step."""
    return remarks(trainer.splits, trainer.recipe.data) + start_lines(asked, trainer.recipe, trainer.fabric.device)


def _written(
    run: RunDir,
    recipe: Recipe,
    own: Recipe | None,
    facts: dict[str, Any],
    found: dict[str, Any],
    splits: Any,
    *,
    overwrite: bool,
    event: dict[str, Any],
) -> RunDir:
    """The run folder with what is known before the first step; ``own`` and ``facts`` are those of a resumed run."""
    if own is None:
        run = RunDir.create(run.path, recipe, found, overwrite=overwrite)
    elif own != recipe or facts != facts | found:
        run.change(recipe, facts | found)
    if getattr(splits, "held_out", False):
        run.list_held_out(splits.val)
    run.add_event("resumed" if own else "started", **event, **machine_facts())
    return run


def _fit(trainer: Trainer, run: RunDir, *, resumed: bool) -> None:
    """Trains; the run's history gets the reason where it does not come to its end."""
    try:
        with applied(trainer.recipe):
            trainer.fit(run, resumed=resumed)
    except (UserError, Interrupted) as error:
        if trainer.fabric.is_global_zero:
            with contextlib.suppress(OSError):  # the disk may be what has failed
                run.add_event("stopped", step=trainer.state.step, reason=one_line(error))
        if isinstance(error, BadImage):
            skip = "" if trainer.recipe.data.on_bad_image == "skip" else " (--on-bad-image skip leaves such images out)"
            way = f"repair or replace the file, then continue with `{resume_command(run.path)}`{skip}"
            raise _with_advice(error, way) from None
        raise


@contextlib.contextmanager
def _one_line_errors(run: RunDir) -> Any:
    """Turns what a disk, a GPU or the memory may refuse into the line that says what to do."""
    try:
        yield
    except BadImage as error:
        way = "repair or replace the file, or leave such images out with --on-bad-image skip"
        raise _with_advice(error, way) from None
    except OSError as error:
        if error.errno == errno.EMFILE:
            raise UserError(
                "too many open files: raise the limit with `ulimit -n 65536`, or lower data.workers"
            ) from None
        raise UserError(f"cannot go on in the run folder {run.path}: {one_line(error)}") from None
    except torch.OutOfMemoryError:
        raise UserError(
            "out of GPU memory: lower optim.batch_size, raise optim.accumulate (it follows from optim.global_batch), "
            "or set engine.grad_checkpointing=true"
        ) from None
    except RuntimeError as error:
        if failure := compiler_failure(error):
            raise UserError(failure) from None
        if killed := killed_reader(error):  # met at any moment: PyTorch raises it from a signal handler
            raise killed from None
        raise


def _with_advice(error: BadImage, way: str) -> Exception:
    """The error with what to do, agreed on by all processes if the first one is."""
    advised = UserError(f"{error}: {way}")
    return agreed(advised) if getattr(error, "agreed", False) else advised


def _recorded(data: Path | None) -> str | None:
    if data is None:
        return None
    return str(data.resolve() if data.exists() else data)  # what is not a path here is a name on a hub


def _build(recipe: Recipe, classes: list[str], *, model_args: dict[str, Any] | None, trained: bool) -> Task:
    """The task with its first weights; given ``model_args``, those of a checkpoint take their place afterwards.

    A network that was ``trained`` by this very recipe needs no trial, but for FSDP, which learns from it what to shard.
    """
    seed_all(derive_seed(Purpose.INIT, recipe.engine.seed))
    section = recipe.model
    if model_args is not None:
        section = section.model_copy(update=dict(weights=None, args=model_args))
    task = task_class(recipe.task).build(recipe, classes, section=section)
    if recipe.engine.grad_checkpointing:
        with refusals(task):
            task.model.set_grad_checkpointing()
    if not trained or recipe.engine.strategy == "fsdp":
        try_out(task)
    if section.freeze_batchnorm:
        freeze(task.backbone)
    return task


def _batch(
    recipe: Recipe, run: RunDir, facts: dict[str, Any], own: Recipe | None, fabric: L.Fabric, *, force: bool
) -> BatchPlan:
    world = fabric.world_size
    if own is None:
        return plan_batch(recipe, world=world)
    return resumed_batch(run, facts, own=own, recipe=recipe, world=world, force=force)


def _check_batch(task: Task, images: int, batch: BatchPlan, fabric: L.Fabric) -> None:
    """Refuses a batch that the training set cannot fill once, or the network cannot be trained on."""
    recipe: Recipe = task.recipe
    world = fabric.world_size
    task.check_batch(batch.per_process, world)
    check_cuda_graphs(recipe, accumulate=batch.accumulate, device=fabric.device)
    if images >= batch.total:
        return
    if recipe.optim.global_batch is not None:
        raise UserError(f"{images} training images are fewer than one batch of {batch.total}: lower optim.global_batch")
    fitting = images // (batch.accumulate * world)
    fitting -= fitting % 2 if recipe.pairs else 0
    advice = f"lower it with --set optim.batch_size={fitting}" if fitting else "use fewer processes or more images"
    raise UserError(f"{images} training images are fewer than one batch of {batch.total}: {advice}")


def _refuse_overlap(out: Path, recipe: Recipe, data: Path | None) -> None:
    """Refuses a run folder that holds what the run reads: --overwrite would delete it."""
    for what, path in (("--data", data), ("model.weights", recipe.model.weights)):
        local = str(path or "").removeprefix("local-dir:")
        if path and path != TIMM and Path(local).exists() and Path(local).resolve().is_relative_to(out.resolve()):
            raise UserError(f"{what} ({path}) lies in the run folder {out}: choose another --out")
