"""Several processes that train together: how they agree, and how they learn that one of them is gone or hangs."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from conv2former.data import activity
from conv2former.engine import watchdog
from conv2former.errors import UserError, one_line


class Processes:
    """All processes of a run, as one of them sees them; with one process every method answers at once.

    Flags travel on the CPU, so that asking does not wait for a GPU.

    Args:
        fabric: Launched.
        patience: Seconds after which a process that does not get on hangs; 0 for never.

    Attributes:
        rank: This process.
        world: Their number.
    """

    def __init__(self, fabric: L.Fabric, *, patience: float = 0.0) -> None:
        self.rank, self.world, self.patience = fabric.global_rank, fabric.world_size, patience
        if self.world > 1:
            self.group: Any = dist.new_group(backend="gloo")
        self.watch = Watch(fabric, patience=patience)

    def __enter__(self) -> Processes:
        activity.announce(self.watch.board, patience=self.patience)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        activity.announce(None)
        if value is not None and is_lost_connection(value):
            self._leave(value)
        known = value is None or getattr(value, "agreed", False)
        if known:
            self.part()
        self.watch.finish(None if known or self.world == 1 else one_line(value))  # type: ignore[arg-type]
        if known and self.world > 1 and dist.is_initialized():
            # Gloo's threads let go of the last tensors; when Python ends before them, that aborts the process
            dist.destroy_process_group()
        if self.rank and isinstance(value, UserError) and not known:
            raise SystemExit(1) from None  # the first process says what this one has met

    def part(self) -> None:
        """The end of what is done together: whoever ended its connections before would break another's last message."""
        if self.world > 1:
            self.watch.part(self.rank)

    def _leave(self, error: BaseException) -> None:
        """The end where another process is gone: one of them says why."""
        why, speaks = self.watch.reason()
        why += f" ({one_line(error)[:200]})" * (not self.watch.told.is_set())
        self.watch.close()
        if not speaks:
            raise SystemExit(1) from None
        raise UserError(f"process {self.rank} of {self.world} stops, because {watchdog.with_help(why)}") from None

    def check(self) -> None:
        """Raises the UserError that says what hangs, be it a reader of this process or another process."""
        if self.watch.told.is_set():
            raise UserError(watchdog.with_help(self.watch.why))

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Whoever waits for the others does not hang: one of the others does."""
        activity.doing("waiting for the other processes")
        yield
        activity.doing("going on")

    def all_reduce_max(self, *values: float) -> list[float]:
        """The maximum of each value over all processes."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.double)
        with self._waiting():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()

    def all_gather(self, value: Any) -> list[Any]:
        """The value of each process, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with self._waiting():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_numbers(self, values: list[float]) -> list[list[float]]:
        """The numbers of each process, equally many, by rank."""
        if self.world == 1:
            return [values]
        own = torch.tensor(values, dtype=torch.double)
        rows = [torch.empty_like(own) for _ in range(self.world)]
        with self._waiting():
            dist.all_gather(rows, own, group=self.group)
        return [row.tolist() for row in rows]

    def barrier(self) -> None:
        """Waits for all."""
        self.all_reduce_max(0.0)


def agreed(error: Exception) -> Exception:
    """Marks an error that all processes raise at the same place: only the first needs to report it."""
    error.agreed = True  # type: ignore[attr-defined]
    return error


@contextlib.contextmanager
def met_by_all() -> Iterator[None]:
    """Around checks that end alike on all processes."""
    try:
        yield
    except UserError as error:
        raise agreed(error) from None


def is_lost_connection(error: BaseException) -> bool:
    """Whether another process is gone."""
    if not isinstance(error, RuntimeError) or not dist.is_initialized():
        return False
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "onnection closed" in text or "NCCL" in text


class Watch:
    """This process's end of its watchdog (``engine.watchdog``), which runs until ``finish`` or the process's end.

    Args:
        fabric: Launched.
        patience: See ``Processes``.

    Attributes:
        board: Where this process and its readers say what they do.
    """

    def __init__(self, fabric: L.Fabric, *, patience: float) -> None:
        rank, world = fabric.global_rank, fabric.world_size
        self.several = world > 1
        self.board = activity.Board()
        self.why, self.speaks, self.told = "the connection to another process broke", rank == 0, threading.Event()
        self.parted = threading.Event()
        self.control, control = socket.socketpair()
        self.signals, signals = socket.socketpair()
        self.lines = self.control.makefile("r", encoding="utf-8")
        handles = (self.board.handle, control.fileno(), signals.fileno())
        program = [sys.executable, "-IS", watchdog.__file__, *map(str, (*handles, os.getpid()))]
        devices: Any = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, activity.STOPS)  # which the watchdog inherits
        try:
            self.process = subprocess.Popen(program, pass_fds=handles, **devices)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        control.close()
        signals.close()
        silence = max(min(patience or watchdog.SILENCE, watchdog.SILENCE), 3 * watchdog.BEAT)
        token, host = secrets.token_hex(16), os.environ.get("MASTER_ADDR", "127.0.0.1")
        self._send(rank=rank, local=fabric.local_rank, world=world, host=host, silence=silence, token=token)
        if world > 1:
            port = json.loads(self.lines.readline())["port"] if rank == 0 else 0
            self._send(join=fabric.broadcast((port, token)))
            # Fabric's own observer kills the first process without a word when one that it started fails
            getattr(fabric.strategy.launcher, "procs", []).clear()
        self.signals.setblocking(False)
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:  # the signal's number is written at once, wherever this process is
            self.before = signal.set_wakeup_fd(self.signals.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="watch", daemon=True).start()

    def _send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # a watchdog that was killed
            self.control.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in self.lines:
                message = json.loads(line)
                if "why" in message:
                    self.why, self.speaks = message["why"], message["speaks"]
                    self.told.set()
                if "parted" in message:
                    self.parted.set()
                if "exit" in message:
                    os._exit(1)

    def reason(self) -> tuple[str, bool]:
        """Why the others are gone, and whether this process is the one to say so."""
        self.told.wait(2 * watchdog.GRACE)
        return self.why, self.speaks

    def part(self, rank: int) -> None:
        """The first process lets the others go on to their end."""
        if rank == 0 and not self.parted.is_set():
            self._send(parted=True)
            self.parted.set()
        self.parted.wait(watchdog.GRACE)

    def finish(self, error: str | None) -> None:
        """The end of this process's work; with ``error`` that of all the others too."""
        self._send(**(dict(failed=error) if error else dict(done=True)))
        self.close()

    def close(self) -> None:
        """Lets the watchdog end."""
        if self.main:
            signal.set_wakeup_fd(self.before)
        self._send(close=True)
        if self.several:  # else nobody waits for its last message
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(2 * watchdog.GRACE)
        with contextlib.suppress(OSError):
            self.control.shutdown(socket.SHUT_RDWR)  # the thread that listens ends
        self.signals.close()
        os.close(self.board.handle)
