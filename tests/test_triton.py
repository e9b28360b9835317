"""The Triton kernels against float64: under Triton's interpreter, compiled for GPUs that are not here, and on a GPU.

The rule: a kernel errs at most twice as much as plain PyTorch in the same dtype. The interpreter has to be chosen
before Triton is imported; so this file is also a program that measures cases which it reads from its standard input.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conv2former.ops import mlp_middle_reference, modulation_reference
from conv2former.ops import triton as kernels

FLOOR = 1e-6  # of the relative error: what the order of a float32 sum changes
# The interpreter cuts bfloat16 off instead of rounding to nearest: twice the error in each rounding.
INTERPRETED_FACTOR = {"float32": 2.0, "float16": 2.0, "bfloat16": 4.0}


@dataclasses.dataclass(frozen=True)
class Case:
    """An operation on tensors of (B, H, W, C)."""

    operation: str  # 'modulation' or 'mlp'
    shape: tuple[int, int, int, int]
    kernel: int = 3
    dtype: str = "float32"
    layout: str = "plain"  # or 'halves' of one tensor (B, H, W, 2C), or 'channels_first'
    tile: int = 4  # of the kernels, under the interpreter

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.operation}{self.kernel}-{shape}-{self.dtype}-{self.layout}-tile{self.tile}"


def inputs(case: Case, device: str) -> tuple[Tensor, list[Tensor]]:
    """The output's gradient, and the inputs that have gradients."""
    torch.manual_seed(0)
    batch, height, width, channels = case.shape
    dtype = getattr(torch, case.dtype)
    if case.layout == "halves":
        both = torch.randn(batch, height, width, 2 * channels, dtype=torch.float32)
        first, second = both.to(device, dtype).split(channels, -1)
    elif case.layout == "channels_first":
        first, second = (
            torch.randn(batch, channels, height, width).to(device, dtype).permute(0, 2, 3, 1) for _ in range(2)
        )
    else:
        first, second = (torch.randn(case.shape).to(device, dtype) for _ in range(2))
    g = torch.randn(case.shape).to(device, dtype)
    weight = (torch.randn(channels, 1, case.kernel, case.kernel) / case.kernel).to(device)
    bias = torch.randn(channels, device="cpu").to(device)
    return g, [first, second, weight, bias] if case.operation == "modulation" else [first, weight, bias]


def fused(case: Case, g: Tensor, given: list[Any]) -> list[Tensor]:
    """The kernels' output and gradients."""
    if case.operation == "mlp":
        return [kernels.mlp_middle(*given), *kernels.mlp_middle_backward(g, *given)]
    z, a = kernels.modulation(*given, keep=True)
    alone, nothing = kernels.modulation(*given, keep=False)
    assert torch.equal(z, alone) and nothing.shape == (0,)
    assert z.is_contiguous() and a.is_contiguous() and z.dtype == a.dtype == given[0].dtype
    return [z, *kernels.modulation_backward(g, given[0], given[1], a, given[2])]


def plain(case: Case, g: Tensor, given: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Plain PyTorch's output and gradients, all of it in one dtype."""
    function: Any = {"modulation": modulation_reference, "mlp": mlp_middle_reference}[case.operation]
    leaves = [x.detach().to(dtype).requires_grad_() for x in given]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, g.to(dtype))]


def bits(case: Case, device: str) -> list[str]:
    """Digests of what comes from kernels whose tile is chosen by time: the output, the input's gradient."""
    out, first, *_ = fused(case, *inputs(case, device))
    return [hashlib.sha256(x.view(torch.uint8).cpu().numpy().tobytes()).hexdigest() for x in (out, first)]


def measure(case: Case, device: str) -> dict[str, tuple[float, float]]:
    """Relative errors against float64, of the kernel and of plain PyTorch, by tensor."""
    g, given = inputs(case, device)
    ours = fused(case, g, given)
    again = fused(case, g, given) if device == "cuda" else ours
    theirs = plain(case, g, given, getattr(torch, case.dtype))
    exact = plain(case, g, given, torch.float64)
    names = ["output", *(["first", "second", "third", "fourth"][: len(given)])]
    errors = {}
    for name, our, same, their, right, source in zip(names, ours, again, theirs, exact, [g, *given], strict=True):
        assert torch.equal(our, same), f"{name} differs from one run to the next"
        assert our.shape == right.shape and our.dtype == source.dtype, name
        size = right.norm().item() or 1.0
        errors[name] = ((our.double() - right).norm().item() / size, (their.double() - right).norm().item() / size)
    return errors


def check(errors: dict[str, Any], factor: float) -> None:
    """Applies the rule."""
    for name, (ours, theirs) in errors.items():
        assert ours <= factor * theirs + FLOOR, f"{name}: {ours:.2e}, PyTorch {theirs:.2e}"


SMALL = [
    Case("modulation", (1, 5, 6, 19), 3),
    Case("modulation", (1, 2, 3, 5), 21),
    Case("modulation", (1, 3, 9, 40), 11, "bfloat16", "halves"),
    Case("modulation", (3, 1, 1, 5), 11, "float16"),
    Case("modulation", (1, 1, 9, 19), 5, "bfloat16", "halves"),
    Case("modulation", (1, 2, 1, 136), 3),  # the groups of channels overlap
    Case("modulation", (2, 3, 2, 5), 7, "float32", "channels_first"),
    Case("mlp", (2, 6, 5, 72), dtype="bfloat16"),
    Case("mlp", (1, 7, 9, 19), dtype="float16", layout="channels_first"),
    Case("mlp", (2, 20, 3, 5)),
    Case("mlp", (1, 1, 1, 72), layout="halves"),
    Case("mlp", (1, 2, 1, 136)),
]
MORE = [
    *(Case("modulation", (1, 5, 6, 19), kernel) for kernel in (5, 7, 9, 15, 21)),
    Case("modulation", (2, 5, 9, 72), 11, "bfloat16", "halves"),
    Case("modulation", (1, 7, 7, 24), 11),
    Case("modulation", (2, 6, 5, 72), 11, "float16"),
    Case("modulation", (1, 7, 7, 5), 11, "bfloat16", "channels_first"),
]
EMPTY = [Case(operation, (0, 4, 5, 19)) for operation in ("modulation", "mlp")]
MODULATION_TILES = (4, 7, 8, 10, 12, 14, 16)
MLP_TILES = (4, 5, 6, 7, 8, 10, 12, 14)
TILED = [
    Case(operation, (1, 3, tile + more, 9), kernel, tile=tile)
    for operation, kernel, tiles in (("modulation", 11, MODULATION_TILES), ("mlp", 3, MLP_TILES))
    for tile in tiles
    for more in (1, 0, -1)  # columns beyond the tile, or beside the map
]
FEW = [case for case in TILED[::3] if case.tile == 7 or (case.operation, case.tile) == ("mlp", 14)]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Callable[..., Any]]:
    """A function that runs ``measure`` or ``bits`` of a case under Triton's interpreter, in one process for all."""
    pytest.importorskip("triton")
    command = [sys.executable, __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        questions, answers = process.stdin, process.stdout

        def ask(case: Case, what: str = "measure") -> Any:
            print(json.dumps([what, dataclasses.asdict(case)]), file=questions, flush=True)
            line = answers.readline()
            assert line, "the interpreting process has ended; its error is on the standard error stream"
            return json.loads(line)

        yield ask
        questions.close()


@pytest.mark.parametrize(
    "case",
    [
        *SMALL, *EMPTY, *FEW,
        *(pytest.param(case, marks=pytest.mark.slow) for case in [*MORE, *TILED] if case not in FEW),
    ],
    ids=str,
)  # fmt: skip
def test_interpreted(case: Case, interpreter: Callable[..., Any]) -> None:
    check(interpreter(case), INTERPRETED_FACTOR[case.dtype])


@pytest.mark.parametrize(
    ("operation", "tiles"),
    [
        ("modulation", MODULATION_TILES[::3]), ("mlp", MLP_TILES[::3]),
        pytest.param("modulation", MODULATION_TILES, marks=pytest.mark.slow),
        pytest.param("mlp", MLP_TILES, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_the_tile_does_not_change_the_bits(
    operation: str, tiles: tuple[int, ...], interpreter: Callable[..., Any]
) -> None:
    """What is fastest today may not be tomorrow: a run computes the same with both."""
    kernel = 5 if operation == "modulation" else 3
    cases = [Case(operation, (1, 3, 9, 5), kernel, "float16", tile=tile) for tile in tiles]
    assert len({tuple(interpreter(case, "bits")) for case in cases}) == 1


def test_every_tile_is_tried() -> None:
    pytest.importorskip("triton")
    from conv2former.ops.triton import large_kernel, three_rows

    assert large_kernel.TILES == MODULATION_TILES and three_rows.TILES == MLP_TILES


@pytest.mark.slow
def test_nothing_is_imported_before_it_is_used() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from conv2former.ops import triton
assert not any(name.startswith("conv2former.ops.triton.") for name in sys.modules)
assert not torch.cuda.is_initialized()
assert triton.unusable(torch.device("cuda")) == "the package triton is not installed"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_says_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert kernels.unusable(torch.device("cpu")) == "the tensors are on cpu, not on an NVIDIA GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert kernels.unusable(torch.device("cuda")) == "the GPU has compute capability 7.5, and 8.0 is needed"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert kernels.unusable(torch.device("cuda")) is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.unusable(torch.device("cpu")) is None


def test_takes() -> None:
    assert kernels.takes(torch.bfloat16, channels=5, kernel_size=21)
    assert not kernels.takes(torch.float64, channels=72, kernel_size=11)
    assert not kernels.takes(torch.float32, channels=72, kernel_size=23)
    assert not kernels.takes(torch.float32, channels=72, kernel_size=4)


def test_polynomial_for_gelu() -> None:
    """The coefficients in the kernels' source, in float64: 2 ** P(x) is the normal distribution's upper tail."""
    source = (Path(kernels.__file__).parent / "gelu.py").read_text()
    lines = [
        line.split("tl.fma(")[1].rstrip(")\n").split(", ") for line in source.splitlines() if "p = tl.fma(" in line
    ]
    numbers = [float(lines[0][1]), *(float(line[2]) for line in lines)]
    x = torch.linspace(0, 5.75, 2000, dtype=torch.float64)
    power = torch.zeros_like(x)
    for number in numbers:
        power = power * x + number
    assert len(numbers) == 8
    tail = torch.exp2(power)
    assert (tail / torch.special.log_ndtr(-x).exp() - 1).abs().max() < 3.4e-6
    beyond = torch.linspace(5.75, 1000, 2000, dtype=torch.float64)
    power = torch.zeros_like(beyond)
    for number in numbers:
        power = power * beyond + number
    assert (power.diff() < 0).all()


def test_every_shape_has_a_configuration() -> None:
    pytest.importorskip("triton")
    from conv2former.ops.triton import lanes, large_kernel

    if lanes.INTERPRETED:
        pytest.skip("the interpreter has one configuration")
    for kernel in range(3, 23, 2):
        for channels in (1, 5, 19, 72, 144, 248, 320, 576, 1009, 1024):
            count, group = large_kernel.weight_lanes(channels, kernel)
            assert 1 <= group <= min(channels, count // kernel)
            for itemsize in (4, 2):
                for width in (1, 7, 14, 57, 304):
                    found = large_kernel.candidates(kernel, channels, width, itemsize)
                    assert len(found) == 3 and len({tuple(config.items()) for config in found}) == 3
                    config = large_kernel.weight_config(kernel, channels, width, itemsize)
                    assert config["CG"] == group and config["T"] in MODULATION_TILES


def test_sums_do_not_depend_on_what_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths of a class share what is timed. The kernels that add up weights' gradients must not: a run that is resumed
    meets other widths first."""
    pytest.importorskip("triton")
    from conv2former.ops.triton import lanes, large_kernel, three_rows

    seen: list[int] = []

    def note(kernel: Any, _: int, *__: Any, **constants: Any) -> None:
        if kernel.__name__ == "weight_gradient_kernel" or constants.get("STAGE") == "inner":
            seen.append(constants["T"])

    monkeypatch.setattr(lanes, "fastest", lambda configs, start: configs[-1])
    for module in (large_kernel, three_rows):
        monkeypatch.setattr(module, "launch", note)

    def tiles(widths: tuple[int, ...]) -> dict[int, list[int]]:
        monkeypatch.setattr(large_kernel, "_convolution", lanes.Choice())
        monkeypatch.setattr(three_rows, "_march", lanes.Choice())
        found = {}
        for width in widths:
            seen.clear()
            with torch.device("meta"):
                x, weight = torch.empty(1, 8, width, 8), torch.empty(8, 1, 3, 3)
                large_kernel.modulation_backward(x, x, x, x, weight)
                three_rows.mlp_middle_backward(x, x, weight, torch.empty(8))
            found[width] = list(seen)
        return found

    first = tiles((120, 66, 80))
    assert first == tiles((80, 120, 66)) == tiles((66, 80, 120))
    assert len({tuple(found) for found in first.values()}) > 1  # or nothing would be shown


def test_marches_cover_the_map_once_and_fill_the_processors() -> None:
    pytest.importorskip("triton")
    from conv2former.ops.triton import three_rows

    for batch, height, strips, positions, groups in itertools.product(
        (1, 128), (1, 3, 7, 14, 56, 200), (1, 7, 22), (4, 5), (1, 6, 36)
    ):
        for persistent in (False, True):
            given = batch, height, strips, positions, groups, 396
            chunks, span, programs = three_rows.deal(*given, persistent=persistent)
            assert (chunks - 1) * span < height <= chunks * span
            blocks = -(-batch * chunks * strips // positions)
            assert programs % groups == 0 and programs // groups <= blocks
            assert programs // groups == blocks or persistent
    # stage 1 of T at batch 128: at least four rounds, none of them mostly idle
    chunks, span, programs = three_rows.deal(128, 56, 7, 5, 6, 396, persistent=False)
    assert programs >= 4 * 396 and chunks * span <= 60
    chunks, span, programs = three_rows.deal(128, 56, 7, 5, 6, 396, persistent=True)
    blocks = -(-128 * chunks * 7 // 5) * 6
    assert programs <= 396 and blocks / programs / -(-blocks // programs) > 0.9


@pytest.mark.parametrize(
    "what",
    [
        "forward",
        *(
            pytest.param(what, marks=pytest.mark.slow)
            for what in ("weight gradient", "input gradient", "MLP forward", "MLP inner")
        ),
    ],
)
def test_compiles_without_spills(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The favourite configuration for bfloat16 and an 11 x 11 kernel on sm_90; benchmarks/triton_build.py does all."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    script: Any = importlib.import_module("triton_build")
    row = script.build((next(p for p in script.programs((11,), (torch.bfloat16,)) if p.what == what), 90))
    assert row["spilled"] == 0
    assert row["registers"] <= 168
    assert row["multiply_adds"] >= 0.55 * row["instructions"]  # the loop is what it was written to be


LARGE = [
    *(Case("modulation", (2, 200, 304, channels), 11, "bfloat16", "halves") for channels in (72, 96, 144)),
    *(Case("modulation", (4, 33, 50, channels), 11, "float16") for channels in (320, 576)),
    *(Case("modulation", (2, 56, 56, 72), kernel, "float32") for kernel in (3, 5, 7, 9, 11, 15, 21)),
    *(Case("modulation", (8, 14, 14, 288), kernel, "bfloat16") for kernel in (3, 7, 11, 21)),
    Case("modulation", (16, 7, 7, 576), 11, "bfloat16"),
    Case("modulation", (4, 28, 20, 1009), 7, "float16", "channels_first"),
    *(Case("mlp", (2, 200, 304, channels), dtype="bfloat16") for channels in (288, 384)),
    *(Case("mlp", (8, 14, 14, channels), dtype="float16") for channels in (1280, 2304)),
    Case("mlp", (4, 56, 56, 288)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*SMALL, *MORE, *EMPTY, *LARGE], ids=str)
def test_on_gpu(case: Case) -> None:
    if why := kernels.unusable(torch.device("cuda")):
        pytest.skip(why)
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        check(measure(case, "cuda"), 2.0)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.gpu
@pytest.mark.parametrize("operation", ["modulation", "mlp"])
def test_what_is_timed_does_not_change_the_bits_on_gpu(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why := kernels.unusable(torch.device("cuda")):
        pytest.skip(why)
    from conv2former.ops.triton import lanes, large_kernel, three_rows

    case = Case(operation, (4, 28, 30, 72), 11 if operation == "modulation" else 3, "bfloat16")
    found = set()
    for which in range(3):
        monkeypatch.setattr(lanes, "fastest", lambda configs, start, which=which: configs[which])
        monkeypatch.setattr(large_kernel, "_convolution", lanes.Choice())
        monkeypatch.setattr(three_rows, "_march", lanes.Choice())
        found.add(tuple(bits(case, "cuda")))
    assert len(found) == 1


def use_tile(tile: int) -> None:
    """Has the kernels take this tile, which the interpreter's configurations leave open."""
    from conv2former.ops.triton import large_kernel, three_rows

    large_kernel.INTERPRETED_TILE = three_rows.INTERPRETED_TILE = tile
    large_kernel.weight_config.cache_clear()
    three_rows.candidates.cache_clear()
    large_kernel._convolution, three_rows._march = large_kernel.Choice(), three_rows.Choice()


def main() -> None:
    """Answers for the cases on the standard input, a JSON pair a line: what to run, and the case."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        what, given = json.loads(line)
        case = Case(**given | {"shape": tuple(given["shape"])})
        use_tile(case.tile)
        print(json.dumps({"measure": measure, "bits": bits}[what](case, "cpu")), flush=True)


if __name__ == "__main__":
    main()
