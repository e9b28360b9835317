"""Compiles the Triton kernels ahead of time for GPUs that are not here, and shows what each program takes.

    python benchmarks/triton_build.py [--json FILE] [--target 90] [--kernel-size 11]

Every kernel is compiled in every configuration that would be launched or timed, for the four stages of Conv2Former-T at
224 pixels. The table names registers a thread, shared memory, bytes that the compiler spilled from registers, warps
that fit on a processor by registers, and the share of multiply-adds among the instructions of the longest loop, which
bounds the fraction of the peak that the loop can reach. The exit status is 1 if anything spills.

Needs no GPU: the assemblers and disassemblers come with Triton. All of it takes some ten minutes on two idle cores.
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

from conv2former.ops.triton import lanes
from conv2former.ops.triton.warm import operations
from conv2former.tools.doctor import maps

TARGETS = (80, 89, 90, 100)
KERNEL_SIZES = (3, 7, 11, 21)
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
BATCH = 128
REGISTERS = 65536  # of a processor
COMPILING = ("num_warps", "num_stages", "maxnreg")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclasses.dataclass(frozen=True)
class Program:
    """One kernel in one configuration.

    Attributes:
        module: Where the kernel is.
        kernel: Its name.
        dtype: Of the maps.
        signature: Types of its arguments.
        constants: Values of its constants.
        compiling: Options of the compiler.
    """

    module: str
    kernel: str
    dtype: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    compiling: tuple[tuple[str, Any], ...]

    @property
    def what(self) -> str:
        """Which of the kernel's uses."""
        return use_of(self.kernel, dict(self.constants))

    @property
    def text(self) -> str:
        """The configuration in words."""
        shown = [f"{name}={value}" for name, value in self.constants if name in ("C", "K", "CG", "N", "T", "SINGLE")]
        return " ".join([*shown, f"warps={dict(self.compiling)['num_warps']}"])


def use_of(kernel: str, constants: dict[str, Any]) -> str:
    """Which of a kernel's uses a launch is."""
    if kernel == "convolution_kernel":
        return "input gradient" if constants["BACKWARD"] else "forward"
    if kernel == "three_rows_kernel":
        return f"MLP {constants['STAGE']}"
    return kernel.removesuffix("_kernel").replace("_", " ")


def programs(kernel_sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Iterator[Program]:
    """All that a training step on one processor would launch or time."""
    found: list[Program] = []

    def note(kernel: Any, _: int, args: tuple[Any, ...], settings: dict[str, Any]) -> None:
        names = [parameter.name for parameter in kernel.params]
        kinds = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
        signature = [
            (name, kinds[x.dtype] if torch.is_tensor(x) else "i32") for name, x in zip(names, args, strict=False)
        ]
        constants = [(name, value) for name, value in settings.items() if name not in COMPILING]
        compiling = dict(num_warps=4) | {name: value for name, value in settings.items() if name in COMPILING}
        dtype = kinds[args[0].dtype].strip("*")
        found.append(
            Program(
                kernel.fn.__module__,
                kernel.__name__,
                dtype,
                tuple(signature),
                tuple(constants),
                tuple(compiling.items()),
            )
        )

    stages = [stage for dtype in dtypes for stage in maps("conv2former_t", size=224, dtype=dtype)]
    with lanes.instead_of_launching(note):
        for stage, size in itertools.product(stages, kernel_sizes):
            given = dataclasses.replace(stage, kernel_size=size)
            for operation in operations(given, batch=BATCH, device="meta").values():
                operation()
    yield from dict.fromkeys(found)


def build(job: tuple[Program, int]) -> dict[str, Any]:
    """Compiles a program for a target; its row of the table."""
    program, target = job
    function = getattr(sys.modules[program.module], program.kernel)
    signature = dict(program.signature) | {name: "constexpr" for name, _ in program.constants}
    pointers = [index for index, (_, kind) in enumerate(program.signature) if kind.startswith("*")]
    source = ASTSource(
        function, signature, dict(program.constants), {(i,): [["tt.divisibility", 16]] for i in pointers}
    )
    options = dict(program.compiling)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
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
    warps = options["num_warps"]
    return {
        "kernel": program.what,
        "dtype": program.dtype,
        "configuration": program.text,
        "target": f"sm_{target}",
        "registers": taken["REG"],
        "shared": compiled.metadata.shared,
        "spilled": taken["STACK"] + taken["LOCAL"],
        "warps": min(64, REGISTERS // (held * warps) * warps),
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
