"""Second call: every kernel at every stage of Conv2Former-T in every configuration that is timed. 250 seconds.

A row for each: median microseconds by the GPU's events, GB/s, multiply-adds, and the fraction of the floor, which is
the longer of two times. Memory: the bytes that must move once, at the rate of a copy of a large tensor here.
Arithmetic: the instructions that cannot be left out, one a clock and lane. Small maps stay in the GPU's cache from one
launch to the next and may be faster than the floor of memory. Beside them PyTorch's own depthwise convolution in both
layouts. What time is left goes to tiles that the counting left out.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Archive, microseconds, parser
from torch import nn

from conv2former.ops.triton import Maps, lanes, large_kernel, three_rows
from conv2former.ops.triton.warm import operations
from conv2former.tools.doctor import maps

sys.path.insert(0, str(Path(__file__).parents[1]))
from ops import copy_rate, multiply_rate
from triton_build import use_of

BATCH = 128
# of a kernel's use: maps that are read or written, instructions for each element beside the taps of the convolution
WORK = {
    "pad": (2, 20),
    "pad backward": (7, 25),
    "forward": (4, 0),
    "input gradient": (3, 20),
    "weight gradient": (2, 0),
    "MLP forward": (2, 34),
    "MLP inner": (3, 50),
    "MLP input": (4, 31),
}
METRICS = (
    "sm__throughput.avg.pct_of_peak_sustained_elapsed,dram__throughput.avg.pct_of_peak_sustained_elapsed,"
    "sm__warps_active.avg.pct_of_peak_sustained_active,sm__inst_executed.avg.per_cycle_active,gpu__time_duration.sum"
)


def needed_taps(kernel: int, side: int) -> float:
    """Multiply-adds for an element of a square map, on average: those of the padding are not needed."""
    pad = kernel // 2
    return (sum(min(y + pad, side - 1) - max(y - pad, 0) + 1 for y in range(side)) / side) ** 2


class Timer:
    """Launches what is given to it and writes a row about it.

    Args:
        archive: Of the rows.
        rates: Bytes, and instructions of a lane, a second.
        batch: Images.
    """

    def __init__(self, archive: Archive, rates: tuple[float, float], batch: int) -> None:
        self._archive, self._rates, self._seen, self.batch = archive, rates, set(), batch
        self.maps: Maps | None = None

    def __call__(self, kernel: Any, programs: int, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """Takes the place of ``lanes.launch``: what follows finds the kernel's output in its place."""

        def call() -> None:
            kernel[(programs,)](*args, **constants)

        assert self.maps is not None
        use, maps = use_of(kernel.__name__, constants), self.maps
        shown = {name: value for name, value in constants.items() if name in ("T", "N", "CG", "SINGLE", "num_warps")}
        key = use, maps, tuple(shown.items())
        if key in self._seen:
            return call()
        self._seen.add(key)
        if self._archive.left() < 5:
            return None
        try:
            took, spread = microseconds(call)
        except Exception as error:  # a configuration that the GPU refuses is a finding
            self._archive.add(kernel=use, maps=maps, configuration=shown, error=str(error)[:300])
            return None
        channels = constants["C"]
        elements = self.batch * maps.side**2 * channels
        tensors, beside = WORK[use]
        taps = 0.0 if "pad" in use else needed_taps(3 if "MLP" in use else maps.kernel_size, maps.side)
        taps *= 2 if use == "MLP inner" else 1
        moved = tensors * elements * maps.dtype.itemsize
        floors = moved / self._rates[0], elements * (taps + beside) / self._rates[1]
        self._archive.add(
            kernel=use, map=f"{maps.side}x{maps.side}x{channels}", k=maps.kernel_size, configuration=shown,
            programs=programs, us=round(took, 2), spread_us=round(spread, 2), gb_per_s=round(moved / took / 1e3, 1),
            tfma_per_s=round(elements * taps / took / 1e6, 2), of_floor=round(1e6 * max(floors) / took, 3),
            limit="memory" if floors[0] > floors[1] else "arithmetic",
        )  # fmt: skip
        return None


def ours(timer: Timer, stages: list[Maps], device: str) -> None:
    """All kernels of all stages."""
    for stage in stages:
        timer.maps = stage
        with lanes.instead_of_launching(timer):
            for operation in operations(stage, batch=timer.batch, device=device).values():
                operation()


def pytorchs(archive: Archive, stages: list[Maps], device: str, batch: int) -> None:
    """PyTorch's own depthwise convolution, forward and with both gradients, in both layouts."""
    torch.backends.cudnn.benchmark = True
    for stage in stages:
        for channels, size in ((stage.channels, stage.kernel_size), (stage.hidden, 3)):
            for layout in (torch.contiguous_format, torch.channels_last):
                if not archive.has_time(5, f"PyTorch's convolution of {channels} channels"):
                    return
                conv = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels)
                conv = conv.to(device, stage.dtype, memory_format=layout)
                x = torch.randn(batch, channels, stage.side, stage.side, device=device, dtype=stage.dtype)
                x = x.to(memory_format=layout).requires_grad_()
                out = conv(x)
                g = torch.randn_like(out)
                given = x, conv.weight, conv.bias

                def backward(out: Any = out, given: Any = given, g: Any = g) -> Any:
                    return torch.autograd.grad(out, given, g, retain_graph=True)

                row: dict[str, Any] = dict(
                    kernel="PyTorch's convolution", map=f"{stage.side}x{stage.side}x{channels}", k=size,
                    layout=str(layout).removeprefix("torch."),
                )  # fmt: skip
                forward: Callable[[], Any] = lambda conv=conv, x=x: conv(x)  # noqa: E731
                few = 8 if device == "cuda" else 2
                row["us"] = round(microseconds(forward, repeats=few, warm_up=2)[0], 1)
                row["backward_us"] = round(microseconds(backward, repeats=few, warm_up=2)[0], 1)
                archive.add(**row)


def products(archive: Archive, stages: list[Maps], device: str, batch: int) -> None:
    """W1 and W2 as two products and as one, forward and backward under autocast: is joining them worth its code?"""
    for stage in stages:
        if not archive.has_time(5, "W1 and W2"):
            return
        x = torch.randn(batch, stage.side, stage.side, stage.channels, device=device, requires_grad=True)
        w1, w2 = (nn.Linear(stage.channels, stage.channels, device=device) for _ in range(2))
        g = torch.randn(*x.shape, device=device, dtype=stage.dtype)

        def two(x: Any = x, w1: Any = w1, w2: Any = w2) -> tuple[Any, Any]:
            return w1(x), w2(x)

        def one(x: Any = x, w1: Any = w1, w2: Any = w2) -> Any:
            weight, bias = torch.cat((w1.weight, w2.weight)), torch.cat((w1.bias, w2.bias))
            return nn.functional.linear(x, weight, bias).chunk(2, -1)

        row: dict[str, Any] = dict(what="W1 and W2", map=f"{stage.side}x{stage.side}x{stage.channels}")
        for name, form in (("two_us", two), ("one_us", one)):

            def step(form: Callable[[], Any] = form, x: Any = x, w1: Any = w1, w2: Any = w2, g: Any = g) -> None:
                # in a network x is no leaf, and its cast is not kept from one layer to the next
                with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
                    parts = form()
                torch.autograd.grad(parts, (x, w1.weight, w1.bias, w2.weight, w2.bias), (g, g))

            row[name] = round(microseconds(step, repeats=5, warm_up=3)[0], 1)
        archive.add(**row)


def all_convolutions(kernel: int, channels: int, width: int, itemsize: int) -> list[lanes.Config]:
    """Every tile of the convolution that fits, in the place of ``large_kernel.candidates``."""
    every = [(tile, count, 4) for count in large_kernel.LANES for tile in large_kernel.TILES]
    found = large_kernel.fitting(every, kernel=kernel, width=width, itemsize=itemsize, registers=112)
    return [
        dict(T=t, N=n, CG=lanes.channel_group(channels, n), SINGLE=width <= t, **lanes.compiling(warps, 168))
        for t, n, warps in found
    ]


def all_marches(inner: int, stage: str, width: int, exact: bool) -> list[lanes.Config]:
    """Every tile of the MLP's middle, but one of its inner stage, in the place of ``three_rows.candidates``."""
    tiles = [inner] if stage == "inner" else three_rows.TILES
    return [dict(T=t, SINGLE=width <= t, **lanes.compiling(three_rows.WARPS, 168)) for t in tiles]


def every_tile(archive: Archive, timer: Timer, stages: list[Maps], device: str) -> None:
    """Tiles of the convolution and of the MLP that are not among those that are timed at first use."""
    large_kernel.candidates = all_convolutions
    for stage in stages:
        for inner in [tile for tile in three_rows.TILES if tile <= three_rows.WIDEST_INNER]:
            if not archive.has_time(20, f"all tiles at {stage.side} x {stage.side}"):
                return
            three_rows.candidates = functools.partial(all_marches, inner)
            ours(timer, [stage], device)


def counters(archive: Archive) -> None:
    """What the hardware counts in the largest kernels, by ncu."""
    if not shutil.which("ncu") or not archive.has_time(45, "ncu"):
        return
    ours = "regex:^(pad|pad_backward|convolution|weight_gradient|three_rows)_kernel$"
    command = ["ncu", "--clock-control", "none", "--metrics", METRICS, "--csv", "--kernel-name", ours]
    command += [sys.executable, __file__, "--once", "--out", "unused"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            text, errors = process.communicate(timeout=40)
            archive.add(what="ncu", text=text[-40000:], errors=errors[-500:])
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # what ncu has started, too
            archive.add(what="ncu", error="it took more than 40 s")


def main() -> None:
    """Measures."""
    options = parser(__doc__)
    options.add_argument("--once", action="store_true", help="only launch the kernels of the first stage, for ncu")
    options = options.parse_args()
    device = "cpu" if options.rehearse else "cuda"
    stages = maps("conv2former_t", size=224, dtype=torch.bfloat16)
    if options.once:
        with lanes.instead_of_launching(lambda kernel, programs, args, given: kernel[(programs,)](*args, **given)):
            for operation in operations(stages[0], batch=BATCH, device=device).values():
                operation()
        torch.cuda.synchronize()
        return
    archive = Archive("kernels", options)
    if options.rehearse:
        import no_launch

        no_launch.activate()
        rates, batch = (1e10, 1e10), 1
    else:
        batch = BATCH
        rates = copy_rate(torch.device(device)), multiply_rate(torch.device(device))
    archive.add(what="rates", bytes_per_s=rates[0], instructions_per_s=rates[1])
    timer = Timer(archive, rates, batch)
    ours(timer, stages, device)
    pytorchs(archive, stages[-1:] if options.rehearse else stages, device, batch)
    products(archive, stages, device, batch)
    counters(archive)
    every_tile(archive, timer, stages[-1:] if options.rehearse else stages, device)


if __name__ == "__main__":
    main()
