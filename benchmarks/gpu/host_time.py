"""Time of the host that the operations of a block take in training: launches, allocations and what is computed there.

    python benchmarks/gpu/host_time.py

A GPU that is faster than its host waits. Triton's driver is exchanged for one that launches nothing (``no_launch``).
PyTorch's own small operations (a weight's layout, sums) do run, on the CPU, so the maps are tiny and the channels are
those of Conv2Former-T's first stage; what the host does is the same for larger ones. Times are CPU time of one thread,
the least of five repetitions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import no_launch
import torch

from conv2former.ops.triton import Maps
from conv2former.ops.triton.warm import operations

CALLS = 100
MAPS = Maps(side=7, channels=72, hidden=288, kernel_size=11, dtype=torch.bfloat16)


def least(call: Callable[[], Any]) -> float:
    """Microseconds of CPU time of a call."""
    for _ in range(20):
        call()
    times = []
    for _ in range(5):
        began = time.thread_time()
        for _ in range(CALLS):
            call()
        times.append(time.thread_time() - began)
    return 1e6 * min(times) / CALLS


def main() -> None:
    """Prints a line for each operation, and their sum."""
    torch.set_num_threads(1)
    counts = no_launch.activate()
    taken = {name: least(call) for name, call in operations(MAPS, batch=1, device="cpu").items()}
    taken["a block"] = sum(taken.values())
    one = torch.empty(16)
    taken["for comparison, torch.add"] = least(lambda: one + 1)
    for name, microseconds in taken.items():
        print(f"{name:30}{microseconds:7.1f} us")
    print(f"{counts.timed} configurations were timed, {sum(counts.compiled.values())} programs compiled")


if __name__ == "__main__":
    main()
