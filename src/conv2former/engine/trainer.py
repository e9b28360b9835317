"""The training loop, over optimizer steps on Lightning Fabric.

All randomness is keyed (``data.sampling``), the learning rate is a function of the step, and the data stream starts at
any step, so a run's state is its weights (and their average), its optimizer, the step and a few sums. That is why the
loop is ours and not Lightning's Trainer, whose own progress and loader states would have to agree with the keys;
devices, processes, precision and checkpoint files are Fabric's.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from timm.scheduler.scheduler import Scheduler

from conv2former.data.loading import (
    KILLED_WORKER,
    AnyBatch,
    checked,
    eval_loader,
    is_killed_worker,
    leave_killed_workers,
    train_loader,
)
from conv2former.data.sampling import EvalSampler, Purpose, TrainSampler, derive_seed, seed_all, steps_per_epoch
from conv2former.engine.batch import plan_batch
from conv2former.engine.batchnorm import BatchNormBackup, synchronise
from conv2former.engine.checkpointing import Snapshots
from conv2former.engine.distributed import Processes, agreed
from conv2former.engine.faults import Incidents
from conv2former.engine.logging import RunLog, peak_memory_gb
from conv2former.engine.optim import build_optimizer, build_schedule, scaled_lr
from conv2former.engine.progress import TrainingProgress
from conv2former.engine.run_dir import RunFolder
from conv2former.engine.signals import Interrupted, StopRequest
from conv2former.engine.state import Fetched, Position, full_state_dict, parameter_norm
from conv2former.engine.torch_settings import cudnn_benchmark, fused_optimizer
from conv2former.errors import UserError
from conv2former.models.conv2former import Block
from conv2former.ops import backend_for
from conv2former.tasks.classification.splits import AnySplits
from conv2former.workflows import Workflow

LOG_INTERVAL = 20  # optimizer steps between logged losses
SETTINGS = {"weight_decay", "betas", "eps", "momentum", "lr_scale", "initial_lr"}  # of an optimizer's group


class Loop:
    """One run in progress.

    Args:
        work: What to do.
        splits: The images.
        model: The network, on the CPU, with gradient checkpointing where the recipe asks for it.
        model_args: What rebuilds it with ``timm.create_model``.
        fabric: Launched.
        processes: Of this run.
        stop: Says when to stop.
    """

    def __init__(
        self,
        work: Workflow,
        splits: AnySplits,
        model: Any,
        model_args: dict[str, Any],
        fabric: L.Fabric,
        processes: Processes,
        stop: StopRequest,
    ) -> None:
        recipe = work.recipe
        self.work, self.recipe, self.splits, self.model_args = work, recipe, splits, model_args
        self.fabric, self.processes, self.stop = fabric, processes, stop
        self.batch = plan_batch(recipe, world=fabric.world_size)
        self.lr = scaled_lr(recipe.optim, self.batch)
        self.steps_per_epoch = steps_per_epoch(len(splits.train), self.batch.total)
        self.steps = recipe.schedule.total(self.steps_per_epoch)
        self.position = Position(steps_per_epoch=self.steps_per_epoch)
        # losses stay on the device, added up, until they are fetched, because each fetch waits for the device; in
        # double precision, so that the sum is the same wherever a stop cuts it in two
        self.pending, self.pending_steps = torch.zeros((), dtype=torch.double, device=fabric.device), 0

        engine = recipe.engine
        if engine.channels_last and engine.strategy != "fsdp":  # which shards weights that lie in order alone
            model.to(memory_format=torch.channels_last)
        if engine.sync_batchnorm and fabric.world_size > 1:
            model = synchronise(model, fabric.device)
        self.model = model
        self.described = copy.copy(model)  # as timm built it: sharding changes the network's class
        self.dataset = work.train_data(splits.train, on_bad_image="replace" if self._skipping else "error")
        task = work.task(model, splits)
        self.average = task.average
        if engine.compile:
            work.compile(model)
        self.task: Any = fabric.setup_module(task)
        fused = fused_optimizer(recipe, fabric.device)
        # behind the set-up, which may shard the weights
        optimizer = build_optimizer(model, recipe.optim, lr=self.lr, fused=fused)
        self.schedule: Scheduler = build_schedule(optimizer, recipe.schedule, steps_per_epoch=self.steps_per_epoch)
        self.optimizer: Any = fabric.setup_optimizers(optimizer)
        self.statistics = BatchNormBackup(model)
        self.sharded = engine.strategy == "fsdp" and fabric.world_size > 1
        self.val_loader = self._val_loader()

    def load(self, run: RunFolder) -> None:
        """Goes to where the run's newest whole checkpoint is; stays at the beginning where there is none.

        Raises:
            UserError: There are damaged ones alone, or the recipe ends before it.
        """
        path = Snapshots(run.checkpoints).newest_whole(self.processes, say=self._say_once)
        if path:
            self._read(path)
        position = self.position
        if self.fabric.is_global_zero:
            run.tidy()
            run.drop_rows_after(position.step, evaluated=position.evaluated)
        if position.steps_per_epoch != self.steps_per_epoch:  # forced to another batch or other images
            if self.recipe.schedule.steps is None:
                position.rescale(self.steps_per_epoch)
                if self.fabric.is_global_zero:
                    run.renumber_rows(self.steps_per_epoch)
            position.steps_per_epoch = self.steps_per_epoch
        if position.step > self.steps:
            schedule = self.recipe.schedule
            raise agreed(
                UserError(
                    f"the run has done {position.step / self.steps_per_epoch:g} epochs and the recipe ends after "
                    f"{schedule.length()}: raise schedule.{'epochs' if schedule.steps is None else 'steps'}"
                )
            )

    def _read(self, path: Path) -> None:
        groups = [{key: group[key] for key in SETTINGS & group.keys()} for group in self.optimizer.param_groups]
        state = self._state()
        self.fabric.load(path, state, weights_only=True)
        for group, settings in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(settings)  # the recipe's of now, which may have been forced to others than the checkpoint's
        self.position = Position(**state["position"])
        if state["scaler"]:
            self.fabric.strategy.precision.load_state_dict(state["scaler"])

    def fit(self, run: RunFolder, *, resumed: bool = False) -> None:
        """Trains to the end from where it is.

        Args:
            run: The run folder.
            resumed: Whether it has been trained in before.

        Raises:
            UserError: An image that cannot be read, losses that are not finite, a folder that cannot be written.
            Interrupted: Stopped by a signal, state saved.
        """
        self.run, self.snapshots = run, Snapshots(run.checkpoints)
        self.saved_step, self.saved_at = self.position.step, time.monotonic()
        self.progress = TrainingProgress(
            self.steps,
            self.steps_per_epoch,
            global_batch=self.batch.total,
            start=self.position.step,
            enabled=self.fabric.is_global_zero,
        )
        self.incidents = Incidents(run, self.recipe, self.splits.train, self.processes, self.progress.say)
        step = self.position.step if resumed else None
        self.log = RunLog(run, self.recipe, step=step, enabled=self.fabric.is_global_zero)
        status = "failed"
        try:
            self.progress.say(self._summary())
            with self.progress:
                self._run()
            status = "success"
        finally:
            self.log.close(status)

    def _run(self) -> None:
        """Evaluate and save where an epoch has ended, else take a step, until all are done."""
        position, every = self.position, self.recipe.schedule.interval(self.steps_per_epoch)
        batches = self._batches(position.step)
        while True:
            due = position.step and (position.step % every == 0 or position.step == self.steps)
            if due and position.evaluated != position.step:
                self._evaluate()
                self._save()
            elif position.step % self.steps_per_epoch == 0 and position.step != self.saved_step:
                self._save()
            if position.step == self.steps:
                return
            started = time.perf_counter()
            parts, error = self._fetch(batches)
            waited = time.perf_counter() - started
            self._agree(parts, error)
            self._step(parts, started, waited)

    def _fetch(self, batches: Iterator[Any], count: int | None = None) -> tuple[list[AnyBatch], UserError | None]:
        """The batches of a step, or what kept this process from getting them."""
        try:
            return [checked(next(batches)) for _ in range(count or self.batch.accumulate)], None
        except UserError as error:
            return [], error
        except (RuntimeError, ConnectionError, EOFError) as error:
            if not is_killed_worker(error):
                raise
            leave_killed_workers()
            return [], UserError(KILLED_WORKER)

    def _agree(self, parts: list[AnyBatch], error: UserError | None) -> None:
        """All processes learn here, before a step or a batch of the evaluation, what one of them has met.

        Raises:
            UserError: One of them cannot go on; the state is saved.
            Interrupted: One of them was asked to stop; the state is saved.
        """
        bad = self.incidents.new_bad_images(parts)
        late = time.monotonic() - self.saved_at > 60 * self.recipe.engine.checkpoint_minutes
        signum, failed, found, due = self.processes.largest(
            self.stop.signum or 0, error is not None, len(bad), late and self.task.training
        )
        if found:
            self.incidents.note_bad_images(bad)
        too_many = self.incidents.too_many_bad_images()
        if failed or too_many or signum or due:
            self._save()
        if failed:
            messages = [message for message in self.processes.gather(str(error) if error else None) if message]
            raise agreed(error or UserError(messages[0]))
        if too_many:
            raise too_many
        if signum:
            raise agreed(Interrupted(self.run.path, self.position.step, int(signum)))

    def _step(self, parts: list[AnyBatch], started: float, waited: float) -> None:
        position, optim = self.position, self.recipe.optim
        self.schedule.step_update(position.step)
        self.task.train()
        self.statistics.keep()
        losses = torch.zeros_like(self.pending)
        for part, batch in enumerate(parts):
            key = (self.recipe.engine.seed, position.step, part, self.fabric.global_rank)
            seed_all(derive_seed(Purpose.STEP, *key))
            with self.fabric.no_backward_sync(self.task, enabled=part < len(parts) - 1):
                with self.fabric.autocast():  # on one device Fabric calls the step as it is, without its precision
                    loss = self.task.training_step(batch, position.step) / len(parts)
                losses += loss.detach()
                if part == len(parts) - 1:
                    fetched = Fetched(losses)
                self.fabric.backward(loss)
        (unsound,) = self.processes.largest(not math.isfinite(fetched.value()))
        if unsound:
            self.optimizer.zero_grad(set_to_none=True)
            self.statistics.restore()
        else:
            if optim.clip_grad is not None:
                # a gradient that is not finite is float16's business (its scaler skips the step) or shows in the
                # weights
                self.fabric.clip_gradients(
                    self.task, self.optimizer, max_norm=optim.clip_grad, error_if_nonfinite=False
                )
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.average is not None:
                self.average.update(self.model, step=position.step)
            self.pending += losses
            self.pending_steps += 1
        position.step += 1
        self._log(time.perf_counter() - started, waited)
        position.skipped_in_row = position.skipped_in_row + 1 if unsound else 0
        if unsound:
            position.skipped += 1
            self.incidents.note_skipped_step(parts, step=position.step, lr=self._rate(), in_row=position.skipped_in_row)

    def _log(self, seconds: float, waited: float) -> None:
        """Shows the step; every ``LOG_INTERVAL`` steps fetches the mean loss since the last time and records it."""
        position = self.position
        position.seconds += seconds
        lr, loss = self._rate(), None
        if position.step % LOG_INTERVAL == 0 or position.step % self.steps_per_epoch == 0:
            self._flush_loss()
            loss = position.logged_sum / position.logged_steps if position.logged_steps else None
            position.logged_sum, position.logged_steps = 0.0, 0
            self._row("step", loss=loss, lr=lr)
        self.progress.step(position.step, seconds=seconds, waited=waited, memory_gb=self._peak_memory, loss=loss, lr=lr)

    def _flush_loss(self) -> None:
        """Moves the pending losses, averaged over processes, into the position.

        Raises:
            UserError: A weight is not finite.
        """
        mean: Any = self.fabric.all_reduce(self.pending, reduce_op="mean")
        total, steps = float(mean), self.pending_steps
        self.pending.zero_()
        self.pending_steps = 0
        # a gradient may overflow where the loss did not
        if not math.isfinite(parameter_norm(self.model)):
            raise agreed(
                UserError(
                    f"the weights are not finite after step {self.position.step}: continue from the last checkpoint, "
                    "which is sound, with --resume --force and --set optim.base_lr lower or optim.clip_grad=1"
                )
            )
        self.position.add_losses(total, steps)

    def _evaluate(self) -> None:
        position = self.position
        self.task.eval()
        self.task.on_validation_epoch_start()
        batches = iter(self.val_loader)
        if self.sharded:
            self.statistics.share()
        # not inference_mode: FSDP keeps the tensors that it makes at the first pass
        # no search for the fastest convolutions: whole images of detection and segmentation have many sizes
        with torch.no_grad(), self.fabric.autocast(), cudnn_benchmark(False):
            for i in range(len(self.val_loader)):
                parts, error = self._fetch(batches, 1)
                self._agree(parts, error)
                self.task.validation_step(parts[0], i)
        result = self.task.result()
        train_loss = position.loss_sum / position.loss_steps if position.loss_steps else None
        position.loss_sum, position.loss_steps, position.evaluated = 0.0, 0, position.step
        row = self._row(
            "epoch",
            train_loss=train_loss,
            **result.figures,
            skipped=position.skipped,
            images_per_second=round(self.progress.images_per_second(position.step), 1),
            data_wait=round(self.progress.data_wait(), 4),
            memory_gb=round(self._peak_memory(), 3),
            seconds=round(position.seconds, 1),
        )
        better = result.headline > position.best and result.sound
        if better:
            position.best = result.headline
        self._export((self.run.last, self.run.best) if better else (self.run.last,), row)
        self.progress.say(
            f"epoch {row['epoch']:g}: training loss {train_loss or math.nan:.4f}, "
            f"{result.line}" + (", the best so far" if better else "")
        )

    def _export(self, folders: tuple[Path, ...], row: dict[str, Any]) -> None:
        """Writes the weights that were evaluated, those of the average where there is one."""
        network = self.model if self.average is None else self.average.module
        state = full_state_dict(network, sharded=self.sharded)
        if not self.fabric.is_global_zero:
            return
        note = {key: row[key] for key in ("step", "epoch", self.work.headline)}
        note |= dict(recipe=self.recipe.name, recipe_hash=self.recipe.digest())
        for folder in folders:
            self.work.save(
                self.described,
                folder,
                state=state,
                classes=self.splits.train.classes,
                model_args=self.model_args,
                note=note,
            )

    def _row(self, kind: str, **values: Any) -> dict[str, Any]:
        step = self.position.step
        return self.log.row(kind, step=step, epoch=step / self.steps_per_epoch, **values)

    def _save(self) -> None:
        if self.pending_steps:
            self._flush_loss()
        self.log.flush()
        if self.sharded:
            self.statistics.share()
        position = self.position
        self.snapshots.write(
            position.step, lambda path: self.fabric.save(path, self._state()), first=self.fabric.is_global_zero
        )
        self.fabric.barrier()
        self.saved_step, self.saved_at = position.step, time.monotonic()

    def _say_once(self, message: str) -> None:
        if self.fabric.is_global_zero:
            print(message, file=sys.stderr, flush=True)

    def _state(self) -> dict[str, Any]:
        scaler = self.fabric.strategy.precision.state_dict()  # of float16's loss, empty otherwise
        return dict(task=self.task, optimizer=self.optimizer, position=asdict(self.position), scaler=scaler)

    def _rate(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _peak_memory(self) -> float:
        return peak_memory_gb(self.fabric.device)

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
        loader = train_loader(self.dataset, sampler, workers=recipe.data.workers, place=fabric.device)
        return iter(fabric.setup_dataloaders(loader, use_distributed_sampler=False))

    @property
    def _skipping(self) -> bool:
        return self.recipe.data.on_bad_image == "skip"

    def _val_loader(self) -> Any:
        recipe, fabric = self.recipe, self.fabric
        dataset = self.work.val_data(self.splits.val, on_bad_image="mask" if self._skipping else "error")
        sampler = EvalSampler(len(dataset), rank=fabric.global_rank, world=fabric.world_size)
        size = self.work.val_batch(self.batch.per_process)
        loader = eval_loader(dataset, sampler, batch_size=size, workers=recipe.data.workers, place=fabric.device)
        return fabric.setup_dataloaders(loader, use_distributed_sampler=False)

    @property
    def operations(self) -> str | None:
        """What computes Conv2Former's operations here (``ops``); None for a network without them."""
        if not any(isinstance(module, Block) for module in self.described.modules()):
            return None
        return backend_for(self.fabric.device)

    def _summary(self) -> str:
        recipe, fabric = self.recipe, self.fabric
        parameters = sum(p.numel() for p in self.model.parameters())
        operations = self.operations
        return (
            f"{recipe.name}: {recipe.model.name}, {parameters / 1e6:.2f}M parameters, "
            f"{len(self.splits.train)} training and {len(self.splits.val)} validation images, "
            f"{len(self.splits.train.classes)} classes\n"
            f"batch {self.batch}, learning rate {self.lr:.3g}, "
            f"{self.steps} steps ({self.steps / self.steps_per_epoch:g} epochs of {self.steps_per_epoch}), "
            f"{recipe.engine.precision} on {fabric.device}"
            + (f", operations by {operations}" if operations else "")
            + (f", from step {self.position.step}" if self.position.step else "")
        )
