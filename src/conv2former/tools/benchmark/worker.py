"""The process that holds one configuration, and the parent's end of it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import platform
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from conv2former.engine.machine import version_of
from conv2former.errors import one_line
from conv2former.tools.benchmark.modes import DTYPES, MODES, Configuration, prepare
from conv2former.tools.benchmark.peak import peak_rate

WARM_UP = 3  # steps, the first of which compile and tune
REST = 0.02  # seconds before a timed step, in which the threads of other workers fall asleep
LONGEST_REASON = 200  # characters of an error; compilers' run to pages
TOP = 15  # operations of a profile
PROC = Path("/proc/self")


class Operation(NamedTuple):
    """An operation of a step."""

    name: str
    calls: int
    seconds: float  # its own time, without what it called
    share: float  # fraction of all operations' time


class Worker:
    """A process with a prepared configuration; its methods are those of ``Holder``, which is there.

    A worker that has failed answers None from then on, and ``error`` says why.
    """

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration
        self.error: str | None = None
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, configuration), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def step(self) -> float | None:
        return self._ask("step")

    def burst(self, steps: int) -> tuple[float, float] | None:
        return self._ask("burst", steps)

    def memory(self) -> int | None:
        return self._ask("memory")

    def versions(self) -> dict[str, str]:
        return self._ask("versions") or {}

    def peak(self, dtype: str) -> float | None:
        return self._ask("peak", dtype)

    def profile(self, top: int = TOP) -> list[Operation] | None:
        return self._ask("profile", top)

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, *request: Any) -> Any:
        if self.error is not None:
            return None
        with contextlib.suppress(OSError):  # it has ended: the answer says so
            self._pipe.send(request)
        return self._receive()

    def _receive(self) -> Any:
        try:
            good, answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(timeout=5)
            good, answer = False, f"its process ended with status {self._process.exitcode}: too little memory?"
        if not good:
            self.error = answer
        return answer if good else None


def serve(pipe: Connection, configuration: Configuration) -> None:
    """What the process does: prepares, then answers until the parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    os.dup2(2, 1)  # standard output is the parent's alone: a JSON document, say
    try:
        holder: Any = Holder(configuration)
        answer = None
        while True:
            pipe.send((True, answer))
            name, *arguments = pipe.recv()
            answer = getattr(holder, name)(*arguments)
    except (EOFError, BrokenPipeError):
        sys.exit()
    except Exception as error:  # whatever a model, a compiler or a runtime may raise becomes the row's reason
        reason = one_line(error)
        pipe.send((False, reason if len(reason) <= LONGEST_REASON else reason[: LONGEST_REASON - 3] + "..."))


class Holder:
    """Answers a worker's requests; the configuration is prepared and warmed up when it is there."""

    def __init__(self, configuration: Configuration) -> None:
        self._c = configuration
        self._device = torch.device(configuration.device)
        self._gpu = self._device.type == "cuda"
        if self._gpu:
            torch.cuda.set_device(self._device)
        self._before = _status("VmRSS")
        self._step = prepare(configuration)
        for _ in range(WARM_UP):
            self._step()
        self._settle()
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            _forget_peak()

    def step(self) -> float:
        """Seconds of one step, with all that it has set going on a GPU."""
        time.sleep(REST)
        started = time.perf_counter()
        self._step()
        self._settle()
        return time.perf_counter() - started

    def burst(self, steps: int) -> tuple[float, float]:
        """Seconds of a step among several without a synchronisation, and of the host's part of the first of them.

        Later ones may find the GPU's queue full, and then the host waits.
        """
        self._settle()
        started = time.perf_counter()
        self._step()
        sent = time.perf_counter() - started
        for _ in range(steps - 1):
            self._step()
        self._settle()
        return (time.perf_counter() - started) / steps, sent

    def memory(self) -> int | None:
        """Peak of the steps, bytes: of the process beyond what it held before there was a model, or PyTorch's on a GPU.

        None where the system does not say.
        """
        if self._gpu:
            return torch.cuda.max_memory_allocated()
        after = _status("VmHWM")
        return None if after is None or self._before is None else max(after - self._before, 0)

    def versions(self) -> dict[str, str]:
        names = ["torch", "timm", *MODES[self._c.mode][-1:]]
        return {name: version_of(name) for name in names} | dict(python=platform.python_version())

    def peak(self, dtype: str) -> float:
        return peak_rate(self._device, DTYPES[dtype])

    def profile(self, top: int) -> list[Operation]:
        """The operations of one step that took longest: on a GPU its kernels, else the operators on the CPU."""
        device = DeviceType.CUDA if self._gpu else DeviceType.CPU
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._gpu else [])]) as recorded:
            self._step()
            self._settle()
        events: list[Any] = [event for event in recorded.key_averages() if event.device_type == device]
        times = [event.self_device_time_total if self._gpu else event.self_cpu_time_total for event in events]
        total = sum(times) or 1
        found = [Operation(e.key, e.count, time / 1e6, time / total) for e, time in zip(events, times, strict=True)]
        return sorted(found, key=lambda operation: -operation.seconds)[:top]

    def _settle(self) -> None:
        if self._gpu:
            torch.cuda.synchronize()


def _status(key: str) -> int | None:
    """A number of the process in bytes, as Linux tells it."""
    try:
        lines = (PROC / "status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def _forget_peak() -> None:
    """Resets the kernel's VmHWM, so that building and compiling do not count; where that is forbidden, they do."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc would keep what is free now and let it count as held
    with contextlib.suppress(OSError):
        (PROC / "clear_refs").write_text("5")
