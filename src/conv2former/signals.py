"""How a run is asked to stop, and what its exit status says."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from types import FrameType, TracebackType

RESUME_ME = 75  # EX_TEMPFAIL of sysexits.h: a scheduler may start the same command again with --resume


class Interrupted(Exception):
    """The run was asked to stop and has saved its state.

    Attributes:
        code: The exit status: 130 after Ctrl-C, ``RESUME_ME`` after a scheduler's SIGTERM or SIGUSR1.
    """

    def __init__(self, run: Path, step: int, signum: int) -> None:
        command = f"conv2former train --out {shlex.quote(str(run))} --resume"
        super().__init__(f"stopped at step {step}, state saved; continue with: {command}")
        self.code = 128 + signum if signum == signal.SIGINT else RESUME_ME


class StopRequest:
    """Turns the first Ctrl-C, SIGTERM or SIGUSR1 into a request that the loop meets between steps.

    A second Ctrl-C or SIGTERM interrupts at once. SIGUSR1 may come as often as a scheduler likes.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def __enter__(self) -> StopRequest:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self.previous = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            if signum == signal.SIGUSR1:
                return
            raise KeyboardInterrupt
        self.signum = signum
        print("stopping after this step (again to stop at once, without saving)", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
