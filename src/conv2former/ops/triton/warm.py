"""Compiles the kernels of a network ahead of its first step, in several processes.

Triton keeps what it has compiled in a folder (~/.triton/cache), from which later processes read it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from conv2former.ops.triton import Maps, lanes, large_kernel, three_rows


def operations(maps: Maps, *, batch: int, device: str) -> dict[str, Callable[[], Any]]:
    """The four operations of a block in training, without arguments; uninitialised but for what they take."""
    shape = batch, maps.side, maps.side
    given: dict[str, Any] = dict(dtype=maps.dtype, device=device)
    u, v, a, g = (torch.randn(*shape, maps.channels, **given) for _ in range(4))
    h, up = (torch.randn(*shape, maps.hidden, **given) for _ in range(2))
    weight = torch.randn(maps.channels, 1, maps.kernel_size, maps.kernel_size, device=device)
    small = torch.randn(maps.hidden, 1, 3, 3, device=device)
    bias, wide = torch.randn(maps.channels, device=device), torch.randn(maps.hidden, device=device)
    return {
        "modulation": lambda: large_kernel.modulation(u, v, weight, bias, True),
        "modulation backward": lambda: large_kernel.modulation_backward(g, u, v, a, weight),
        "mlp middle": lambda: three_rows.mlp_middle(h, small, wide),
        "mlp middle backward": lambda: three_rows.mlp_middle_backward(up, h, small, wide),
    }


def compile_operation(job: tuple[Maps, str]) -> int:
    """Compiles all that one operation would launch or time; returns the number of programs."""
    maps, name = job
    count = 0

    def compile_only(kernel: Any, _: int, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        nonlocal count
        kernel.warmup(*args, grid=(1,), **constants)
        count += 1

    with lanes.instead_of_launching(compile_only):
        operations(maps, batch=2, device="meta")[name]()
    return count


def warm(maps: Sequence[Maps], *, processes: int) -> int:
    """Compiles the programs of these maps for the current GPU; returns how many there are."""
    jobs = [(each, name) for each in dict.fromkeys(maps) for name in operations(each, batch=1, device="meta")]
    if processes == 1:
        return sum(map(compile_operation, jobs))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return sum(pool.map(compile_operation, jobs))
