"""Where the time of one step goes, by operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

TOP = 15


class Operation(NamedTuple):
    """An operation of a step: its name, how often, its own time in seconds and that as a share of all operations'."""

    name: str
    calls: int
    seconds: float
    share: float


def profile_step(step: Callable[[], Any], device: torch.device, *, top: int = TOP) -> list[Operation]:
    """Runs a step under PyTorch's profiler.

    Args:
        step: What is run, once.
        top: How many operations are returned.
        device: On a GPU the times are its kernels', else those of the operators on the CPU.

    Returns:
        The operations that took longest by themselves, without what they called.
    """
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as recorded:
        step()
        if gpu:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if gpu else DeviceType.CPU
    events: list[Any] = [event for event in recorded.key_averages() if event.device_type == wanted]
    times = [event.self_device_time_total if gpu else event.self_cpu_time_total for event in events]
    total = sum(times) or 1
    found = [
        Operation(event.key, event.count, time / 1e6, time / total) for event, time in zip(events, times, strict=True)
    ]
    return sorted(found, key=lambda operation: -operation.seconds)[:top]


def to_text(title: str, operations: list[Operation]) -> str:
    """A table of operations for the screen."""
    lines = [title, "      ms   share   calls  operation"]
    lines += [f"{o.seconds * 1e3:8.2f}  {o.share:6.1%}  {o.calls:6}  {o.name[:100]}" for o in operations]
    return "\n".join(lines)
