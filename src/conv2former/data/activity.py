"""What the processes of a run are doing, where a watchdog can read it even if none of them can answer any more.

A few hundred bytes of shared memory for the training process and for each of its readers. The standard library alone:
the watchdog reads this file without the rest of the package, and is to start fast.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import time
from typing import Any, NamedTuple

SIZE, READERS = 512, 255
HEAD = struct.Struct("<qqddq")  # process, changes so far, since when, seconds allowed (0: any), bytes of text
SAVING, WAITING = "writing a checkpoint", "waiting for images"
# what asks a run to stop: a person, a scheduler, a terminal or connection that is closed; Windows lacks some
STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))


class Activity(NamedTuple):
    """What a process is doing."""

    pid: int  # 0: there is no such process
    changes: int  # how often it has said so
    since: float  # in seconds of time.monotonic, which all processes of a machine share
    allowed: float  # seconds after which it hangs; 0 for any number
    text: str


class Board:
    """Shared memory that survives fork and, as an argument of a new process, spawn.

    Args:
        handle: An open file of the right size; None makes one.
    """

    def __init__(self, handle: int | None = None) -> None:
        size = SIZE * (1 + READERS)
        if handle is None:
            handle = _nameless()
            os.ftruncate(handle, size)
        self.handle = handle
        self.memory = mmap.mmap(handle, size)

    def write(self, slot: int, text: str, allowed: float = 0.0) -> None:
        """Says what this process does from now on."""
        start = slot * SIZE
        changes = HEAD.unpack_from(self.memory, start)[1]
        words = text.encode("utf-8", "replace")[: SIZE - HEAD.size]
        self.memory[start + HEAD.size : start + HEAD.size + len(words)] = words
        HEAD.pack_into(self.memory, start, os.getpid(), changes + 1, time.monotonic(), allowed, len(words))

    def read(self, slot: int) -> Activity:
        """What a process has said last; a mixture of two where it is just saying it."""
        pid, changes, since, allowed, length = HEAD.unpack_from(self.memory, slot * SIZE)
        start = slot * SIZE + HEAD.size
        return Activity(pid, changes, since, allowed, self.memory[start : start + length].decode("utf-8", "replace"))

    def __reduce__(self) -> tuple[Any, ...]:
        from multiprocessing import reduction

        return _received, (reduction.DupFd(self.handle),)  # type: ignore[attr-defined]


def _received(handle: Any) -> Board:
    return Board(handle.detach())


def _nameless() -> int:
    """A file in memory; on systems without such one in the temporary folder that has no name any more."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("conv2former")
    import tempfile

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


_board: Board | None = None
_slot, _patience = 0, 0.0


def announce(board: Board | None, slot: int = 0, *, patience: float = 0.0) -> None:
    """Has this process, and those that it forks, say on a board what they do; on none with None.

    ``patience`` are the seconds after which something that usually takes less hangs.
    """
    global _board, _slot, _patience
    _board, _slot, _patience = board, slot, patience


_reserved = 0


def reserve(readers: int) -> int:
    """The first of as many slots that no other readers of this process write to, but for the oldest."""
    global _reserved
    first, _reserved = _reserved, _reserved + readers
    return first


def slot(number: int) -> int:
    """Of a reader with a reserved number."""
    return 1 + number % READERS


def current() -> Board | None:
    """The board of this process."""
    return _board


def doing(text: str, patience: float = 0.0, *, more: float = 0.0) -> None:
    """Says what this process does from now on, and after how many times the patience it hangs (0: never).

    ``more`` are seconds that come to these.
    """
    if _board is not None:
        allowed = patience * _patience
        _board.write(_slot, text, allowed + more if allowed else 0.0)


def reading(name: str) -> None:
    """Says which image this process reads; a training process that reads by itself keeps its time limit."""
    if _board is not None:
        _board.write(_slot, f"reading {name}", _board.read(_slot).allowed if _slot == 0 else 0.0)


class Pace:
    """Parts of a work that are alike: one hangs after ten times the longest before, the first never."""

    def __init__(self) -> None:
        self.longest, self.began = 0.0, 0.0

    def begin(self, text: str) -> None:
        """Before a part; ends the one before."""
        self.end()
        if _board is not None:
            self.began = time.monotonic()
            _board.write(_slot, text, max(_patience, 10 * self.longest) if _patience and self.longest else 0.0)

    def end(self) -> None:
        """Behind the last part."""
        if self.began:
            self.longest, self.began = max(self.longest, time.monotonic() - self.began), 0.0
            doing("going on")
