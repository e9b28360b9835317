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

from conv2former.ops.triton import large_kernel, three_rows

CALLS = 100


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


def block_calls(batch: int, side: int, channels: int, kernel: int = 11) -> dict[str, Callable[[], Any]]:
    """The four operations of a block in training, without arguments."""
    u, v, a, g = (torch.randn(batch, side, side, channels).bfloat16() for _ in range(4))
    h = torch.randn(batch, side, side, 4 * channels).bfloat16()
    weight, bias = torch.randn(channels, 1, kernel, kernel), torch.randn(channels)
    small, wide = torch.randn(4 * channels, 1, 3, 3), torch.randn(4 * channels)
    return {
        "modulation": lambda: large_kernel.modulation(u, v, weight, bias, True),
        "modulation, backward": lambda: large_kernel.modulation_backward(g, u, v, a, weight),
        "middle of the MLP": lambda: three_rows.mlp_middle(h, small, wide),
        "middle of the MLP, backward": lambda: three_rows.mlp_middle_backward(h, h, small, wide),
    }


def main() -> None:
    """Prints a line for each operation, and their sum."""
    torch.set_num_threads(1)
    counts = no_launch.activate()
    taken = {name: least(call) for name, call in block_calls(1, 7, 72).items()}
    taken["a block"] = sum(taken.values())
    one = torch.empty(16)
    taken["for comparison, torch.add"] = least(lambda: one + 1)
    for name, microseconds in taken.items():
        print(f"{name:30}{microseconds:7.1f} us")
    print(f"{counts.timed} configurations were timed, {sum(counts.compiled.values())} programs compiled")


if __name__ == "__main__":
    main()
