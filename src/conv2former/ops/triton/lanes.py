"""How the kernels deal out tensors (lanes, channel groups) and how they are launched (configurations).

All tensors are NHWC. A program works on N lanes (a power of two). A lane is one channel of a group of ``CG`` channels
at one of R = N // CG positions, channels fastest: neighbouring lanes read neighbouring addresses, and no power of two
has to divide the number of channels (72 = 8 * 9). Lanes behind R * CG repeat others and store nothing. The last group
of channels overlaps the one before where ``CG`` does not divide C: both store the same values there.
"""

# mypy: allow-incomplete-defs, allow-untyped-calls
# (in kernels only the constants have types)

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

INTERPRETED: bool = knobs.runtime.interpret
"""Triton's interpreter runs the kernels (TRITON_INTERPRET=1, read when Triton is imported): one configuration each."""

MAX_CHANNEL_GROUP = 96


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. ``triton.cdiv`` takes ten times as long where the host calls it."""
    return -(-a // b)


def use(channels: int, group: int, lanes: int) -> float:
    """The fraction of lanes at work, less for short runs of addresses, which waste parts of 32-byte sectors."""
    busy = lanes // group * group / lanes
    covered = channels / (ceil_div(channels, group) * group)
    return busy * covered * group / (group + 8)


@functools.cache
def channel_group(channels: int, lanes: int) -> int:
    """The number of channels CG of a group, at most 96, that makes the most use of the lanes."""
    step = math.gcd(channels, 8)  # keeps vectors of up to eight channels whole
    sizes = range(step, min(channels, MAX_CHANNEL_GROUP, lanes) + 1, step)
    return max(sizes, key=lambda group: use(channels, group, lanes))


@triton.jit
def first_channel(group, C: tl.constexpr, CG: tl.constexpr):
    """The first channel of a group."""
    c = group * CG
    if C % CG != 0:
        c = tl.minimum(c, C - CG)
        if C % 8 == 0 and CG % 8 == 0:
            c = tl.multiple_of(c, 8)
    return c


COMPILED = tl.constexpr(not INTERPRETED)


@triton.jit
def widen(x):
    """Values in float32. The assembler takes three instructions for a pair of bfloat16; two are enough."""
    if COMPILED and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        return x.to(tl.float32)


@triton.jit
def append(values, value):
    """The tuple with ``value`` behind it. Triton's tuples take neither assignments nor stars."""
    return values + (value,)  # noqa: RUF005


@triton.jit
def replace(values, i: tl.constexpr, value):
    """The tuple with ``value`` at place ``i``."""
    return values[:i] + (value,) + values[i + 1 :]  # noqa: RUF005


@triton.jit
def zeros(COUNT: tl.constexpr, N: tl.constexpr):
    """A tuple of ``COUNT`` accumulators of N lanes."""
    values = ()
    for _ in tl.static_range(COUNT):
        values = append(values, tl.zeros([N], tl.float32))
    return values


def by_tap(weight: Tensor) -> Tensor:
    """(C, 1, k, k) -> (k * k, C) in float32."""
    return weight.detach().flatten(1).t().float().contiguous()


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton starts kernels on the current device: makes it the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def processors(x: Tensor) -> int:
    """Streaming multiprocessors of the tensor's device."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def shape_class(rows: int, width: int) -> int:
    """One number for shapes that share their tuned configuration: narrow maps by width, others by its power of two."""
    wide = width if width <= 16 else 1 << (width - 1).bit_length()
    return wide * 64 + max(rows, 1).bit_length()


# What a kernel is compiled with: its constants, num_warps, num_stages, maxnreg.
Config = dict[str, Any]


def compiling(warps: int, registers: int) -> Config:
    return dict(num_warps=warps) if INTERPRETED else dict(num_warps=warps, num_stages=1, maxnreg=registers)


TIMING = dict(warmup=5, rep=20)  # milliseconds for each configuration that is timed

_instead: list[Callable[..., Any]] = []


@contextlib.contextmanager
def instead_of_launching(launcher: Callable[..., Any]) -> Iterator[None]:
    """Gives ``launcher(kernel, programs, args, constants)`` what would be launched or timed meanwhile."""
    _instead.append(launcher)
    try:
        yield
    finally:
        _instead.pop()


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    if _instead:
        _instead[-1](kernel, programs, args, constants)
    else:
        kernel[(programs,)](*args, **constants)


class Choice:
    """The configuration of each kind of call, timed when it is first met.

    Triton's own tuner costs 10 us in every call, and it gives all configurations the same arguments.
    """

    def __init__(self) -> None:
        self._chosen: dict[Hashable, Config] = {}

    def run(self, kind: Hashable, candidates: Callable[[], list[Config]], start: Callable[[Config], Any]) -> None:
        """Launches by ``start`` in the configuration for this kind of call.

        ``candidates`` makes the configurations, the most promising first; a single one is not timed.
        """
        config = self._chosen.get(kind)
        if config is None:
            configs = candidates()
            if _instead:
                for config in configs:
                    start(config)
                return
            config = self._chosen[kind] = configs[0] if len(configs) == 1 else fastest(configs, start)
        start(config)


def fastest(configs: list[Config], start: Callable[[Config], Any]) -> Config:
    measure = triton.runtime.driver.active.get_benchmarker()
    times = [measure(functools.partial(start, config), return_mode="median", **TIMING) for config in configs]
    return configs[times.index(min(times))]
