"""The fused operations against PyTorch's, in turn, at the shapes of a model's stages, and the limit of each.

    python benchmarks/ops.py --model conv2former_t --batch 8
    python benchmarks/ops.py --device cuda --batch 128 --dtype bfloat16

The limit ("floor") of an operation is the longer of two times. Memory: the bytes that must be read and written once, at
the rate of this device's copy of a large tensor. Arithmetic: the multiply-adds of the depthwise convolution (three
times as many with the backward pass) at the rate of multiply-adds of vectors, which is measured on a CPU by float32
matrix products and taken from the clock and the number of cores on an NVIDIA GPU: there matrix products run on other
units. GELU and its slope are not counted. ``floor`` in the table is the fraction of that limit that the fused form
reaches. Medians; the spread is that of the middle half of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import conv2former  # noqa: F401  registers the names
from conv2former import ops
from conv2former.ops import backend
from conv2former.tools.benchmark.peak import peak_rate
from conv2former.tools.doctor import maps

CORES_PER_SM = 128  # float32 multiply-adds a clock of one multiprocessor, compute capability 8.0 (64) apart


@dataclass
class Row:
    """One operation at one shape: milliseconds of one call, the limit, and what was reached."""

    operation: str
    shape: tuple[int, ...]
    kernel: int
    reference_ms: float
    fused_ms: float
    spread: float
    floor_ms: float
    limited_by: str

    @property
    def ratio(self) -> float:
        """PyTorch's time over ours."""
        return self.reference_ms / self.fused_ms

    @property
    def reached(self) -> float:
        """The limit over our time."""
        return self.floor_ms / self.fused_ms


def clock(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turn(steps: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Times of each, one call a round; the first two rounds warm up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 2):
        for name, step in steps.items():
            seconds = clock(step, device)
            if i >= 2:
                times[name].append(seconds)
    return times


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a copy, read and written bytes together."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**25)
    source = source.to(device)
    target = torch.empty_like(source)
    best = min(clock(lambda: target.copy_(source), device) for _ in range(8))
    return 2 * source.numel() * 4 / best


def multiply_rate(device: torch.device) -> float:
    """Multiply-adds of float32 vectors a second."""
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        cores = 64 if (facts.major, facts.minor) == (8, 0) else CORES_PER_SM
        return facts.multi_processor_count * cores * clock_rate(facts)
    return peak_rate(device, torch.float32)


def clock_rate(facts: Any) -> float:
    """Hz of the processors at their fastest; some releases of PyTorch do not say it."""
    if kilohertz := getattr(facts, "clock_rate", None):
        return kilohertz * 1e3
    command = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]) * 1e6


def case(operation: str, shape: tuple[int, ...], kernel: int, dtype: torch.dtype, device: torch.device) -> tuple:
    """The function, its reference and their inputs."""
    channels = shape[-1]
    maps = 2 if operation.startswith("modulation") else 1
    inputs = [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(maps)]
    weight = (torch.randn(channels, 1, kernel, kernel, device=device) / kernel).requires_grad_()
    bias = torch.zeros(channels, device=device, requires_grad=True)
    pair = (ops.modulation, ops.modulation_reference) if maps == 2 else (ops.mlp_middle, ops.mlp_middle_reference)
    return *pair, [*inputs, weight, bias]


def measure(
    operation: str, shape: tuple[int, ...], kernel: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> tuple[float, float, float]:
    """Milliseconds of the reference and of the fused form, and the spread of the latter."""
    fused, reference, inputs = case(operation, shape, kernel, dtype, device)
    g = torch.randn(shape, device=device).to(dtype)

    def step(function: Callable[..., Tensor], given: list[Tensor]) -> Callable[[], object]:
        if operation.endswith("backward"):
            return lambda: torch.autograd.grad(function(*given), given, g)

        def forward() -> None:
            with torch.no_grad():
                function(*given)

        return forward

    # PyTorch's convolution wants one dtype, as autocast would give it
    same = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    times = in_turn({"reference": step(reference, same), "fused": step(fused, inputs)}, device, rounds)
    quarters = statistics.quantiles(times["fused"], n=4)
    median = {name: statistics.median(values) for name, values in times.items()}
    return 1e3 * median["reference"], 1e3 * median["fused"], (quarters[2] - quarters[0]) / median["fused"]


def floors(operation: str, shape: tuple[int, ...], kernel: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that must move, and multiply-adds."""
    elements = torch.Size(shape).numel()
    backward = operation.endswith("backward")
    # forward: U, V in and Z out (A too when a backward pass follows); backward: G, U, V, A in and two gradients out
    tensors = (4 + 6 if backward else 3) if operation.startswith("modulation") else (2 + 3 if backward else 2)
    height, width = shape[1:3]
    pad = kernel // 2
    taps = sum(min(y + pad, height - 1) - max(y - pad, 0) + 1 for y in range(height))
    taps *= sum(min(x + pad, width - 1) - max(x - pad, 0) + 1 for x in range(width))
    multiplies = elements // (height * width) * taps  # those of padding are not needed
    return tensors * elements * dtype.itemsize, multiplies * (3 if backward else 1)


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="conv2former_t", choices=timm.list_models("conv2former_*"), metavar="NAME")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=15, help="two or more")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: two or more, or there is no spread")
    if options.threads:
        torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    with device:
        trial = torch.empty(1, 1, 1, 32, dtype=dtype), torch.empty(32, 1, 3, 3), torch.empty(32)
    if not backend.fused("modulation", *trial):
        raise SystemExit(f"error: nothing is fused for {options.dtype} on {device}: PyTorch computes it")
    torch.manual_seed(0)
    bytes_rate, multiplies_rate = copy_rate(device), multiply_rate(device)
    print(
        f"{options.model}, batch {options.batch}, {options.size} px, {options.dtype} on {device}, operations by "
        f"{ops.backend_for(device)}; copy {bytes_rate / 1e9:.1f} GB/s, multiply-adds {multiplies_rate / 1e9:.0f} G/s"
    )
    print(
        f"{'operation':22}{'map':>18}{'k':>4}{'PyTorch':>11}{'fused':>10}{'spread':>8}{'ratio':>7}{'floor':>7}  limit"
    )
    rows = []
    for stage in maps(options.model, size=options.size, dtype=dtype):
        shape = options.batch, stage.side, stage.side, stage.channels
        for operation, of, k in (
            ("modulation", shape, stage.kernel_size),
            ("modulation backward", shape, stage.kernel_size),
            ("mlp middle", (*shape[:3], stage.hidden), 3),
            ("mlp middle backward", (*shape[:3], stage.hidden), 3),
        ):
            moved, multiplies = floors(operation, of, k, dtype)
            memory, arithmetic = 1e3 * moved / bytes_rate, 1e3 * multiplies / multiplies_rate
            times = measure(operation, of, k, dtype, device, options.rounds)
            limit = "memory" if memory > arithmetic else "arithmetic"
            row = Row(operation, of, k, *times, max(memory, arithmetic), limit)
            rows.append(row)
            print(
                f"{operation:22}{'x'.join(map(str, of)):>18}{k:>4}{row.reference_ms:>8.2f} ms{row.fused_ms:>7.2f} ms"
                f"{row.spread:>8.0%}{row.ratio:>7.2f}{row.reached:>7.0%}  {limit}",
                flush=True,
            )
    if options.json:
        facts = dict(copy_bytes_per_second=bytes_rate, multiply_adds_per_second=multiplies_rate)
        text = json.dumps(vars(options) | facts | dict(rows=[asdict(row) for row in rows]), default=str, indent=2)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
