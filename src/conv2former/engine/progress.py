"""What a person sees while a run goes on: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from conv2former.errors import printable, say

LINE_INTERVAL = 15.0  # seconds between lines where there is no terminal
FIRST_LINE = 3.0  # seconds of training behind the first one, which says how long it will take


def significant(value: float) -> str:
    """Two digits that count: 0.43, 8.7, 87, 870, 8,700."""
    return f"{float(f'{value:.2g}'):,.{1 if 1 <= value < 9.95 else 0}f}" if value >= 1 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """In words: 40 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class Ticker:
    """Prints a line every ``LINE_INTERVAL`` seconds in which none was printed, also while a step goes on.

    Args:
        line: What to print.
        enabled: Off where there is a bar, and on processes that do not speak.
    """

    def __init__(self, line: Callable[[], str], *, enabled: bool) -> None:
        self.line, self.enabled = line, enabled
        self.last, self.ended = time.monotonic(), threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Ticker:
        self.last = time.monotonic()
        if self.enabled:
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        if self.enabled:
            self.thread.join()

    def _run(self) -> None:
        while not self.ended.wait(max(self.last + LINE_INTERVAL - time.monotonic(), 0.05)):
            if time.monotonic() - self.last >= LINE_INTERVAL:
                self.say(self.line())

    def say(self, *lines: str) -> None:
        """Prints lines now."""
        self.last = time.monotonic()
        if self.enabled:
            say(*lines)


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
        self.first_step, self.done, self.train_seconds = start, start, 0.0
        self.doing = "waiting for the first images"
        self.ticker = Ticker(self._line, enabled=enabled and not self.live)
        self.wait_seconds = self.last_memory = 0.0
        self.last_loss = ""  # the last one fetched; the bar shows it until the next

    def __enter__(self) -> TrainingProgress:
        self.bar.start()
        self.ticker.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ticker.__exit__(kind, value, trace)
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
        first = self.train_seconds < FIRST_LINE <= self.train_seconds + seconds
        self.train_seconds += seconds
        self.wait_seconds += waited
        if not self.enabled:
            return
        self.done = done
        if loss is not None:
            self.last_memory, self.last_loss = memory_gb(), f"loss {loss:.4f}  "
        self.doing = (
            f"{self.last_loss}lr {lr:.2e}  {significant(self.images_per_second(done))} images/s  "
            f"{self.data_wait():.0%} waiting for data"
        )
        self.doing += f"  {self.last_memory:.1f} GB" if self.last_memory else ""
        if self.live:
            self.bar.update(self.task, completed=done, description=self._title(), status=self.doing)
        elif first:
            self.ticker.say(self._line())

    def evaluating(self, done: int, batches: int) -> None:
        """Before a batch of an evaluation."""
        self.doing = f"evaluating, {done} of {batches} batches done"

    def _title(self) -> str:
        epochs = max(self.steps // self.steps_per_epoch, 1)
        return f"epoch {min(max(self.done - 1, 0) // self.steps_per_epoch + 1, epochs)}/{epochs}"

    def _line(self) -> str:
        steps = self.done - self.first_step
        left = self.train_seconds / steps * (self.steps - self.done) if steps else 0.0
        time_left = f"  {duration(left)} left" if steps else ""
        return f"{self._title()}  step {self.done}/{self.steps}  {self.doing}{time_left}"

    def images_per_second(self, done: int) -> float:
        """Images trained on per second since this process started, evaluations not counted."""
        return (done - self.first_step) * self.global_batch / max(self.train_seconds, 1e-9)

    def data_wait(self) -> float:
        """Fraction of the training time since this process started that was spent waiting for images."""
        return self.wait_seconds / max(self.train_seconds, 1e-9)

    def say(self, message: str | list[str]) -> None:
        """A line that stays, or several, above the bar."""
        if not self.enabled:
            return
        lines = [message] if isinstance(message, str) else message
        if self.live:
            text = "\n".join(map(printable, lines))
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            self.ticker.say(*lines)
