"""The fused operations against plain PyTorch: values, gradients, and every way that PyTorch may call them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import conv2former  # noqa: F401  registers the names
from conv2former import ops
from conv2former.errors import UserError
from conv2former.ops import backend, cpu
from conv2former_runtime import build, library

HERE = torch.device("cpu")
needs_compiler = pytest.mark.skipif(cpu.unusable(HERE) is not None, reason=str(cpu.unusable(HERE)))
# (B, H, W, C, k): maps below the kernel, odd widths, H != W, one image, more rows than a band, the paper's kernels
SHAPES = [
    (1, 1, 1, 16, 11),
    (2, 7, 7, 72, 11),
    (1, 5, 40, 33, 3),
    (2, 13, 9, 20, 5),
    (3, 28, 28, 144, 11),
    (1, 17, 3, 48, 7),
    (1, 9, 31, 24, 9),
    (1, 20, 20, 19, 15),
    (1, 30, 61, 72, 21),
]
LAYOUTS = ["halves", "channels first", "cropped", "every second channel", "one column", "one position"]
FLOOR = 2e-6  # of the largest value: where PyTorch happens to round to the exact result
Operation = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def automatic(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    with ops.use_backend("auto"):
        yield


def arguments(shape: tuple[int, ...], dtype: torch.dtype, *, maps: int) -> tuple[list[Tensor], Tensor]:
    """``maps`` maps with weight and bias, and a gradient of the output."""
    batch, height, width, channels, k = shape
    tensors = [1.5 * torch.randn(batch, height, width, channels) for _ in range(maps + 1)]
    *inputs, g = (tensor.to(dtype) for tensor in tensors)
    return [*inputs, torch.randn(channels, 1, k, k) / k, torch.randn(channels)], g


def run(operation: Operation, inputs: list[Tensor], g: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The output and all gradients, computed in one dtype."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    out = operation(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, g.to(dtype))]


def assert_as_good(operation: Operation, reference: Operation, inputs: list[Tensor], g: Tensor) -> None:
    """At most twice PyTorch's error in the same dtype, both against float64."""
    exact = run(reference, inputs, g, torch.float64)
    plain = run(reference, inputs, g, g.dtype)
    floor = FLOOR if g.dtype == torch.float32 else 2**-8
    for i, (mine, theirs, true) in enumerate(zip(run(operation, inputs, g, g.dtype), plain, exact, strict=True)):
        largest = true.abs().max()
        error, allowed = (mine.double() - true).abs().max(), 2 * (theirs.double() - true).abs().max() + floor * largest
        assert mine.shape == true.shape and error <= allowed, (i, float(error / largest), float(allowed / largest))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_modulation(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs, g = arguments(shape, dtype, maps=2)
    assert_as_good(ops.modulation, ops.modulation_reference, inputs, g)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mlp_middle(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs, g = arguments((*shape[:4], 3), dtype, maps=1)
    assert_as_good(ops.mlp_middle, ops.mlp_middle_reference, inputs, g)


@needs_compiler
def test_the_fused_code_is_what_runs() -> None:
    """Here the choice is the C++ code; else the comparisons above would compare PyTorch to itself."""
    u = torch.randn(1, 4, 4, 32)
    weight, bias = torch.zeros(32, 1, 11, 11), torch.zeros(32)
    assert backend.fused("modulation", u, weight, bias, u) and ops.backend_for("cpu") == "cpp"
    assert not backend.fused("modulation", u.double(), weight, bias)
    assert not backend.fused("modulation", u[..., :3], weight[:3], bias[:3])
    assert not backend.fused("modulation", u, torch.zeros(32, 1, 23, 23), bias)
    assert not backend.fused("modulation", u, weight, bias, u[:, :1, :1])
    assert not backend.fused("modulation", u, weight, bias, u.bfloat16())
    assert not backend.fused("modulation", u, torch.zeros(32, 1, 3, 5), bias)
    assert not backend.fused("modulation", u, torch.zeros(32, 1, 4, 4), bias)
    assert not backend.fused("modulation", u, weight.double(), bias)
    with ops.use_backend("reference"):
        assert not backend.fused("modulation", u, weight, bias)


@needs_compiler
@pytest.mark.parametrize("leaf", range(4))
def test_one_gradient_alone(leaf: int) -> None:
    inputs, g = arguments((2, 6, 5, 24, 5), torch.float32, maps=2)
    found = []
    for operation in (ops.modulation, ops.modulation_reference):
        given = [tensor.clone().requires_grad_(i == leaf) for i, tensor in enumerate(inputs)]
        operation(*given).backward(g)
        assert [tensor.grad is not None for tensor in given] == [i == leaf for i in range(4)]
        found.append(given[leaf].grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@needs_compiler
def test_gradients_under_another_choice() -> None:
    inputs, g = arguments((2, 6, 5, 24, 5), torch.float32, maps=2)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    out = ops.modulation(*inputs)
    with ops.use_backend("reference"):
        assert torch.autograd.grad(out, inputs, g)[0].shape == inputs[0].shape


@needs_compiler
def test_other_kernels_of_the_mlp_are_pytorchs() -> None:
    inputs, _ = arguments((2, 6, 5, 24, 5), torch.float32, maps=1)
    torch.testing.assert_close(ops.mlp_middle(*inputs), ops.mlp_middle_reference(*inputs), rtol=0, atol=0)


@needs_compiler
def test_forward_mode_and_functional_gradients() -> None:
    inputs, _ = arguments((1, 4, 4, 24, 3), torch.float32, maps=2)
    tangents = tuple(torch.randn_like(tensor) for tensor in inputs)
    mine, plain = (torch.func.jvp(f, tuple(inputs), tangents)[1] for f in (ops.modulation, ops.modulation_reference))
    torch.testing.assert_close(mine, plain)
    torch.func.grad(lambda u: ops.modulation(u, *inputs[1:]).sum())(inputs[0])


@needs_compiler
def test_multiply_adds_are_counted() -> None:
    model, x = network().eval(), torch.zeros(1, 3, 64, 64)
    counts = []
    for choice in ("auto", "reference"):
        with ops.use_backend(choice), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@needs_compiler
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(layout: str) -> None:
    """The two halves of one product, NCHW memory, part of a map, every second channel."""
    batch, height, width, channels = 2, 6, 5, 40
    u, v = {
        "halves": lambda: torch.randn(batch, height, width, 2 * channels).chunk(2, dim=-1),
        "channels first": lambda: torch.randn(2, batch, channels, height, width).permute(0, 1, 3, 4, 2).unbind(),
        "cropped": lambda: torch.randn(2, batch, height + 3, width + 2, channels)[:, :, 1:-2, :-2].unbind(),
        "every second channel": lambda: torch.randn(2, batch, height, width, 2 * channels)[..., ::2].unbind(),
        "one column": lambda: torch.randn(2, batch, 1, height, channels).transpose(2, 3).unbind(),
        "one position": lambda: torch.randn(2, batch, channels, 1, 1).permute(0, 1, 3, 4, 2).unbind(),
    }[layout]()
    weight, bias = torch.randn(channels, 1, 5, 5), torch.randn(channels)
    g = torch.randn(batch, channels, *u.shape[1:3]).permute(0, 2, 3, 1)
    assert_as_good(ops.modulation, ops.modulation_reference, [u, v, weight, bias], g)
    mine = ops.mlp_middle(u, weight[..., :3, :3], bias)
    torch.testing.assert_close(mine, ops.mlp_middle_reference(u, weight[..., :3, :3], bias), rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("name", ["modulation", "mlp_middle"])
def test_gradients_lie_as_announced(name: str) -> None:
    """Compiled code relies on the strides that the shape functions tell, here with weights in channels-last memory."""
    inputs, _ = arguments((2, 5, 4, 24, 3), torch.float32, maps=2 if name == "modulation" else 1)
    inputs[-2] = inputs[-2].to(memory_format=torch.channels_last)
    assert inputs[-2].stride() != torch.empty(24, 1, 3, 3).stride()
    inputs = [tensor.requires_grad_() for tensor in inputs]
    for leaf, gradient in zip(inputs, torch.autograd.grad(getattr(ops, name)(*inputs).sum(), inputs), strict=True):
        assert gradient.stride() == leaf.stride()


@needs_compiler
def test_empty_batch() -> None:
    inputs, g = arguments((0, 7, 7, 32, 11), torch.float32, maps=2)
    out, du, dv, dweight, dbias = run(ops.modulation, inputs, g, torch.float32)
    assert out.shape == du.shape == dv.shape == (0, 7, 7, 32)
    assert dweight.shape == (32, 1, 11, 11) and not dweight.any() and not dbias.any()
    inputs, g = arguments((0, 7, 7, 32, 3), torch.float32, maps=1)
    assert [tuple(x.shape) for x in run(ops.mlp_middle, inputs, g, torch.float32)[:2]] == [(0, 7, 7, 32)] * 2


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_values(dtype: torch.dtype) -> None:
    """Far from zero GELU is exact, and what is not a number stays where it is."""
    u = torch.zeros(1, 24, 1, 32)
    values = torch.tensor([-1e30, -100.0, -20.0, -5.0, -1e-30, 0.0, 1e-30, 5.0, 20.0, 100.0, 1e30, float("inf")])
    u[0, ::2, 0] = values[:, None]
    u[0, 23] = float("nan")
    u = u.to(dtype)
    weight, bias = torch.zeros(32, 1, 1, 1) + 1, torch.zeros(32)
    mine, plain = ops.modulation(u, torch.ones_like(u), weight, bias), F.gelu(u.double())
    assert mine[0, 23].isnan().all() and not mine[0, :23].isnan().any()
    torch.testing.assert_close(mine[0, :23].double(), plain[0, :23], rtol=2**-8, atol=2e-4)


@needs_compiler
def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    inputs, g = arguments((5, 12, 12, 40, 7), torch.float32, maps=2)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run(ops.modulation, inputs, g, torch.float32))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("k", [3, 5])
def test_reference_gradients(k: int) -> None:
    """The specification against finite differences, in float64."""
    u, v = (torch.randn(1, 3, 4, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(2, 1, k, k, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.modulation, (u, v, weight, bias))
    assert torch.autograd.gradgradcheck(ops.modulation, (u, v, weight, bias))
    if k == 3:
        assert torch.autograd.gradcheck(ops.mlp_middle, (u, weight, bias))


@needs_compiler
@pytest.mark.parametrize("name", ["modulation", "mlp_middle"])
def test_operator_contract(name: str) -> None:
    """PyTorch's own check of custom operators: schema, shape functions, autograd registration, compiling."""
    inputs, _ = arguments((2, 5, 4, 24, 3), torch.float32, maps=2 if name == "modulation" else 1)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    operator = getattr(torch.ops.conv2former, name).default
    torch.library.opcheck(operator, (*inputs, True) if name == "modulation" else tuple(inputs))


@needs_compiler
@pytest.mark.parametrize("name", ["modulation", "mlp_middle"])
def test_second_derivatives_are_the_references(name: str) -> None:
    """Of every tensor in every other, with the gradient of the output among them, also under autocast's dtypes."""
    inputs, g = arguments((2, 4, 5, 24, 3), torch.float32, maps=2 if name == "modulation" else 1)
    directions = [torch.randn_like(tensor) for tensor in inputs]
    found = []
    for operation in (getattr(ops, name), getattr(ops, f"{name}_reference")):
        leaves = [tensor.clone().requires_grad_() for tensor in (*inputs, g)]
        slopes = torch.autograd.grad(operation(*leaves[:-1]), leaves[:-1], leaves[-1], create_graph=True)
        found.append(torch.autograd.grad(slopes, leaves, directions))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)

    u = [tensor.bfloat16().requires_grad_() for tensor in inputs[:-2]]
    (slope,) = torch.autograd.grad(getattr(ops, name)(*u, *inputs[-2:]).sum(), u[0], create_graph=True)
    assert torch.autograd.grad(slope.sum(), u[0])[0].isfinite().all()


@needs_compiler
def test_gradient_penalty() -> None:
    """The gradient of a network's gradient, in its images (WGAN-GP): that of the reference."""
    found = []
    for choice in ("auto", "reference"):
        model, x = network().eval(), torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64).requires_grad_()
        with ops.use_backend(choice):
            (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            (slope.square().sum() - 1).square().backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(found[0]) > 40
    for mine, theirs in zip(*found, strict=True):
        assert (mine - theirs).abs().max() <= 1e-3 * theirs.abs().max() + 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# In the network


def network(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("conv2former_test", num_classes=5, ls_init_value=0.5, **arguments)


@needs_compiler
@pytest.mark.parametrize(("amp", "steps"), [(False, 30), (True, 8), pytest.param(True, 30, marks=pytest.mark.slow)])
def test_the_same_training(amp: bool, steps: int) -> None:
    """One loss curve. In float32 to 1e-4; under autocast both wander from it by bfloat16's rounding."""

    def losses(choice: str, amp: bool) -> Tensor:
        model = network().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 5
        curve = []
        with ops.use_backend(choice):
            for _ in range(steps):
                with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                    loss = F.cross_entropy(model(images).float(), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                curve.append(loss.detach())
        return torch.stack(curve)

    plain, fused = losses("reference", amp), losses("auto", amp)
    assert plain[-1] < (0.2 if steps == 30 else 1) * plain[0] and not torch.equal(plain, fused)
    if not amp:
        torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-4)
    else:
        exact = losses("reference", False)
        assert (fused - exact).abs().max() <= 2 * (plain - exact).abs().max() + 0.01


@needs_compiler
def test_checkpointing_recomputes_the_same() -> None:
    x = torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model = network().train()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@needs_compiler
def test_compile_keeps_the_operators_and_the_values() -> None:
    model, x = network().eval(), torch.randn(2, 3, 64, 64)
    found: list[str] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, backend=look, fullgraph=True)(x), expected)
        torch._dynamo.reset()
    assert {name for name in found if "conv2former" in name} == {
        "conv2former.modulation.default",
        "conv2former.mlp_middle.default",
    }


def test_export_takes_the_reference_unless_told() -> None:
    model, x = network().eval(), torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (x,))
    assert not any("conv2former" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@needs_compiler
def test_export_with_a_backend_by_name() -> None:
    model, x = network().eval(), torch.randn(2, 3, 64, 64)
    with ops.use_backend("cpp"):
        program = torch.export.export(model, (x,))
        assert any("conv2former.modulation" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(x), model(x))


# ---------------------------------------------------------------------------------------------------------------------
# The choice


def test_unknown_backends() -> None:
    with pytest.raises(UserError, match="backend 'cuda' is unknown: use one of auto, reference, cpp, triton"):
        ops.set_backend("cuda")


def test_a_forced_backend_that_cannot_run_says_why() -> None:
    with ops.use_backend("cpp"), pytest.raises(UserError, match="cpp kernels cannot run on cuda: they are for CPUs"):
        ops.backend_for("cuda")


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_chosen", [None])
    monkeypatch.setenv(backend.VARIABLE, "reference")
    assert ops.backend_for("cpu") == "reference"
    monkeypatch.setenv(backend.VARIABLE, "fast")
    with pytest.raises(UserError, match="CONV2FORMER_OPS 'fast' is unknown"):
        ops.backend_for("cpu")


SCRIPT = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
import conv2former, timm
assert "conv2former.ops.triton" not in sys.modules and "triton" not in sys.modules.get("torch").__dict__
for _ in range(2):
    timm.create_model("conv2former_test").eval()(torch.zeros(1, 3, 32, 32))
"""


def test_without_a_compiler_pytorch_computes_and_says_so_once(tmp_path: Any) -> None:
    environment = dict(CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path), PATH="/usr/bin:/bin", OMP_NUM_THREADS="1")
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=100, env=environment, check=True
    )
    said = [line for line in answer.stdout.splitlines() if "operations on cpu" in line]
    assert len(said) == 1 and said[0].startswith(
        "operations on cpu are computed by plain PyTorch, because there is no C++ compiler"
    )


def test_a_compiler_that_fails(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    assert library.load.__wrapped__() == "false failed: no message"


@needs_compiler
def test_the_library_is_built_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the cache, under a name of its own; a folder that cannot be written is replaced by one for the process."""
    monkeypatch.setattr(build, "FLAGS", ["-O0", *build.FLAGS[1:]])  # quicker
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not isinstance(library.load.__wrapped__(), str)
    (file,) = (tmp_path / "conv2former").glob("*.so")
    made = file.stat().st_mtime_ns
    assert not isinstance(library.load.__wrapped__(), str) and file.stat().st_mtime_ns == made
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not isinstance(library.load.__wrapped__(), str)


@needs_compiler
def test_compiled_code_follows_the_choice() -> None:
    model, x = network().eval(), torch.randn(2, 3, 64, 64)
    graphs: list[bool] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(any("conv2former" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=look)
    with torch.no_grad():
        for choice in ("auto", "reference", "auto"):
            with ops.use_backend(choice):
                compiled(x)
    torch._dynamo.reset()
    assert graphs == [True, False]
