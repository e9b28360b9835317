"""The operations of evaluation, which have no backward pass: values, packed weights, and how PyTorch may call them."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from conv2former import ops
from conv2former.ops.cpu import packing
from test_fusing import build
from test_ops import FLOOR, automatic, needs_compiler  # noqa: F401  `automatic` is a fixture for all tests here

pytestmark = needs_compiler
EPS = 0.05  # large enough to be seen
# One position, maps below the kernel, odd widths, hidden layers of no whole vectors, several bands, wide maps
SIZES: dict[str, list[tuple[int, ...]]] = {
    "blocks": [  # B, H, W, C, D, k, number
        (1, 1, 1, 16, 16, 11, 1),
        (3, 7, 7, 50, 33, 11, 2),
        (9, 7, 2, 33, 7, 3, 1),
        (1, 3, 70, 33, 70, 21, 1),
        (1, 30, 61, 40, 150, 11, 1),
        (3, 12, 5, 72, 288, 3, 3),
    ],
    "stem": [  # B, H, W, I, M, C, strides
        (1, 4, 4, 3, 8, 16, 2, 1),
        (3, 33, 47, 1, 9, 33, 1, 1),
        (1, 65, 34, 4, 17, 40, 4, 2),
        (2, 31, 140, 3, 33, 50, 2, 1),
        (1, 7, 8, 3, 1, 16, 1, 1),
        (3, 64, 38, 4, 24, 48, 2, 1),
    ],
    "downsample": [  # B, H, W, C, D
        (1, 2, 2, 16, 16),
        (3, 7, 5, 33, 50),
        (1, 40, 37, 40, 17),
        (2, 3, 9, 72, 144),
    ],
    "head": [  # B, H, W, C, D, classes
        (1, 1, 1, 16, 16, 1),
        (3, 7, 7, 50, 33, 10),
        (17, 2, 3, 40, 72, 33),
        (1, 20, 17, 33, 130, 100),
    ],
}
SMALL = {
    "blocks": (2, 17, 14, 33, 70, 5, 2),
    "stem": (2, 17, 14, 3, 9, 24, 2, 1),
    "downsample": (2, 9, 7, 33, 50),
    "head": (3, 4, 5, 33, 40, 7),
}
# Places of tensors in `make`'s lists: x and the weights
LEAVES = [(name, i) for name, n in (("blocks", 3), ("stem", 7), ("downsample", 3), ("head", 7)) for i in range(n)]
each = pytest.mark.parametrize("name", SMALL)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def make(name: str, sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Any]:
    """Arguments of an operation, its weights one by one: all products are about as large as what they are made of."""
    first, *rest = shapes(name, *sizes)
    weights = [(torch.randn(shape) / math.sqrt(math.prod(shape[1:]))).to(dtype) for shape in rest]
    numbers: tuple[Any, ...] = sizes[-2:] if name == "stem" else (EPS,)
    if name == "blocks":
        weights = [ops.join_block_weights(weights[i : i + 12]) for i in range(0, len(weights), 12)]
        numbers = *sizes[3:6], EPS
    return [1.5 * torch.randn(first).to(dtype) + 1, *weights, *numbers]


def shapes(name: str, batch: int, height: int, width: int, *sizes: int) -> list[tuple[int, ...]]:
    """The shapes of an operation's tensors; those of blocks one by one."""
    if name == "stem":
        ins, mid, outs, *_ = sizes
        vectors = [(mid,), (mid,)]
        return [(batch, ins, height, width), (mid, ins, 3, 3), *vectors, (mid, mid, 3, 3), (outs, mid, 2, 2), (outs,)]
    c, d, *others = sizes
    x = batch, height, width, c
    if name == "downsample":
        return [x, (d, c, 2, 2), (d,)]
    if name == "head":
        (k,) = others
        return [x, (d, c), (d,), (d,), (d,), (k, d), (k,)]
    k, number = others
    mod: list[tuple[int, ...]] = [(2 * c, c), (2 * c,), (c, 1, k, k), (c,), (c, c), (c,)]
    mlp: list[tuple[int, ...]] = [(d, c), (d,), (d, 1, 3, 3), (d,), (c, d), (c,)]
    return [x, *number * [*mod, *mlp]]


def given(name: str, arguments: list[Any]) -> list[Any]:
    """As the operation takes them: the weights of blocks are a list."""
    return [arguments[0], arguments[1:-4], *arguments[-4:]] if name == "blocks" else arguments


def compute(name: str, arguments: list[Any]) -> Tensor:
    return getattr(ops, name)(*given(name, arguments))


def reference(name: str, arguments: list[Any], change: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """In plain PyTorch, of changed tensors."""
    with ops.use_backend("reference"):
        return compute(name, [change(x) if isinstance(x, Tensor) else x for x in arguments])


def fresh(name: str, arguments: list[Any]) -> Tensor:
    """By the operator, of tensors that it has never seen."""
    return compute(name, copy.deepcopy(arguments))


def assert_as_good(name: str, arguments: list[Any], *results: Tensor) -> None:
    """At most twice PyTorch's error in the same dtype, both against float64."""
    exact, plain = reference(name, arguments, Tensor.double), reference(name, arguments)
    largest, floor = exact.abs().max(), FLOOR if plain.dtype == torch.float32 else 2**-8
    allowed = 2 * (plain.double() - exact).abs().max() + floor * largest
    for mine in results:
        assert mine.shape == plain.shape and mine.dtype == plain.dtype
        error = (mine.double() - exact).abs().max()
        assert error <= allowed, (float(error / largest), float(allowed / largest))


class Operators(TorchDispatchMode):
    """Lists our operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "conv2former":
            self.names.append(func.name().partition("::")[2])
        return func(*args, **(kwargs or {}))


def operators(act: Callable[[], Any]) -> list[str]:
    with Operators() as seen:
        act()
    return seen.names


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------------
# Values


@each_dtype
@pytest.mark.parametrize(("name", "sizes"), [(name, s) for name in SIZES for s in SIZES[name]], ids=str)
def test_values(name: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Also behind a call that leaves scratch memory full of what is not a number."""
    arguments = make(name, sizes, dtype)
    assert compute(name, [torch.full_like(arguments[0], math.nan), *arguments[1:]]).isnan().all()
    assert operators(lambda: compute(name, arguments)) == [name]
    assert_as_good(name, arguments, compute(name, arguments))


@each_dtype
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("blocks", (43, 9, 40, 330, 5, 1)),
        ("blocks", (7, 7, 72, 150, 11, 2)),
        ("blocks", (40, 9, 33, 70, 3, 1)),
        ("blocks", (180, 190, 16, 16, 5, 1)),  # 16 threads take it in two parts
        ("stem", (45, 40, 3, 9, 40, 2, 1)),
        ("downsample", (13, 9, 40, 72)),
        ("head", (11, 9, 40, 72, 100)),
    ],
)
def test_numbers_of_threads(name: str, sizes: tuple[int, ...], batch: int, dtype: torch.dtype, threads: Any) -> None:
    """Where there are too few images, rows and the hidden layer are dealt out; always the same numbers."""
    arguments = make(name, (batch, *sizes), dtype)
    alone = compute(name, arguments)
    assert_as_good(name, arguments, alone)
    for number in (2, 3, 16):
        threads(number)
        assert all(torch.equal(alone, compute(name, arguments)) for _ in range(2))


def test_far_from_zero() -> None:
    """A mean of squares less the squared mean would be noise."""
    x, *rest = make("blocks", SMALL["blocks"])
    assert_as_good("blocks", [x + 3000, *rest], compute("blocks", [x + 3000, *rest]))


@each
def test_what_is_not_a_number_stays_where_it_is(name: str) -> None:
    arguments = make(name, SMALL[name])
    x = arguments[0].select(-1 if name != "stem" else 1, 2)  # one channel
    x[0, 3, 4], x[1, 0, 0] = math.nan, math.inf
    mine, plain = compute(name, arguments), reference(name, arguments)
    assert torch.equal(mine.isfinite(), plain.isfinite()) and 0 < mine.isfinite().sum() < mine.numel()


@each_dtype
@pytest.mark.parametrize("layout", ["cropped", "turned", "every second channel"])
@each
def test_memory_layouts(name: str, layout: str, dtype: torch.dtype) -> None:
    """Maps and weights that do not lie one number after the other; `turned` is the other one of NCHW and NHWC."""
    arguments = make(name, SMALL[name], dtype)

    def laid(x: Tensor) -> Tensor:
        if layout == "every second channel":
            return torch.stack([x, torch.full_like(x, math.nan)], dim=-1)[..., 0]
        if layout == "turned":
            return x.movedim(-1, 0).clone(memory_format=torch.contiguous_format).movedim(0, -1)
        return F.pad(x, (2, 1) * x.ndim, value=math.nan)[(slice(2, -1),) * x.ndim]

    others = [laid(x) if isinstance(x, Tensor) else x for x in arguments]
    assert not any(x.is_contiguous() for x in others[:2] if x.ndim > 1)
    assert operators(lambda: compute(name, others)) == [name]
    assert torch.equal(compute(name, others), compute(name, arguments))


@each
def test_empty_batch(name: str) -> None:
    arguments = make(name, (0, *SMALL[name][1:]))
    assert compute(name, arguments).shape == reference(name, arguments).shape


@each
def test_python_threads(name: str) -> None:
    """Calls at the same time, the first of which pack the same weights."""
    arguments = make(name, SMALL[name])
    expected = fresh(name, arguments)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(mine, expected) for mine in pool.map(lambda _: compute(name, arguments), range(16)))


# ---------------------------------------------------------------------------------------------------------------------
# Weights are packed once, and again when they change


def replaced_twice(weight: Tensor) -> None:
    """The second replacement may lie where the weight lay at first."""
    weight.data = weight.data * 1.5
    weight.data = weight.data * 1.5


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda weight: weight.mul_(2),
    "a part": lambda weight: weight[:1].neg_(),
    "replaced": lambda weight: setattr(weight, "data", weight.data * 2),
    "replaced twice": replaced_twice,
    "in inference mode": torch.inference_mode()(lambda weight: weight.mul_(2)),
}


@torch.no_grad()
@pytest.mark.parametrize("change", [*CHANGES, "exchanged"])
@pytest.mark.parametrize(("name", "i"), [leaf for leaf in LEAVES if leaf[1]])
def test_changed_weights(name: str, i: int, change: str) -> None:
    arguments = make(name, SMALL[name])
    arguments[i] = nn.Parameter(arguments[i])
    for _ in range(3):
        before = compute(name, arguments)
        if change == "exchanged":  # the new one may lie where the old one lay
            shape = arguments[i].shape
            arguments[i] = None
            arguments[i] = torch.randn(shape)
        else:
            CHANGES[change](arguments[i])
        after = compute(name, arguments)
        assert torch.equal(after, fresh(name, arguments)) and not torch.equal(after, before)


@torch.no_grad()
def test_narrower_weights() -> None:
    """Some outputs are cut off: the weights begin where they began, and their rows are as far apart."""
    arguments = make("downsample", (2, 6, 5, 33, 70))
    for outs in (70, 40, 17):
        for i in (1, 2):
            arguments[i].data = arguments[i].data[:outs]
        assert torch.equal(compute("downsample", arguments), fresh("downsample", arguments))


@torch.no_grad()
@each
def test_shared_weights(name: str) -> None:
    """One weight in two calls whose others differ, in turn."""
    one, other = make(name, SMALL[name]), make(name, SMALL[name])
    for i in (i for known, i in LEAVES if known == name and i):
        mixed = [*other[:i], one[i], *other[i + 1 :]]
        for arguments in (one, mixed, one):
            assert torch.equal(compute(name, arguments), fresh(name, arguments))


@torch.no_grad()
@pytest.mark.parametrize("there", [torch.bfloat16, torch.float64], ids=str)
def test_changed_networks(there: torch.dtype, fill: Any) -> None:
    """Other weights loaded, another dtype, and back to the first, which bfloat16 leaves rounded."""
    model, x = build("conv2former_test", fill).fuse(), torch.randn(1, 3, 64, 64)
    steps: list[Callable[[], Any]] = [
        lambda: model.load_state_dict({key: 0.9 * value for key, value in model.state_dict().items()}),
        lambda: model.load_state_dict({key: 0.9 * value for key, value in model.state_dict().items()}, assign=True),
        lambda: model.to(there),
        lambda: model.to(torch.float32),
        lambda: model.to(there).to(torch.float32),
        lambda: model.to(memory_format=torch.channels_last),
    ]
    model(x)
    for step in steps:
        step()
        y = x.to(next(model.parameters()).dtype)
        assert torch.equal(model(y), copy.deepcopy(model)(y))


def test_packed_weights_go_with_their_weights() -> None:
    """By counting references: no circle keeps them until the garbage is collected."""
    gc.collect()
    before = len(packing._kept)
    for name in SMALL:
        arguments = make(name, SMALL[name])
        compute(name, arguments)
        assert len(packing._kept) > before
        del arguments
        assert len(packing._kept) == before


@each
def test_inference_mode(name: str) -> None:
    """Of weights made outside and inside, the latter of which do not tell that they have changed."""
    outside = make(name, SMALL[name])
    expected = compute(name, outside)
    with torch.inference_mode():
        assert torch.equal(compute(name, outside), expected)
        inside = copy.deepcopy(outside)
        assert inside[1].is_inference() and torch.equal(compute(name, inside), expected)
        inside[1].mul_(2)
        outside[1].mul_(2)
        assert torch.equal(compute(name, inside), compute(name, outside))
    assert torch.equal(compute(name, inside), compute(name, outside))
    assert not torch.equal(compute(name, outside), expected)


# ---------------------------------------------------------------------------------------------------------------------
# What is left to PyTorch


@pytest.mark.parametrize(("name", "i"), LEAVES)
def test_gradients_are_the_compositions(name: str, i: int) -> None:
    arguments = make(name, SMALL[name])
    leaf = arguments[i].requires_grad_()
    mine, plain = (torch.autograd.grad(f(name, arguments).sum(), leaf)[0] for f in (compute, reference))
    torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-4)
    assert name not in operators(lambda: compute(name, arguments))
    with torch.no_grad():
        assert operators(lambda: compute(name, arguments)) == [name]


@pytest.mark.parametrize("i", [0, 1])
@each
def test_the_operators_have_no_derivative(name: str, i: int) -> None:
    """Of x or of a weight, whether they say so when they are called or in the backward pass."""
    arguments = make(name, SMALL[name])
    arguments[i].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"no derivative.*use_backend\('reference'\)"):
        getattr(torch.ops.conv2former, name)(*given(name, arguments)).sum().backward()


@each
def test_autocast_is_pytorchs(name: str) -> None:
    arguments = make(name, SMALL[name])
    with torch.autocast("cpu", torch.bfloat16):
        assert name not in operators(lambda: compute(name, arguments))
        assert_as_good(name, arguments, compute(name, arguments))  # float64 stays as it is
    with torch.autocast("cpu", enabled=False):
        assert operators(lambda: compute(name, arguments)) == [name]


@each
def test_functional_transforms(name: str) -> None:
    x, *rest = make(name, SMALL[name])

    def mine(x: Tensor) -> Tensor:
        return compute(name, [x, *rest])

    def plain(x: Tensor) -> Tensor:
        return reference(name, [x, *rest])

    both = torch.stack([x, x.flip(0)])
    torch.testing.assert_close(torch.func.vmap(mine)(both), torch.stack([plain(x), plain(x.flip(0))]))
    torch.testing.assert_close(torch.func.jvp(mine, (x,), (x.sin(),)), torch.func.jvp(plain, (x,), (x.sin(),)))


@each
def test_float64_is_pytorchs(name: str) -> None:
    arguments = [x.double() if isinstance(x, Tensor) else x for x in make(name, SMALL[name])]
    assert not operators(lambda: compute(name, arguments))
    torch.testing.assert_close(compute(name, arguments), reference(name, arguments), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "i"), LEAVES)
@pytest.mark.parametrize("mistake", ["longer", "another dtype", "another rank"])
def test_mistakes_are_pytorchs(name: str, i: int, mistake: str) -> None:
    """Of what PyTorch refuses nothing is computed; what it takes has its values."""
    arguments = make(name, SMALL[name])
    x = arguments[i]
    arguments[i] = {
        "longer": lambda: x.repeat_interleave(2, dim=1 if i == 0 and name == "stem" else -1 if i == 0 else 0),
        "another dtype": lambda: x.bfloat16(),
        "another rank": lambda: x[0] if i == 0 else x[None],
    }[mistake]()
    assert_same_outcome(name, arguments)


def assert_same_outcome(name: str, arguments: list[Any]) -> None:
    try:
        expected = reference(name, arguments)
    except (RuntimeError, ValueError) as error:
        with pytest.raises(type(error)):
            compute(name, arguments)
    else:
        torch.testing.assert_close(compute(name, arguments), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [2, 4, 23])
def test_other_kernels(k: int) -> None:
    assert_same_outcome("blocks", make("blocks", (2, 6, 5, 33, 70, k, 1)))


@pytest.mark.parametrize("other", [(33, 70, 3, 1), (33, 40, 5, 1), (48, 70, 5, 1)], ids=str)
def test_blocks_that_differ(other: tuple[int, ...]) -> None:
    """In the kernel, in the width of the hidden layer, in their own."""
    one, two = make("blocks", (2, 6, 5, 33, 70, 5, 1)), make("blocks", (2, 6, 5, *other))
    assert_same_outcome("blocks", [*one[:2], two[1], *one[2:]])


def test_no_blocks() -> None:
    x, *_, c, d, k, eps = make("blocks", SMALL["blocks"])
    assert_same_outcome("blocks", [x, c, d, k, eps])


def test_weights_of_a_block() -> None:
    """One row and back; each begins where kernels like it."""
    parts = [torch.randn(shape) for shape in shapes("blocks", 1, 1, 1, 33, 70, 5, 1)[1:]]
    row = ops.join_block_weights(parts)
    views = ops.block_weights(row, 33, 70, 5)
    assert all(torch.equal(view, part) for view, part in zip(views, parts, strict=True))
    assert not any(view.storage_offset() % 64 for view in views)
    for wrong in (row[:-64], F.pad(row, (0, 64))):
        with pytest.raises(ValueError, match="numbers"):
            ops.block_weights(wrong, 33, 70, 5)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (0, 8)], ids=str)
def test_images_that_leave_nothing(size: tuple[int, int]) -> None:
    assert_same_outcome("stem", make("stem", (1, *size, 3, 8, 16, 1, 1)))
    assert_same_outcome("downsample", make("downsample", (1, *size, 33, 16)))


@each
def test_fewer_channels_than_a_vector(name: str) -> None:
    sizes = {
        "blocks": [(2, 6, 5, 3, 12, 5, 2)],
        "stem": [(2, 9, 8, 3, 2, 3, 2, 1)],
        "downsample": [(2, 6, 5, 3, 33), (2, 6, 5, 33, 3)],
        "head": [(2, 6, 5, 3, 33, 7), (2, 6, 5, 33, 3, 7)],
    }
    for each in sizes[name]:
        assert_same_outcome(name, make(name, each))


# ---------------------------------------------------------------------------------------------------------------------
# Every way that PyTorch may call them


@each_dtype
@each
def test_operator_contract(name: str, dtype: torch.dtype) -> None:
    """PyTorch's own check of custom operators: schema, shape functions, compiling with sizes left open."""
    arguments = given(name, make(name, SMALL[name], dtype))
    torch.library.opcheck(getattr(torch.ops.conv2former, name).default, tuple(arguments))


@pytest.fixture
def fused(fill: Any) -> nn.Module:
    return build("conv2former_test", fill).fuse()


def expected(stages: int) -> list[str]:
    """The operations of a network, in order."""
    return ["stem", *["blocks", "downsample"] * (stages - 1), "blocks", "head"]


ALL = expected(4)


@torch.no_grad()
def test_networks_run_them(fused: nn.Module) -> None:
    """The blocks of a stage at once."""
    x = torch.randn(2, 3, 65, 50)
    assert operators(lambda: fused(x)) == ALL
    with ops.use_backend("reference"):
        assert not operators(lambda: fused(x))


@torch.no_grad()
def test_stages_without_blocks(fill: Any) -> None:
    model, x = build("conv2former_test", fill, depths=(1, 0, 2, 0)), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(copy.deepcopy(model).fuse()(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_compile_keeps_the_operators_and_the_values(fused: nn.Module) -> None:
    found: list[str] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x = torch.randn(2, 3, 64, 96)
    torch._dynamo.reset()
    mine = torch.compile(fused, backend=look, fullgraph=True)(x)
    torch._dynamo.reset()
    torch.testing.assert_close(mine, fused(x))
    assert [name for name in found if "conv2former" in name] == [f"conv2former.{name}.default" for name in ALL]


@torch.no_grad()
def test_sizes_may_be_left_open(fused: nn.Module) -> None:
    """In a compiled graph without breaks: a network's, and its parts', whose channels the compiler leaves open too."""
    parts = fused, fused.stem, fused.stages[1].blocks, fused.stages[1].blocks[0], fused.stages[1].downsample, fused.head
    inputs = (3, 64, 96), (3, 64, 96), (5, 6, 24), (5, 6, 24), (16, 5, 6), (48, 2, 3)
    for part, shape in zip(parts, inputs, strict=True):
        torch._dynamo.reset()
        compiled = torch.compile(part, fullgraph=True, dynamic=True, backend="aot_eager")
        for batch in (2, 3):
            x = torch.randn(batch, *shape)
            assert torch.equal(compiled(x), part(x))


@torch.no_grad()
def test_export_takes_the_reference_unless_told(fused: nn.Module) -> None:
    x = torch.randn(2, 3, 64, 96)
    program = torch.export.export(fused, (x,))
    assert not any("conv2former" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), fused(x), rtol=1e-4, atol=1e-5)
    with ops.use_backend("cpp"):
        program = torch.export.export(fused, (x,))
        assert operators(lambda: program.module()(x)) == ALL
        torch.testing.assert_close(program.module()(x), fused(x))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", ["script", "trace"])
def test_torchscript_is_plain(fused: nn.Module, way: str) -> None:
    x = torch.randn(2, 3, 64, 96)
    script = torch.jit.script(fused) if way == "script" else torch.jit.trace(fused, x)
    assert not operators(lambda: script(x))
    torch.testing.assert_close(script(x), fused(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_symbolic_tracing_leaves_them_whole(fused: nn.Module) -> None:
    x, traced = torch.randn(2, 3, 65, 50), torch.fx.symbolic_trace(fused)
    assert operators(lambda: traced(x)) == ALL
    assert torch.equal(traced(x), fused(x))


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (65, 50)], ids=str)
def test_multiply_adds_are_counted(size: tuple[int, int], fill: Any) -> None:
    """Fused or not, by whatever code: nothing that is counted goes, since norms and scales never were."""
    model, counts = build("conv2former_test", fill), set()
    for network in (model, copy.deepcopy(model).fuse()):
        for choice in ("auto", "reference"):
            with ops.use_backend(choice), FlopCounterMode(display=False) as counter:
                network(torch.zeros(2, 3, *size))
            counts.add(counter.get_total_flops())
    assert len(counts) == 1 and counts != {0}


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (65, 98)], ids=str)
@pytest.mark.parametrize("name", ["conv2former_is_conv3", "conv2former_test"])
def test_networks_compute_the_same(name: str, size: tuple[int, int], fill: Any) -> None:
    """Float32, to 1e-5 of the largest value; with strides 4 and 2 in the embedding of the isotropic one."""
    model, x = build(name, fill).fuse(), torch.randn(2, 3, *size)
    with ops.use_backend("cpp"):
        assert operators(lambda: model(x)) == expected(len(model.stages))
        mine = model(x)
    with ops.use_backend("reference"):
        plain = model(x)
    assert (mine - plain).abs().max() <= 1e-5 * plain.abs().max()
