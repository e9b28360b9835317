"""Several processes that train together: how they agree, and how they learn that one of them is gone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from conv2former.errors import UserError, one_line

BEAT = 1.0  # seconds between heartbeats
SILENCE = 30.0  # seconds after which a process that gives none is taken for dead
GRACE = 3.0  # seconds that a process has to end by itself when another has failed
HELP = "what was saved is kept: continue with --resume"


class Processes:
    """All processes of a run, as one of them sees them; with one process every method answers at once.

    Flags travel on the CPU, so that asking does not wait for a GPU.

    Args:
        fabric: Launched.

    Attributes:
        rank: This process.
        world: Their number.
    """

    def __init__(self, fabric: L.Fabric) -> None:
        self.rank, self.world = fabric.global_rank, fabric.world_size
        self.watch: Watch | None = None
        if self.world > 1:
            self.group: Any = dist.new_group(backend="gloo")
            self.watch = Watch(fabric)

    def __enter__(self) -> Processes:
        if self.watch:
            self.watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.watch:
            known = value is None or getattr(value, "agreed", False)
            self.watch.finish(None if known else one_line(value))  # type: ignore[arg-type]
            if known and dist.is_initialized():
                # Gloo's threads let go of the last tensors; when Python ends before them, that aborts the process
                dist.destroy_process_group()
        if self.world > 1 and isinstance(value, RuntimeError) and _is_lost_connection(value):
            raise UserError(f"the connection to another process broke, it was probably killed; {HELP}") from None

    def all_reduce_max(self, *values: float) -> list[float]:
        """The maximum of each value over all processes."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.double)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()

    def all_gather(self, value: Any) -> list[Any]:
        """The value of each process, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values


def agreed(error: Exception) -> Exception:
    """Marks an error that all processes raise at the same place: only the first needs to report it."""
    error.agreed = True  # type: ignore[attr-defined]
    return error


def _is_lost_connection(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "onnection closed" in text or "NCCL" in text


class Watch:
    """Ends this process when another one has failed, has died or is silent, with a line that says so.

    A collective that waits for a dead process may wait for ever (NCCL, a machine that is gone), and no Python code runs
    meanwhile; so a thread of each process gives heartbeats in a store that the first process keeps.
    """

    def __init__(self, fabric: L.Fabric) -> None:
        self.rank, self.world = fabric.global_rank, fabric.world_size
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        timeout = timedelta(seconds=SILENCE)
        if self.rank == 0:
            self.store = dist.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        port = fabric.broadcast(self.store.port if self.rank == 0 else 0)
        if self.rank:
            self.store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
        # Fabric's own observer kills the first process without a word when one that it started fails
        started = getattr(fabric.strategy.launcher, "procs", [])
        self.children: list[subprocess.Popen] = list(started)
        started.clear()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Starts the heartbeat and the look-out for those of the others."""
        self.store.set(f"beat/{self.rank}", "0")
        self.thread.start()

    def finish(self, error: str | None) -> None:
        """The end of this process's work; with ``error`` that of all the others too."""
        if self.done.is_set():
            return
        self.done.set()
        self.thread.join(timeout=2 * BEAT)
        try:
            if error:
                self._fail(f"process {self.rank} failed: {error}")
            self.store.set(f"beat/{self.rank}", "done")
            if error and self.rank == 0:  # which keeps the store: leave the others time to read it
                time.sleep(2 * BEAT)
        except dist.DistError:  # the first process has gone already
            pass

    def _fail(self, why: str) -> None:
        if not self.store.check(["failed"]):
            self.store.set("failed", why)

    def _run(self) -> None:
        beat, heard = 0, {rank: ("0", time.monotonic()) for rank in range(self.world)}
        while not self.done.wait(BEAT):
            beat += 1
            try:
                self.store.set(f"beat/{self.rank}", str(beat))
                if self.rank == 0:
                    self._listen(heard)
                if self.store.check(["failed"]):
                    why = self.store.get("failed").decode()
                    return self._end(why)
            except dist.DistError:
                return self._end("process 0 is gone")

    def _listen(self, heard: dict[int, tuple[str, float]]) -> None:
        now = time.monotonic()
        for rank in range(1, self.world):
            said = self.store.get(f"beat/{rank}").decode() if self.store.check([f"beat/{rank}"]) else "0"
            if said != heard[rank][0]:
                heard[rank] = said, now
            elif said != "done" and now - heard[rank][1] > SILENCE:
                self._fail(f"process {rank} has given no heartbeat for {SILENCE:.0f} seconds")
        for child in self.children:
            if child.poll():
                self._fail(f"a process ended with status {child.returncode}")

    def _end(self, why: str) -> None:
        if self.done.wait(GRACE):  # it ends by itself, with words of its own
            return
        for child in self.children:
            child.kill()
        print(f"error: process {self.rank} of {self.world} stops, because {why}; {HELP}", file=sys.stderr, flush=True)
        os._exit(1)
