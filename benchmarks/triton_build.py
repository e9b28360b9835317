"""Compiles the Triton kernels ahead of time for GPUs that are not here, and shows what each program takes.

    python benchmarks/triton_build.py [--json FILE] [--target 90] [--kernel-size 11]

Every kernel is compiled in every configuration that the autotuner would time, for two shapes of Conv2Former-T at 224
pixels: 72 channels on 56 x 56 (several tiles a row) and 288 on 14 x 14 (one tile). The table names registers a thread,
shared memory, bytes that the compiler spilled from registers, warps that fit on a processor by registers, and the share
of multiply-adds among the instructions of the longest loop, which bounds the fraction of the peak that the loop can
reach. The exit status is 1 if anything spills.

Needs no GPU: the assemblers and disassemblers come with Triton. All of it takes some six minutes on two idle cores.
On sm_100 an instruction may hold two multiply-adds, so that the share there is of instructions alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from conv2former.ops.triton import large_kernel, three_rows
from conv2former.ops.triton.lanes import channel_group

TARGETS = (80, 90, 100)
KERNEL_SIZES = (3, 7, 11, 21)
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
SHAPES = ((72, 56), (288, 14))  # channels, width
REGISTERS = 65536  # of a processor
POINTERS = {"taps": "*fp32", "partial": "*fp32", "bias": "*fp32"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclasses.dataclass(frozen=True)
class Program:
    """One kernel in one configuration."""

    module: str
    kernel: str
    what: str  # which of the kernel's uses
    dtype: str
    constants: tuple[tuple[str, Any], ...]
    warps: int
    limit: int | None  # of registers

    @property
    def text(self) -> str:
        """The configuration in words."""
        shown = [f"{name}={value}" for name, value in self.constants if name in ("C", "K", "CG", "N", "T", "SINGLE")]
        return " ".join([*shown, f"warps={self.warps}"])


def jitted(kernel: Any) -> Any:
    """The function below the autotuner and the heuristics."""
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    return kernel


def programs(kernel_sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Iterator[Program]:
    """All that the autotuner would compile, and the kernels that it does not tune."""
    for dtype, (channels, width) in itertools.product(dtypes, SHAPES):
        shape = {"C": channels, "W": width, "source": torch.empty(0, dtype=dtype)}
        exact = dtype == torch.float32
        for kernel_size in kernel_sizes:
            sizes = shape | {"K": kernel_size}
            for backward in (False, True):
                extra = {"S": channels, "BACKWARD": backward, "KEEP": not backward, "EXACT": exact}
                what = "input gradient" if backward else "forward"
                yield from tuned(large_kernel, "convolution_kernel", what, sizes | extra)
            lanes, group = large_kernel.weight_lanes(channels, kernel_size)
            yield from tuned(
                large_kernel, "weight_gradient_kernel", "weight gradient", sizes | {"CG": group, "N": lanes}
            )
        shape["C"] = hidden = 4 * channels
        group = channel_group(hidden, three_rows.LANES)
        for stage in ("forward", "inner", "input"):
            extra = {"S": hidden, "SG": hidden, "SU": hidden, "STAGE": stage, "EXACT": exact}
            extra |= {"CG": group, "N": three_rows.LANES}
            yield from tuned(three_rows, "three_rows_kernel", f"MLP {stage}", shape | extra)
        shape["C"] = channels
        strides = {"S": channels, "SG": channels, "SU": channels, "SV": channels}
        lanes = large_kernel.pad_lanes(dtype)
        extra = {"K": 11, "CG": channel_group(channels, lanes), "N": lanes, "EXACT": exact}
        yield plain(large_kernel, "pad_kernel", "pad", shape | strides | extra)
        yield plain(large_kernel, "pad_backward_kernel", "pad, backward", shape | strides | extra)


def tuned(module: Any, name: str, what: str, args: dict[str, Any]) -> Iterator[Program]:
    """One program for each configuration that is left after pruning."""
    tuner = getattr(module, name)
    for config in tuner.early_config_prune(tuner.configs, args):
        settings = args | config.kwargs
        for constant, rule in tuner.fn.values.items():
            settings[constant] = rule(settings)
        yield plain(module, name, what, settings, config.num_warps, config.maxnreg)


def plain(module: Any, name: str, what: str, args: dict[str, Any], warps: int = 4, limit: int | None = None) -> Program:
    """A program from all of its constants."""
    parameters = jitted(getattr(module, name)).params
    constants = tuple((p.name, args[p.name]) for p in parameters if p.is_constexpr)
    return Program(module.__name__, name, what, DTYPES[args["source"].dtype], constants, warps, limit)


def build(job: tuple[Program, int]) -> dict[str, Any]:
    """Compiles a program for a target; its row of the table."""
    program, target = job
    function = jitted(getattr(sys.modules[program.module], program.kernel))
    constants = dict(program.constants)
    signature, pointers = {}, []
    for index, parameter in enumerate(function.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
        elif parameter.do_not_specialize:
            signature[parameter.name] = "i32"
        else:
            signature[parameter.name] = POINTERS.get(parameter.name, f"*{program.dtype}")
            pointers.append(index)
    source = ASTSource(function, signature, constants, {(i,): [["tt.divisibility", 16]] for i in pointers})
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": program.warps, "num_stages": 1, "maxnreg": program.limit},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    taken = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    multiply_adds, instructions = longest_loop(code)
    held = -(-taken["REG"] // 8) * 8 * 32
    return {
        "kernel": program.what,
        "dtype": program.dtype,
        "configuration": program.text,
        "target": f"sm_{target}",
        "registers": taken["REG"],
        "shared": compiled.metadata.shared,
        "spilled": taken["STACK"] + taken["LOCAL"],
        "warps": min(64, REGISTERS // (held * program.warps) * program.warps),
        "multiply_adds": multiply_adds,
        "instructions": instructions,
    }


def longest_loop(code: str) -> tuple[int, int]:
    """Multiply-adds and instructions between the farthest backward jump's target and the jump, in nvdisasm's text.

    An outer loop contains the inner one: of the loops that hold no other, the longest.
    """
    labels: dict[str, int] = {}
    lines: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(instruction[1])
            jump = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction[1])
            if jump and labels.get(jump[1], len(lines)) < len(lines) - 1:
                loops.append((labels[jump[1]], len(lines)))
    inner = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    if not inner:
        return 0, 0
    begin, end = max(inner, key=lambda loop: loop[1] - loop[0])
    return sum("FFMA" in line for line in lines[begin:end]), end - begin


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in columns."""
    columns = ("kernel", "dtype", "configuration", "target", "registers", "shared", "spilled", "warps")
    cells = [[*columns, "multiply-adds of loop"]]
    for row in rows:
        length = row["instructions"]
        share = f"{row['multiply_adds'] / length:.0%} of {length}" if length else "no loop"
        cells.append([*(str(row[name]) for name in columns), share])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join(lines)


def main() -> int:
    """Parses the command line, compiles, prints; 1 if a program spills."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file too")
    parser.add_argument("--target", type=int, nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--kernel-size", type=int, nargs="+", default=KERNEL_SIZES)
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    options = parser.parse_args()
    wanted = dict.fromkeys(programs(tuple(options.kernel_size), tuple(DTYPES)))
    jobs = [(program, target) for program in wanted for target in options.target]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("fork")) as pool:
        rows = list(pool.map(build, jobs))
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    spilling = [row for row in rows if row["spilled"]]
    print(f"{len(rows)} programs, {len(spilling)} with spills")
    return int(bool(spilling))


if __name__ == "__main__":
    sys.exit(main())
