"""The training engine: one loop over optimizer steps on Lightning Fabric.

All randomness is keyed (``data.sampling``), the learning rate is a function of the step, and the data stream starts at
any step, so a run's state is its weights, its optimizer and the step. That is why the loop is ours and not
Lightning's Trainer, whose own progress and loader states would have to agree with the keys; devices, processes,
precision and checkpoint files are Fabric's.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import lightning as L
import torch
from timm.scheduler.scheduler import Scheduler
from torch.utils.tensorboard import SummaryWriter

from conv2former import checkpoints, plots
from conv2former.data.classification import (
    ImageDataset,
    Splits,
    checked,
    eval_loader,
    eval_transform,
    open_splits,
    train_loader,
    train_transform,
)
from conv2former.data.sampling import EvalSampler, Purpose, TrainSampler, derive_seed, seed_all, steps_per_epoch
from conv2former.errors import UserError
from conv2former.evaluate import Evaluation, evaluate_source, write_report
from conv2former.progress import TrainingProgress
from conv2former.recipes.schema import Recipe
from conv2former.run import RunFolder
from conv2former.tasks.classification import (
    ClassificationTask,
    build_model,
    build_optimizer,
    build_schedule,
    scaled_lr,
)

PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
SAMPLES = 8  # held-out pictures that the quick start leaves as files
LOG_INTERVAL = 20  # optimizer steps between logged losses


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; ``code`` is the exit status of the signal."""

    def __init__(self, run: Path, step: int, signum: int) -> None:
        super().__init__(f"stopped at step {step}, state saved; continue with: conv2former train --out {run} --resume")
        self.code = 128 + signum


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request that the loop meets between steps; a second one interrupts."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __enter__(self) -> StopRequest:
        self.previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
        print("stopping after this step (again to stop at once, without saving)", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


@dataclass
class Position:
    """How far a run is; with the weights and the optimizer this is all its state.

    Attributes:
        step: Optimizer steps done.
        evaluated: The step of the last evaluation.
        best_top1: Best validation accuracy so far, percent.
        best_epoch: Its epoch.
        loss_sum: Sum of the losses since the last evaluation.
    """

    step: int = 0
    evaluated: int = 0
    best_top1: float = -1.0
    best_epoch: int = 0
    loss_sum: float = 0.0


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
    if resume:
        recipe, data = _resumed(RunFolder.open(out), recipe, data)
    if recipe is None:
        raise UserError("no recipe given: name one with --recipe (`conv2former recipes` lists them)")
    engine = recipe.engine
    splits = open_splits(recipe.data, data, seed=engine.seed)
    _quiet_fabric()
    fabric = L.Fabric(accelerator=engine.accelerator, devices=engine.devices, precision=PRECISIONS[engine.precision])
    fabric.launch()
    global_batch = recipe.optim.batch_size * recipe.optim.accumulate * fabric.world_size
    if len(splits.train) < global_batch:
        raise UserError(
            f"{len(splits.train)} training images are fewer than one batch of {global_batch}: "
            f"lower it with --set optim.batch_size={_batch_that_fits(recipe, len(splits.train), fabric.world_size)}"
        )
    seed_all(derive_seed(Purpose.INIT, engine.seed))
    model = build_model(recipe.model, num_classes=len(splits.train.classes))
    run = RunFolder(out)
    if fabric.is_global_zero and not resume:
        facts = dict(data=str(data.resolve()) if data else None, classes=splits.train.classes)
        run = RunFolder.create(out, recipe, facts, overwrite=overwrite)
    fabric.barrier()
    with StopRequest() as stop:
        return _Trainer(recipe, splits, model, run, fabric, stop, global_batch).fit(resume=resume)


class _Trainer:
    """One run in progress."""

    def __init__(
        self,
        recipe: Recipe,
        splits: Splits,
        model: Any,
        run: RunFolder,
        fabric: L.Fabric,
        stop: StopRequest,
        global_batch: int,
    ) -> None:
        self.recipe, self.splits, self.run, self.fabric, self.stop = recipe, splits, run, fabric, stop
        self.global_batch = global_batch
        self.steps_per_epoch = steps_per_epoch(len(splits.train), global_batch)
        self.steps = recipe.schedule.epochs * self.steps_per_epoch
        self.position = Position()
        # losses stay on the device, added up, until they are fetched, because each fetch waits for the device; in
        # double precision, so that the sum is the same wherever a stop cuts it in two
        self.pending, self.pending_steps = torch.zeros((), dtype=torch.double, device=fabric.device), 0

        engine, data = recipe.engine, recipe.data
        if engine.grad_checkpointing:
            model.set_grad_checkpointing()
        if engine.channels_last:
            model.to(memory_format=torch.channels_last)
        self.model = model
        self.data_config = dict(
            input_size=(3, data.input_size, data.input_size),
            interpolation=data.interpolation,
            mean=data.mean,
            std=data.std,
            crop_pct=data.crop_pct,
        )
        optimizer = build_optimizer(model, recipe.optim, lr=scaled_lr(recipe.optim, world=fabric.world_size))
        self.schedule: Scheduler = build_schedule(optimizer, recipe.schedule, steps_per_epoch=self.steps_per_epoch)
        task = ClassificationTask(model, recipe)
        self.counts = task.counts
        if engine.compile:
            model.compile()  # in place: the names in the state dict stay
        self.task, self.optimizer = fabric.setup(task, optimizer)
        self.val_loader = self._val_loader()

    def fit(self, *, resume: bool) -> Evaluation | None:
        """The loop: evaluate where an epoch has ended, else take a step."""
        if resume:
            self._load()
        position, schedule = self.position, self.recipe.schedule
        every = schedule.eval_every * self.steps_per_epoch
        self.writer = self._writer()
        self.progress = TrainingProgress(
            self.steps,
            self.steps_per_epoch,
            global_batch=self.global_batch,
            start=position.step,
            enabled=self.fabric.is_global_zero,
        )
        self.progress.say(self._summary())
        batches = self._batches(position.step)
        with self.progress:
            while True:
                due = position.step and (position.step % every == 0 or position.step == self.steps)
                if due and position.evaluated != position.step:
                    self._evaluate()
                    self._save()
                if position.step == self.steps:
                    break
                self._meet_stop()
                self._step(batches)
        if self.writer:
            self.writer.close()
        return self._report()

    def _step(self, batches: Iterator[Any]) -> None:
        position, optim = self.position, self.recipe.optim
        started = time.perf_counter()
        try:
            parts = [checked(next(batches)) for _ in range(optim.accumulate)]
        except UserError:
            self._save()
            raise
        self.schedule.step_update(position.step)
        self.task.train()
        for part, (images, targets, indices) in enumerate(parts):
            if self.recipe.engine.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            key = (self.recipe.engine.seed, position.step, part, self.fabric.global_rank)
            seed_all(derive_seed(Purpose.STEP, *key))
            with self.fabric.no_backward_sync(self.task, enabled=part < optim.accumulate - 1):
                loss = self.task.training_step((images, targets, indices), position.step) / optim.accumulate
                self.fabric.backward(loss)
            self.pending += loss.detach()
        if optim.clip_grad is not None:
            self.fabric.clip_gradients(self.task, self.optimizer, max_norm=optim.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        position.step += 1
        self._log(started)

    def _log(self, started: float) -> None:
        """Shows the step; every ``LOG_INTERVAL`` steps fetches the mean loss since the last time and records it."""
        position = self.position
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        self.pending_steps += 1
        loss = None
        if position.step % LOG_INTERVAL == 0 or position.step % self.steps_per_epoch == 0:
            loss = self._flush_loss()
            self._row("step", loss=loss, lr=lr)
        self.progress.step(position.step, seconds=time.perf_counter() - started, loss=loss, lr=lr)

    def _flush_loss(self) -> float:
        """Moves the pending losses, averaged over processes, into the position and returns their mean over steps.

        Raises:
            UserError: One of them is not finite.
        """
        mean: Any = self.fabric.all_reduce(self.pending, reduce_op="mean")
        total, steps = float(mean), self.pending_steps
        self.pending.zero_()
        self.pending_steps = 0
        if not math.isfinite(total):
            raise UserError(
                f"the loss is not finite in the {steps} steps up to {self.position.step}: lower optim.base_lr, set "
                "optim.clip_grad=1 or use engine.precision=32, and train again; the last good state is kept in "
                f"{self.run.checkpoint}"
            )
        self.position.loss_sum += total
        return total / max(steps, 1)

    def _evaluate(self) -> None:
        position = self.position
        self.task.eval()
        self.counts.reset()
        with torch.inference_mode():
            for i, batch in enumerate(self.val_loader):
                self._meet_stop()
                self.task.validation_step(checked(batch), i)
        result = self.counts.compute()
        train_loss = position.loss_sum / (position.step - position.evaluated)
        position.loss_sum, position.evaluated = 0.0, position.step
        row = self._row(
            "epoch",
            train_loss=train_loss,
            val_loss=result["loss"],
            val_top1=result["top1"],
            val_top5=result["top5"],
            images_per_second=round(self.progress.images_per_second(position.step), 1),
        )
        better = result["top1"] > position.best_top1
        if better:
            position.best_top1, position.best_epoch = result["top1"], round(row["epoch"])
        if self.fabric.is_global_zero:
            note = dict(step=position.step, epoch=row["epoch"], val_top1=result["top1"])
            for folder in (self.run.last, self.run.best) if better else (self.run.last,):
                self._export(folder, note)
        self.progress.say(
            f"epoch {row['epoch']:g}: training loss {train_loss:.4f}, validation loss {result['loss']:.4f}, "
            f"top-1 {result['top1']:.2f}% ({result['correct']} of {result['images']})"
            + (", the best so far" if better else "")
        )

    def _export(self, folder: Path, note: dict[str, Any]) -> None:
        checkpoints.save_pretrained(
            self.model,
            folder,
            label_names=self.splits.train.classes,
            model_args=self.recipe.model.args,
            pretrained_cfg=self.data_config,
            extra={"conv2former": note | dict(recipe=self.recipe.name, recipe_hash=self.recipe.digest())},
        )

    def _row(self, kind: str, **values: float) -> dict[str, Any]:
        position = self.position
        row = dict(kind=kind, step=position.step, epoch=round(position.step / self.steps_per_epoch, 4)) | values
        if self.writer:
            self.run.add_row(row)
            for name, value in values.items():
                self.writer.add_scalar(f"{kind}/{name}", value, position.step)
        return row

    def _meet_stop(self) -> None:
        if self.stop.signum is not None:
            if self.position.step:
                self._save()
            raise Interrupted(self.run.path, self.position.step, self.stop.signum)

    def _save(self) -> None:
        """Writes the state next to its place, then moves it there: the checkpoint is whole or the one before."""
        self._flush_loss()
        path = self.run.checkpoint
        partial = path.with_name(path.name + ".partial")
        self.fabric.save(partial, self._state())
        if self.fabric.is_global_zero:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        self.fabric.barrier()

    def _load(self) -> None:
        if not self.run.checkpoint.exists():
            if self.fabric.is_global_zero:
                self.run.drop_rows_after(0)
            return
        state = self._state()
        self.fabric.load(self.run.checkpoint, state, weights_only=True)
        self.position = Position(**state["position"])
        if self.fabric.is_global_zero:
            self.run.drop_rows_after(self.position.step)

    def _state(self) -> dict[str, Any]:
        return dict(task=self.task, optimizer=self.optimizer, position=asdict(self.position))

    def _batches(self, start: int) -> Iterator[Any]:
        recipe, fabric = self.recipe, self.fabric
        sampler = TrainSampler(
            len(self.splits.train),
            recipe.optim.batch_size,
            seed=recipe.engine.seed,
            steps=self.steps,
            start=start,
            accumulate=recipe.optim.accumulate,
            rank=fabric.global_rank,
            world=fabric.world_size,
        )
        transform = train_transform(recipe.data, recipe.augment)
        dataset = ImageDataset(self.splits.train, transform, seed=recipe.engine.seed)
        loader = train_loader(dataset, sampler, workers=recipe.data.workers)
        return iter(fabric.setup_dataloaders(loader, use_distributed_sampler=False))

    def _val_loader(self) -> Any:
        recipe, fabric = self.recipe, self.fabric
        dataset = ImageDataset(self.splits.val, eval_transform(self.data_config))
        sampler = EvalSampler(len(dataset), rank=fabric.global_rank, world=fabric.world_size)
        loader = eval_loader(dataset, sampler, batch_size=recipe.optim.batch_size, workers=recipe.data.workers)
        return fabric.setup_dataloaders(loader, use_distributed_sampler=False)

    def _writer(self) -> SummaryWriter | None:
        if not self.fabric.is_global_zero:
            return None
        step = self.position.step
        return SummaryWriter(str(self.run.path / "tensorboard"), purge_step=step + 1 if step else None)

    def _summary(self) -> str:
        recipe, fabric = self.recipe, self.fabric
        parameters = sum(p.numel() for p in self.model.parameters())
        return (
            f"{recipe.name}: {recipe.model.name}, {parameters / 1e6:.2f}M parameters, "
            f"{len(self.splits.train)} training and {len(self.splits.val)} validation images, "
            f"{len(self.splits.train.classes)} classes\n"
            f"batch {recipe.optim.batch_size} x {fabric.world_size} processes x {recipe.optim.accumulate} accumulated "
            f"= {self.global_batch}, learning rate {scaled_lr(recipe.optim, world=fabric.world_size):.3g}, "
            f"{recipe.schedule.epochs} epochs x {self.steps_per_epoch} = {self.steps} steps, "
            f"{recipe.engine.precision} on {fabric.device}"
            + (f", from step {self.position.step}" if self.position.step else "")
        )

    def _report(self) -> Evaluation | None:
        """Evaluates the best weights as they lie on the disk and draws the pictures, on one process."""
        if not self.fabric.is_global_zero:
            return None
        evaluation = evaluate_source(
            checkpoints.load_pretrained(self.run.best),
            self.splits.val,
            batch_size=self.recipe.optim.batch_size,
            workers=self.recipe.data.workers,
        )
        write_report(evaluation, self.splits.val, self.run.path)
        plots.learning_curves(self.run.rows(), self.run.path / "learning_curves.png")
        if self.recipe.data.source == "digits":
            self._write_samples()
        return evaluation

    def _write_samples(self) -> None:
        """A few held-out pictures as files, to try ``predict`` on where the data brings none."""
        folder, source = self.run.path / "samples", self.splits.val
        folder.mkdir(exist_ok=True)
        for index in range(0, len(source), max(len(source) // SAMPLES, 1)):
            source.load(index).save(folder / source.name(index))


def _batch_that_fits(recipe: Recipe, images: int, world: int) -> int:
    batch = max(images // (recipe.optim.accumulate * world), 1)
    return batch - batch % 2 if batch > 1 else 1


def _resumed(run: RunFolder, recipe: Recipe | None, data: Path | None) -> tuple[Recipe, Path | None]:
    """The run's own recipe and data; refuses a given recipe that would do something else."""
    own = run.recipe()
    if recipe is not None and recipe.digest() != own.digest():
        raise UserError(
            f"the run in {run.path} was made with other settings ({_difference(own, recipe)}): resume it without "
            "--recipe and --set, or start a new run in another folder"
        )
    recorded = run.facts().get("data")
    return own, data or (Path(recorded) if recorded else None)


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


def _quiet_fabric() -> None:
    # Lightning's tips and device report; our own summary says what matters
    import logging
    import warnings

    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
