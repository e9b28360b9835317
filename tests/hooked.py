"""The command line with faults that a test calls for by environment variables; to be run as a program.

HOOK_HANG   a file; once it is there, looking at the image that it names takes for ever
HOOK_HOLD   a step, after which the last process keeps the interpreter's lock for ever
HOOK_ORDER  a folder, to which each process writes the images of every step and micro-batch
"""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import conv2former_cli
from conv2former.data.loading import KeyedDataset
from conv2former.engine.trainer import Trainer

MUTEX = 64  # bytes, more than any system's


def stop_for_ever() -> None:
    """As a file system that does not answer: no signal is met, the interpreter's lock is free."""
    lock = ctypes.create_string_buffer(MUTEX)
    while True:
        ctypes.CDLL(None).pthread_mutex_lock(lock)


def hang(marker: Path) -> None:
    """Any dataset meets the image that ``marker`` names."""
    original = KeyedDataset.__getitem__

    def getitem(self: KeyedDataset, key: Any) -> Any:
        read = type(self).read

        def watched(self: KeyedDataset, index: int) -> Any:
            if marker.exists() and self.source.name(index) == marker.read_text():
                stop_for_ever()
            return read(self, index)

        type(self).read = watched  # type: ignore[method-assign]
        try:
            return original(self, key)
        finally:
            type(self).read = read  # type: ignore[method-assign]

    KeyedDataset.__getitem__ = getitem  # type: ignore[method-assign]


def watch_steps(hold: int | None, order: Path | None) -> None:
    """After each step."""
    original = Trainer._step

    def step(self: Trainer, micro_batches: list[Any], *args: Any) -> None:
        number, rank = self.state.step, self.fabric.global_rank
        if order:
            parts = [self.batch.key(part, rank)[0] for part in range(len(micro_batches))]
            rows = [(number, part, batch.indices.tolist()) for part, batch in zip(parts, micro_batches, strict=True)]
            with (order / f"{os.getpid()}.jsonl").open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        original(self, micro_batches, *args)
        if hold == self.state.step and rank == self.fabric.world_size - 1:
            ctypes.PyDLL(None).sleep(1000)

    Trainer._step = step  # type: ignore[method-assign]


if __name__ == "__main__":
    if "HOOK_HANG" in os.environ:
        hang(Path(os.environ["HOOK_HANG"]))
    found = os.environ.get("HOOK_HOLD"), os.environ.get("HOOK_ORDER")
    watch_steps(int(found[0]) if found[0] else None, Path(found[1]) if found[1] else None)
    conv2former_cli.main()
