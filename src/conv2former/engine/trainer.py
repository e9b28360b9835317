"""The training loop, over optimizer steps on Lightning Fabric.

All randomness is keyed (``data.sampling``), the learning rate is a function of the step, and the data stream starts at
any step, so a run's state is its weights (and their average), its optimizer, the step and a few sums. That is why the
loop is ours and not Lightning's Trainer, whose own progress and loader states would have to agree with the keys;
devices, processes, precision and checkpoint files are Fabric's.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from timm.scheduler.scheduler import Scheduler

from conv2former.data import activity
from conv2former.data.loading import AnyBatch, Batches, checked, keyed_loader, killed_reader
from conv2former.data.sampling import EvalSampler, Purpose, TrainSampler, derive_seed, seed_all, steps_per_epoch
from conv2former.data.sources import Splits
from conv2former.engine.batch import BatchPlan
from conv2former.engine.batchnorm import RunningStatistics, synchronise
from conv2former.engine.checkpointing import CheckpointManager
from conv2former.engine.devices import fused_copy
from conv2former.engine.distributed import Processes, agreed, is_lost_connection, met_by_all
from conv2former.engine.evaluate import evaluation_loop
from conv2former.engine.faults import Faults, calmer
from conv2former.engine.logging import RunLog, peak_memory_gb
from conv2former.engine.optim import build_optimizer, build_schedule, last_lr, scaled_lr
from conv2former.engine.progress import TrainingProgress
from conv2former.engine.run_dir import RunDir
from conv2former.engine.signals import Interrupted, StopRequest
from conv2former.engine.state import Contents, Fetched, TrainState, full_state_dict, parameter_norm
from conv2former.engine.summary import summary
from conv2former.engine.torch_settings import cudnn_benchmark, fused_optimizer
from conv2former.errors import UserError, say_once
from conv2former.ops import backend_for
from conv2former.tasks.base import Task

LOG_INTERVAL = 20  # optimizer steps between logged losses


class _Stopped(Exception):
    """This process was asked to stop while it waited for images."""


class Trainer:
    """One run in progress.

    Args:
        task: On the CPU, with gradient checkpointing where the recipe asks for it.
        splits: The images.
        fabric: Launched.
        processes: Of this run.
        stop: Says when to stop.
        batch: The optimizer step.
    """

    def __init__(
        self, task: Task, splits: Splits, fabric: L.Fabric, processes: Processes, stop: StopRequest, batch: BatchPlan
    ) -> None:
        recipe = task.recipe
        self.recipe, self.splits = recipe, splits
        self.fabric, self.processes, self.stop = fabric, processes, stop
        self.batch, self.peak_memory = batch, functools.partial(peak_memory_gb, fabric.device)
        self.lr = scaled_lr(recipe.optim, self.batch)
        self.steps_per_epoch = steps_per_epoch(len(splits.train), self.batch.total)
        self.steps = 0 if recipe.model.fit_head == "only" else recipe.schedule.total(self.steps_per_epoch)
        # a head that was fitted is evaluated before the first step: nothing that comes may end below it
        first = -1 if recipe.model.fit_head else 0
        self.state = TrainState(steps_per_epoch=self.steps_per_epoch, evaluated=first)
        engine = recipe.engine
        if engine.channels_last and engine.strategy != "fsdp":  # which shards weights that lie in order alone
            task.model.to(memory_format=torch.channels_last)
        if engine.sync_batchnorm and fabric.world_size > 1:
            task.model = synchronise(task.model, fabric.device)
        if recipe.optim.ema_decay:
            task.track_average(recipe.optim.ema_decay)
        skipping = recipe.data.on_bad_image == "skip"
        self.train_dataset = task.train_dataset(splits.train, on_bad_image="replace" if skipping else "error")
        self.eval_dataset = task.eval_dataset(
            splits.val, on_bad_image="mask" if skipping else "error", max_pixels=recipe.data.max_pixels
        )
        self.task, self.model, self.average = task, task.model, task.average
        if engine.compile:
            task.compile(mode=engine.compile_mode)
        self.wrapped: Any = fabric.setup_module(task)
        for step in ("training_step", "count"):  # through DDP's and FSDP's forward
            self.wrapped.mark_forward_method(step)
        fused = fused_optimizer(recipe, fabric.device)
        # behind the set-up, which may shard the weights
        optimizer = build_optimizer(self.model, recipe.optim, lr=self.lr, head=task.in_head, fused=fused)
        self.schedule: Scheduler = build_schedule(optimizer, recipe.schedule, steps_per_epoch=self.steps_per_epoch)
        self.optimizer: Any = fabric.setup_optimizers(optimizer)
        self.statistics = RunningStatistics(self.model, processes, ordered=batch.keys > 1)
        self.sharded = engine.strategy == "fsdp" and fabric.world_size > 1
        self.contents = Contents(fabric, task, self.wrapped, self.optimizer, sharded=self.sharded)
        self.val_loader = self._val_loader()
        self.saved_step: int | None = None  # of the newest checkpoint
        self.in_step, self.in_update, self.pace, self.eval_pace = False, False, activity.Pace(), activity.Pace()

    def load(self, run: RunDir) -> None:
        """Goes to where the run's newest whole checkpoint is; stays at the beginning where there is none.

        Raises:
            UserError: There are damaged ones alone, the recipe ends before it, or another process trains in the folder.
        """
        if self.fabric.is_global_zero:
            run.lock()
        path = CheckpointManager(run.checkpoints).latest_valid(self.processes, say=say_once)
        if path:
            self.state = self.contents.read(path)
            self.saved_step = self.state.step
        state, in_epochs = self.state, self.recipe.schedule.steps is None
        state.skipped_in_row = 0  # the limit is that of one attempt
        if self.fabric.is_global_zero:
            run.tidy()
            if in_epochs:
                run.renumber_rows(state.steps_per_epoch)  # whoever forced another batch may have been killed then
            run.drop_rows_after(state.step, evaluated=state.evaluated)
        if state.steps_per_epoch != self.steps_per_epoch:  # forced to another batch or other images
            if in_epochs:
                state.rescale(self.steps_per_epoch)
                if self.fabric.is_global_zero:
                    run.renumber_rows(self.steps_per_epoch)
            state.steps_per_epoch = self.steps_per_epoch
        with met_by_all():
            state.check_end(self.steps, self.recipe.schedule)

    def fit(self, run: RunDir, *, resumed: bool = False) -> None:
        """Trains to the end from where it is.

        Args:
            run: The run folder.
            resumed: Whether it has been trained in before.

        Raises:
            UserError: An image that cannot be read, losses that are not finite, a folder that cannot be written.
            Interrupted: Stopped by a signal, state saved.
        """
        self.run, self.checkpoints = run, CheckpointManager(run.checkpoints)
        self.saved_at = time.monotonic()
        work: Any = dict(global_batch=self.batch.total, start=self.state.step, enabled=self.fabric.is_global_zero)
        self.progress = TrainingProgress(self.steps, self.steps_per_epoch, **work)
        self.faults = Faults(run, self.recipe, self.splits.train, self.processes, self.progress.say)
        step = self.state.step if resumed else None
        self.log = RunLog(run, self.recipe, step=step, enabled=self.fabric.is_global_zero)
        status = "failed"
        try:
            self.progress.say(summary(self, run.path))
            with self.progress:
                self._run()
            status = "success"
        except RuntimeError as error:
            if is_lost_connection(error) or killed_reader(error):
                self._save_alone()
            raise
        finally:
            activity.doing("closing the loggers")
            self.log.close(status)

    def _run(self) -> None:
        """Evaluate and save where an epoch has ended, else take a step, until all are done."""
        state, every = self.state, self.recipe.schedule.interval(self.steps_per_epoch)
        batches = self._batches(state.step)
        if self.saved_step is None:
            self._save()
        while True:
            due = state.step % every == 0 or state.step == self.steps
            if due and state.evaluated != state.step:
                self._evaluate()
                self._save()
            elif state.step % self.steps_per_epoch == 0 and state.step != self.saved_step:
                self._save()
            if state.step == self.steps:
                return
            started = time.perf_counter()
            micro_batches, error = self._fetch(batches)
            waited = time.perf_counter() - started
            self._agree(micro_batches, error)
            self._step(micro_batches, started, waited)

    def _fetch(self, batches: Iterator[Any], count: int | None = None) -> tuple[list[AnyBatch], UserError | None]:
        """The batches of a step, or what kept this process from getting them: none where it is to stop."""
        activity.doing(activity.WAITING, getattr(batches, "patience", 1))
        try:
            return [checked(next(batches)) for _ in range(count or self.batch.accumulate)], None
        except UserError as error:
            return [], error
        except _Stopped:
            return [], None
        except (RuntimeError, ConnectionError, EOFError) as error:
            if killed := killed_reader(error):
                return [], killed
            raise

    def _agree(self, micro_batches: list[AnyBatch], error: UserError | None) -> None:
        """All processes learn here, before a step or a batch of the evaluation, what one of them has met.

        Raises:
            UserError: One of them cannot go on; the state is saved.
            Interrupted: One of them was asked to stop; the state is saved.
        """
        bad = self.faults.new_bad_images(micro_batches)
        late = time.monotonic() - self.saved_at > 60 * self.recipe.engine.checkpoint_minutes
        signum, failed, found, due = self.processes.all_reduce_max(
            self.stop.signum or 0,
            error is not None,
            len(bad),
            late and self.wrapped.training and self.state.step != self.saved_step,
        )
        if found:
            self.faults.note_bad_images(bad)
        too_many = self.faults.too_many_bad_images()
        if failed or too_many or signum or due:
            self._save()
        if failed:
            messages = [message for message in self.processes.all_gather(str(error) if error else None) if message]
            raise agreed(error or UserError(messages[0]))
        if too_many:
            raise too_many
        if signum:
            raise agreed(Interrupted(self.run.path, self.state.step, int(signum), saved_step=self.saved_step))

    def _step(self, micro_batches: list[AnyBatch], started: float, waited: float) -> None:
        state, optim = self.state, self.recipe.optim
        self.schedule.step_update(state.step)
        self.wrapped.train()
        self.statistics.keep()
        losses = torch.zeros(len(micro_batches), dtype=torch.double, device=self.fabric.device)
        self.in_step = True
        for part, batch in enumerate(micro_batches):
            self.pace.begin(f"in step {state.step + 1}")
            key = (self.recipe.engine.seed, state.step, *self.batch.key(part, self.fabric.global_rank))
            seed_all(derive_seed(Purpose.STEP, *key))
            self.statistics.before_micro_batch()
            with self.fabric.no_backward_sync(self.wrapped, enabled=part < len(micro_batches) - 1):
                with self.fabric.autocast():  # on one device Fabric calls the step as it is, without its precision
                    loss = self.wrapped.training_step(batch)
                losses[part] = loss.detach()
                if part == len(micro_batches) - 1:
                    fetched = Fetched(losses)
                self.fabric.backward(loss / len(micro_batches))
            self.statistics.after_micro_batch()
        own = fetched.values()
        self.pace.end()
        numbers = [number for row in self.processes.gather_numbers(own) for number in row]
        activity.doing("updating the weights", 5)
        unsound = not all(map(math.isfinite, numbers))
        if unsound:
            self.optimizer.zero_grad(set_to_none=True)
            self.statistics.restore()
        else:
            if optim.clip_grad is not None:
                # a gradient that is not finite is float16's business (its scaler skips the step) or shows in the
                # weights
                self.fabric.clip_gradients(
                    self.wrapped, self.optimizer, max_norm=optim.clip_grad, error_if_nonfinite=False
                )
            self.in_update = True
            self.statistics.update()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.average is not None:
                self.average.update(self.model, step=state.step)
            # the sum is rounded once, whatever the order: it does not depend on the number of processes
            state.add_loss(math.fsum(numbers) / len(numbers))
        state.step += 1
        state.skipped_in_row = state.skipped_in_row + 1 if unsound else 0
        self.in_step = self.in_update = False
        self._log(time.perf_counter() - started, waited)
        if unsound:
            state.skipped += 1
            self.faults.note_skipped_step(micro_batches, state, lr=last_lr(self.optimizer))

    def _log(self, seconds: float, waited: float) -> None:
        """Shows the step; every ``LOG_INTERVAL`` steps records the mean loss since the last time."""
        activity.doing("writing metrics", 5)
        state = self.state
        state.seconds += seconds
        lr, loss = last_lr(self.optimizer), None
        if state.step % LOG_INTERVAL == 0 or state.step % self.steps_per_epoch == 0:
            self._check_weights()
            loss = state.logged_sum / state.logged_steps if state.logged_steps else None
            state.logged_sum, state.logged_steps = 0.0, 0
            self._row("step", loss=loss, lr=lr)
        self.progress.step(state.step, seconds=seconds, waited=waited, memory_gb=self.peak_memory, loss=loss, lr=lr)

    def _check_weights(self) -> None:
        """Raises the UserError of a weight that is not finite: a gradient may overflow where the loss did not."""
        if not math.isfinite(parameter_norm(self.model)):
            raise agreed(
                UserError(f"the weights are not finite after step {self.state.step}: {calmer(self.run, self.recipe)}")
            )

    def _evaluate(self) -> None:
        state = self.state
        self.wrapped.eval()
        if self.sharded:
            self.statistics.broadcast()
        metric = self.task.metric(self.splits.val, distributed=self.fabric.world_size > 1)
        # not inference_mode: FSDP keeps the tensors that it makes at the first pass
        # no search for the fastest convolutions: whole images of detection and segmentation have many sizes
        with torch.no_grad(), self.fabric.autocast(), cudnn_benchmark(False), fused_copy(self.task):
            work: Any = dict(count=len(self.val_loader), pace=self.eval_pace)
            evaluation = evaluation_loop(self.wrapped, self._agreed_batches(), metric, **work)
        train_loss = state.loss_sum / state.loss_steps if state.loss_steps else None
        self.in_update = True  # until the weights of this evaluation are written
        state.loss_sum, state.loss_steps, state.evaluated = 0.0, 0, state.step
        row = self._row(
            "epoch",
            train_loss=train_loss,
            **{f"val_{name}": value for name, value in evaluation.metrics.items()},
            skipped=state.skipped,
            images_per_second=round(self.progress.images_per_second(state.step), 1),
            data_wait=round(self.progress.data_wait(), 4),
            memory_gb=round(self.peak_memory(), 3),
            seconds=round(state.seconds, 1),
        )
        better = evaluation.sound and state.improves(evaluation.metrics[self.task.monitor])
        self._export((self.run.last, self.run.best) if better else (self.run.last,), row)
        self.in_update = False
        loss = evaluation.metrics.get("loss")
        self.progress.say(
            (f"epoch {row['epoch']:g}: " if state.step else "before the first step: ")
            + (f"training loss {train_loss:.4f}, " if train_loss is not None else "")
            + (f"validation loss {loss:.4f}, " if loss is not None else "")
            + evaluation.line
            + (", the best so far" if better else "")
        )

    def _agreed_batches(self) -> Iterator[Any]:
        """The validation batches of this process; before each all processes agree that they go on."""
        batches = Batches(self.val_loader, self.fabric.device, self._unless_stopped)
        for number in range(len(self.val_loader)):
            self.progress.evaluating(number, len(self.val_loader))
            micro_batches, error = self._fetch(batches, 1)
            self._agree(micro_batches, error)
            yield micro_batches[0]

    def _export(self, folders: tuple[Path, ...], row: dict[str, Any]) -> None:
        """Writes the weights that were evaluated, those of the average where there is one."""
        weights = full_state_dict(self.task.evaluated, sharded=self.sharded)
        activity.doing("writing the weights", 5)
        if not self.fabric.is_global_zero:
            return
        note = {key: row[key] for key in ("step", "epoch", f"val_{self.task.monitor}")}
        note |= dict(recipe=self.recipe.name, recipe_hash=self.recipe.digest())
        for folder in folders:
            self.task.save(folder, state=weights, note=note)

    def _row(self, kind: str, **values: Any) -> dict[str, Any]:
        step = self.state.step
        return self.log.row(kind, step=step, epoch=step / self.steps_per_epoch, **values)

    def _save(self) -> None:
        """Writes a checkpoint; none after a step that was skipped, because the weights may be the reason for it."""
        if self.state.skipped_in_row:
            return
        self._check_weights()
        self.log.flush()
        if self.sharded:
            self.statistics.broadcast()
        self._write()
        self.processes.barrier()

    def _save_alone(self) -> None:
        """The run ends here, at any moment: the first process saves the state after the last step, if it can."""
        if not self.fabric.is_global_zero or self.sharded or self.in_update:
            return
        if self.in_step:
            self.statistics.restore()
        sound = not self.state.skipped_in_row and math.isfinite(parameter_norm(self.model))
        if sound and self.state.step != self.saved_step:
            with contextlib.suppress(UserError, OSError):
                self._write()

    def _write(self) -> None:
        """Writes a checkpoint."""
        activity.doing(activity.SAVING, 5)
        write, first = functools.partial(self.contents.write, self.state), self.fabric.is_global_zero
        self.checkpoints.write(self.state.step, write, first=first)
        self.saved_step, self.saved_at = self.state.step, time.monotonic()

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
        workers, device = recipe.data.workers, fabric.device
        loader = keyed_loader(self.train_dataset, batch_sampler=sampler, workers=workers, device=device)
        return Batches(loader, fabric.device, self._unless_stopped)

    def _unless_stopped(self) -> None:
        if self.stop.signum is not None:
            raise _Stopped
        self.processes.check()

    def _val_loader(self) -> Any:
        fabric, dataset = self.fabric, self.eval_dataset
        sampler = EvalSampler(len(dataset), rank=fabric.global_rank, world=fabric.world_size)
        size = 1 if self.task.one_at_a_time else self.batch.per_process
        workers = self.recipe.data.workers
        return keyed_loader(dataset, sampler=sampler, batch_size=size, workers=workers, device=fabric.device)

    @property
    def operations(self) -> str | None:
        """What computes Conv2Former's operations here (``ops``); None for a network without them."""
        if not getattr(self.task.backbone, "uses_ops", False):
            return None
        return backend_for(self.fabric.device)
