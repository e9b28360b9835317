"""What the three calls share: an archive of rows, a deadline, a clock for GPUs."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
SLEEP = 40_000_000  # clocks of a GPU, some 20 ms: longer than the host takes for the calls that are timed


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of all calls."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True, help="folder of the archive, rows.jsonl")
    made.add_argument("--until", type=float, default=1e18, help="when all has to be written, seconds since 1970")
    made.add_argument("--rehearse", action="store_true", help="without a GPU: tiny sizes, the same code")
    return made


class Archive:
    """Rows of JSON in one file. Each is on the disk before the next is measured: what is cut off loses nothing.

    Args:
        call: Its name, written into each row.
        options: Of ``parser``: folder, end, whether it is a rehearsal, which each row then says.
    """

    def __init__(self, call: str, options: argparse.Namespace) -> None:
        options.out.mkdir(parents=True, exist_ok=True)
        self._path, self._began, self._until = options.out / "rows.jsonl", time.monotonic(), options.until
        self._common: Row = dict(call=call) | (dict(rehearsal=True) if options.rehearse else {})

    def add(self, **row: Any) -> Row:
        """Writes a row and prints it."""
        row = self._common | dict(at=round(time.monotonic() - self._began, 1)) | row
        text = json.dumps(row, default=str)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(text if len(text) < 400 else text[:397] + "...", flush=True)
        return row

    def left(self) -> float:
        """Seconds until the deadline."""
        return self._until - time.time()

    def has_time(self, seconds: float, what: str) -> bool:
        """Whether so much is left; if not, a row says what was left out."""
        if self.left() >= seconds:
            return True
        self.add(left_out=what, because=f"{self.left():.0f} s are left, {seconds:.0f} s are needed")
        return False


def microseconds(call: Callable[[], Any], *, repeats: int = 20, warm_up: int = 5) -> tuple[float, float]:
    """Median time of a call and the width of the middle half, by the GPU's own events; without a GPU by the host.

    The GPU sleeps until the host has sent all calls off: a small kernel takes less time than its launch.
    """
    for _ in range(warm_up):
        call()
    if not torch.cuda.is_available():
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - began))
    else:
        torch.cuda._sleep(SLEEP)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for before, after in events:
            before.record()
            call()
            after.record()
        torch.cuda.synchronize()
        times = [1e3 * before.elapsed_time(after) for before, after in events]
    first, _, third = statistics.quantiles(times, n=4)
    return statistics.median(times), third - first
