"""What a person sees while a run goes on: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_INTERVAL = 15.0  # seconds between lines where there is no terminal


class TrainingProgress:
    """Progress of a training with loss, learning rate, images/s and time left; silent on all processes but one.

    Args:
        steps: Optimizer steps of the whole run.
        steps_per_epoch: Optimizer steps in an epoch.
        global_batch: Images per optimizer step, over all processes.
        start: Steps done before.
        enabled: Off on processes that do not speak.
    """

    def __init__(
        self, steps: int, steps_per_epoch: int, *, global_batch: int, start: int, enabled: bool = True
    ) -> None:
        self.steps, self.steps_per_epoch, self.global_batch = steps, steps_per_epoch, global_batch
        self.enabled = enabled
        self.console = Console(stderr=True)
        self.live = enabled and self.console.is_terminal
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
        )
        self.task: TaskID = self.bar.add_task("training", total=steps, completed=start, status="")
        self.first_step, self.train_seconds, self.line_at = start, 0.0, time.monotonic()
        self.wait_seconds = self.last_memory = 0.0
        self.last_loss = ""  # the last one fetched; the bar shows it until the next

    def __enter__(self) -> TrainingProgress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def step(
        self, done: int, *, seconds: float, waited: float, memory_gb: Callable[[], float], loss: float | None, lr: float
    ) -> None:
        """After an optimizer step; ``loss`` is None where it was not fetched from the device.

        Args:
            done: Steps done.
            seconds: That this one took, ``waited`` of them for its images.
            waited: See there.
            memory_gb: Asked for the most memory taken so far where it is shown.
            loss: Mean of the last steps.
            lr: Learning rate of the step.
        """
        self.train_seconds += seconds
        self.wait_seconds += waited
        if not self.enabled:
            return
        status = f"lr {lr:.2e}  {self.images_per_second(done):,.0f} images/s  {self.data_wait():.0%} waiting for data"
        if loss is not None:
            self.last_memory = memory_gb()
        status += f"  {self.last_memory:.1f} GB"
        if loss is not None:
            self.last_loss = f"loss {loss:.4f}  "
        status = self.last_loss + status
        epoch = min((done - 1) // self.steps_per_epoch + 1, self.steps // self.steps_per_epoch)
        title = f"epoch {epoch}/{self.steps // self.steps_per_epoch}"
        if self.live:
            self.bar.update(self.task, completed=done, description=title, status=status)
        elif loss is not None and time.monotonic() - self.line_at > LINE_INTERVAL:
            self.line_at = time.monotonic()
            left = self.train_seconds / (done - self.first_step) * (self.steps - done)
            print(f"{title}  step {done}/{self.steps}  {status}  {left:,.0f} s left", file=sys.stderr, flush=True)

    def images_per_second(self, done: int) -> float:
        """Images trained on per second since this process started, evaluations not counted."""
        return (done - self.first_step) * self.global_batch / max(self.train_seconds, 1e-9)

    def data_wait(self) -> float:
        """Fraction of the training time since this process started that was spent waiting for images."""
        return self.wait_seconds / max(self.train_seconds, 1e-9)

    def say(self, message: str) -> None:
        """A line that stays, above the bar."""
        if not self.enabled:
            return
        if self.live:
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)
        else:
            print(message, file=sys.stderr, flush=True)
