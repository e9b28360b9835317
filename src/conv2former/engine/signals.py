"""How a run is asked to stop, and what its exit status says."""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType

from conv2former.data.activity import STOPS
from conv2former.errors import resume_command

REPEAT = 1.0  # seconds
RESUME_ME = 75  # EX_TEMPFAIL of sysexits.h: a scheduler may start the same command again with --resume


def stops() -> list[signal.Signals]:
    """The signals that ask a run to stop; nohup has SIGHUP ignored, which stays so."""
    ignored = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STOPS if not (ignored and number == signal.SIGHUP)]


class Interrupted(Exception):
    """The run was asked to stop and has saved its state.

    Attributes:
        code: The exit status: 130 after Ctrl-C, ``RESUME_ME`` after SIGTERM, SIGUSR1 or SIGHUP.
    """

    def __init__(self, run: Path, step: int | None, signum: int, *, saved_step: int | None = None) -> None:
        state = "state saved"
        if saved_step not in (None, step):
            state = f"the losses since step {saved_step} are not finite, that step's state is kept"
        state += f"; `predict` and `evaluate` take the best weights so far from {run}" * (run / "best").is_dir()
        saved = f"stopped at step {step}, {state}; continue with: {resume_command(run)}"
        super().__init__(saved if step is not None else "stopped before the first step: there is nothing to resume")
        self.code = 128 + signum if signum == signal.SIGINT else RESUME_ME


class StopRequest:
    """Turns the first of ``stops()`` into a request that the loop meets between steps.

    A second Ctrl-C interrupts at once, if it does not come within ``REPEAT`` seconds: a launcher passes on what its
    processes get by themselves as well. The others may come as often as a scheduler likes.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.asked_at = 0.0

    def __enter__(self) -> StopRequest:
        # signals are the main thread's: a training in another one is stopped by whoever started it
        main = threading.current_thread() is threading.main_thread()
        self.previous = {number: signal.signal(number, self._ask) for number in (stops() if main else ())}
        return self

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            if signum == signal.SIGINT and time.monotonic() - self.asked_at > REPEAT:
                raise KeyboardInterrupt
            return
        self.signum, self.asked_at = signum, time.monotonic()
        # not by print, which may be what the signal has interrupted
        try:
            os.write(2, b"stopping after this step (Ctrl-C again to stop at once, without saving)\n")
        except OSError:  # the terminal is gone: nothing that is printed from now on may end the run
            with open(os.devnull, "w") as nowhere:
                for stream in (1, 2):
                    if stat.S_ISCHR(os.fstat(stream).st_mode):
                        os.dup2(nowhere.fileno(), stream)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
