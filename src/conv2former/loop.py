"""The training loop, over optimizer steps on Lightning Fabric.

All randomness is keyed (``data.sampling``), the learning rate is a function of the step, and the data stream starts at
any step, so a run's state is its weights, its optimizer and the step. That is why the loop is ours and not
Lightning's Trainer, whose own progress and loader states would have to agree with the keys; devices, processes,
precision and checkpoint files are Fabric's.
"""

from __future__ import annotations

import math
import os
import shlex
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
    checked,
    eval_loader,
    eval_transform,
    train_loader,
    train_transform,
)
from conv2former.data.sampling import EvalSampler, Purpose, TrainSampler, derive_seed, seed_all, steps_per_epoch
from conv2former.data.splits import Splits
from conv2former.errors import UserError, one_line
from conv2former.evaluate import Evaluation, evaluate_source, write_report
from conv2former.progress import TrainingProgress
from conv2former.recipes.batch import plan_batch
from conv2former.recipes.schema import Recipe
from conv2former.run import RunFolder
from conv2former.tasks.classification import ClassificationTask, build_optimizer, build_schedule, scaled_lr

SAMPLES = 8  # held-out pictures that the quick start leaves as files
LOG_INTERVAL = 20  # optimizer steps between logged losses


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; ``code`` is the exit status of the signal."""

    def __init__(self, run: Path, step: int, signum: int) -> None:
        command = f"conv2former train --out {shlex.quote(str(run))} --resume"
        super().__init__(f"stopped at step {step}, state saved; continue with: {command}")
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
        loss_sum: Sum of the losses since the last evaluation.
        logged_sum: Sum of the losses since the last logged one.
        logged_steps: Their number.
    """

    step: int = 0
    evaluated: int = 0
    best_top1: float = -1.0
    loss_sum: float = 0.0
    logged_sum: float = 0.0
    logged_steps: int = 0


class Loop:
    """One run in progress.

    Args:
        recipe: What to do.
        splits: The images.
        model: The network, on the CPU, with gradient checkpointing where the recipe asks for it.
        model_args: What rebuilds it with ``timm.create_model``.
        fabric: Launched.
        stop: Says when to stop.
    """

    def __init__(
        self,
        recipe: Recipe,
        splits: Splits,
        model: Any,
        model_args: dict[str, Any],
        fabric: L.Fabric,
        stop: StopRequest,
    ) -> None:
        self.recipe, self.splits, self.model_args = recipe, splits, model_args
        self.fabric, self.stop = fabric, stop
        self.batch = plan_batch(recipe, world=fabric.world_size)
        self.lr = scaled_lr(recipe.optim, self.batch)
        self.steps_per_epoch = steps_per_epoch(len(splits.train), self.batch.total)
        self.steps = recipe.schedule.epochs * self.steps_per_epoch
        self.position = Position()
        # losses stay on the device, added up, until they are fetched, because each fetch waits for the device; in
        # double precision, so that the sum is the same wherever a stop cuts it in two
        self.pending, self.pending_steps = torch.zeros((), dtype=torch.double, device=fabric.device), 0

        engine, data = recipe.engine, recipe.data
        if engine.channels_last:
            model.to(memory_format=torch.channels_last)
        self.model = model
        self.data_config = dict(
            input_size=(3, data.input_size, data.input_size),
            interpolation=data.interpolation,
            mean=data.mean,
            std=data.std,
            crop_pct=data.crop_pct,
            crop_mode="center",
        )
        transform = train_transform(data, recipe.augment)
        self.dataset = ImageDataset(splits.train, transform, seed=engine.seed)
        optimizer = build_optimizer(model, recipe.optim, lr=self.lr)
        self.schedule: Scheduler = build_schedule(optimizer, recipe.schedule, steps_per_epoch=self.steps_per_epoch)
        task = ClassificationTask(model, recipe)
        self.counts = task.counts
        if engine.compile:
            model.compile()  # in place: the names in the state dict stay
        self.task, self.optimizer = fabric.setup(task, optimizer)
        self.val_loader = self._val_loader()
        self.writer: SummaryWriter | None = None

    def fit(self, run: RunFolder, *, resume: bool) -> Evaluation | None:
        """Trains to the end and reports; with ``resume`` from the run's checkpoint on.

        Raises:
            UserError: An image that cannot be read, a loss that is not finite, a folder that cannot be written.
            Interrupted: Stopped by a signal, state saved.
        """
        self.run = run
        try:
            if resume:
                self._load()
            self.writer = self._writer()
            self.progress = TrainingProgress(
                self.steps,
                self.steps_per_epoch,
                global_batch=self.batch.total,
                start=self.position.step,
                enabled=self.fabric.is_global_zero,
            )
            self.progress.say(self._summary())
            with self.progress:
                self._run()
            return self._report()
        except OSError as error:
            raise UserError(f"cannot write the run folder {run.path}: {one_line(error)}") from None
        except torch.OutOfMemoryError:
            raise UserError(
                "out of GPU memory: lower optim.batch_size and raise optim.accumulate, or set "
                "engine.grad_checkpointing=true"
            ) from None
        finally:
            if self.writer:
                self.writer.close()

    def _run(self) -> None:
        """Evaluate where an epoch has ended, else take a step, until all are done."""
        position, every = self.position, self.recipe.schedule.eval_every * self.steps_per_epoch
        batches = self._batches(position.step)
        while True:
            due = position.step and (position.step % every == 0 or position.step == self.steps)
            if due and position.evaluated != position.step:
                self._evaluate()
                self._save()
            if position.step == self.steps:
                return
            self._meet_stop()
            self._step(batches)

    def _step(self, batches: Iterator[Any]) -> None:
        position, optim = self.position, self.recipe.optim
        started = time.perf_counter()
        try:
            parts = [checked(next(batches)) for _ in range(self.batch.accumulate)]
        except UserError:
            self._save_alone()
            raise
        self.schedule.step_update(position.step)
        self.task.train()
        for part, batch in enumerate(parts):
            key = (self.recipe.engine.seed, position.step, part, self.fabric.global_rank)
            seed_all(derive_seed(Purpose.STEP, *key))
            with self.fabric.no_backward_sync(self.task, enabled=part < self.batch.accumulate - 1):
                with self.fabric.autocast():  # on one device Fabric calls the step as it is, without its precision
                    loss = self.task.training_step(batch, position.step) / self.batch.accumulate
                self.fabric.backward(loss)
            self.pending += loss.detach()
        if optim.clip_grad is not None:
            # a gradient that is not finite is float16's business (its scaler skips the step) or shows in the next loss
            self.fabric.clip_gradients(self.task, self.optimizer, max_norm=optim.clip_grad, error_if_nonfinite=False)
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
            self._flush_loss()
            loss = position.logged_sum / position.logged_steps
            position.logged_sum, position.logged_steps = 0.0, 0
            self._row("step", loss=loss, lr=lr)
        self.progress.step(position.step, seconds=time.perf_counter() - started, loss=loss, lr=lr)

    def _flush_loss(self) -> None:
        """Moves the pending losses, averaged over processes, into the position.

        Raises:
            UserError: One of them, or a weight that the last step has made, is not finite.
        """
        mean: Any = self.fabric.all_reduce(self.pending, reduce_op="mean")
        total, steps = float(mean), self.pending_steps
        self.pending.zero_()
        self.pending_steps = 0
        # the losses are from before each update, so the last update is seen in the weights alone
        sound = math.isfinite(total) and math.isfinite(torch.nn.utils.get_total_norm(self.model.parameters()))
        if not sound:
            raise UserError(
                f"the loss is not finite in the {steps} steps up to {self.position.step}: lower optim.base_lr, set "
                "optim.clip_grad=1 or use engine.precision=32, and train again; what was saved before is kept"
            )
        self.position.loss_sum += total
        self.position.logged_sum += total
        self.position.logged_steps += steps

    def _evaluate(self) -> None:
        position = self.position
        self.task.eval()
        self.counts.reset()
        try:
            with torch.inference_mode(), self.fabric.autocast():
                for i, batch in enumerate(self.val_loader):
                    if self.fabric.world_size == 1:  # shares may differ by a batch: several processes stop after it
                        self._meet_stop()
                    self.task.validation_step(checked(batch), i)
        except UserError:
            self._save_alone()
            raise
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
            position.best_top1 = result["top1"]
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
            model_args=self.model_args,
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
        """Saves and stops where a signal has asked for it, on all processes at the same step."""
        signum = self.stop.signum or 0
        if self.fabric.world_size > 1:
            asked: Any = self.fabric.all_reduce(torch.tensor(float(signum), device=self.fabric.device), reduce_op="max")
            signum = int(asked)
        if signum:
            self._save()
            raise Interrupted(self.run.path, self.position.step, signum)

    def _save_alone(self) -> None:
        """Saves before an error that only this process has met; others would not join in, so not beside them."""
        if self.fabric.world_size == 1:
            self._save()

    def _save(self) -> None:
        """Writes the state next to its place, then moves it there: the checkpoint is whole or the one before."""
        self._flush_loss()
        path = self.run.checkpoint
        partial = path.with_name(path.name + ".partial")
        try:
            self.fabric.save(partial, self._state())
        except (OSError, RuntimeError) as error:  # PyTorch reports a full disk as a RuntimeError
            partial.unlink(missing_ok=True)
            raise UserError(f"cannot write {path} ({one_line(error)}): the one before is kept") from None
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
        try:
            self.fabric.load(self.run.checkpoint, state, weights_only=True)
        except Exception as error:  # whatever a damaged file makes PyTorch say
            raise UserError(f"cannot resume from {self.run.checkpoint}, it is damaged: {one_line(error)}") from None
        self.position = Position(**state["position"])
        if state["scaler"]:
            self.fabric.strategy.precision.load_state_dict(state["scaler"])
        if self.fabric.is_global_zero:
            self.run.drop_rows_after(self.position.step)

    def _state(self) -> dict[str, Any]:
        scaler = self.fabric.strategy.precision.state_dict()  # of float16's loss, empty otherwise
        return dict(task=self.task, optimizer=self.optimizer, position=asdict(self.position), scaler=scaler)

    def _batches(self, start: int) -> Iterator[Any]:
        recipe, fabric = self.recipe, self.fabric
        sampler = TrainSampler(
            len(self.splits.train),
            self.batch.per_process,
            seed=recipe.engine.seed,
            steps=self.steps,
            start=start,
            accumulate=self.batch.accumulate,
            rank=fabric.global_rank,
            world=fabric.world_size,
        )
        loader = train_loader(self.dataset, sampler, workers=recipe.data.workers)
        return iter(fabric.setup_dataloaders(loader, use_distributed_sampler=False))

    def _val_loader(self) -> Any:
        recipe, fabric = self.recipe, self.fabric
        dataset = ImageDataset(self.splits.val, eval_transform(self.data_config))
        sampler = EvalSampler(len(dataset), rank=fabric.global_rank, world=fabric.world_size)
        loader = eval_loader(dataset, sampler, batch_size=self.batch.per_process, workers=recipe.data.workers)
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
            f"batch {self.batch}, learning rate {self.lr:.3g}, "
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
            batch_size=self.batch.per_process,
            workers=self.recipe.data.workers,
            device=str(self.fabric.device),
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
        for index in range(0, len(source), -(-len(source) // SAMPLES)):
            source.load(index).save(folder / source.name(index))
