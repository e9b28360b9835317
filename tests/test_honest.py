"""What one does to a module shows in the network's output: with kernels and without, compiled, and after ``fuse``.

ConvNeXt passes all of this because its forward calls its modules. Ours leaves some uncalled where a fused operation
computes the same, and must notice when it does not.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

import conv2former  # noqa: F401  registers the names
from conv2former import ops
from conv2former.ops import backend, guard
from test_ops import automatic, needs_compiler  # noqa: F401  `automatic` is a fixture for all tests here

NAMES = timm.list_models("conv2former*")
KINDS = [f"conv2former_{kind}" for kind in ("t", "is", "is_conv3", "t_sum", "t_sigmoid", "t_l1", "t_linear")]
EACH = [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in NAMES]
FEW = [  # a pyramid, a row of blocks, another weighting: what is changed are layers that all networks have
    pytest.param(name, marks=() if name.endswith(("_t", "_is", "_t_l1")) else pytest.mark.slow) for name in NAMES
]
MODULATED = [name for name in NAMES if not any(part in name for part in ("_sum", "_sigmoid", "_l1", "_linear"))]
Change = Callable[[nn.Module], Any]


@pytest.fixture(autouse=True)
def silent_cache() -> Iterator[None]:
    """What is said once is said once for each test."""
    yield
    guard.warn_once.cache_clear()


def build(name: str) -> nn.Module:
    """Small, and wide enough for the kernels; the values in it are of magnitude 1."""
    torch.manual_seed(0)
    sizes = dict(dim=32, depth=2) if name.startswith("conv2former_i") else dict(dims=(32, 48), depths=(1, 1))
    model = timm.create_model(name, head_hidden_size=40, num_classes=10, ls_init_value=1.0, **sizes)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def images() -> Tensor:
    return torch.sin(torch.arange(2 * 3 * 64 * 48.0)).view(2, 3, 64, 48)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """To 1e-4 of the largest value."""
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def calls(model: nn.Module) -> tuple[set[str], set[str], Tensor]:
    """The names of the modules without children, those of which were called, and the output."""
    called: set[str] = set()
    leaves = {name: module for name, module in model.named_modules() if not list(module.children())}
    for name, module in leaves.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    return set(leaves), called, model(images())


@torch.no_grad()
@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("name", EACH)
def test_every_hook_is_called(name: str, choice: str, fuse: bool) -> None:
    model = build(name)
    expected = model(images())
    with ops.use_backend(choice):
        leaves, called, out = calls(model.fuse() if fuse else model)
    assert called == leaves
    assert_close(out, expected)


def doctor(conv: nn.Module) -> None:
    """As accelerate does: a forward on the instance."""
    forward = conv.forward
    conv.forward = lambda x: forward(x).abs()


class Adapted(nn.Conv2d):
    """As an adapter does: the layer and something beside it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


def adapt(layer: nn.Module) -> None:
    layer.dwconv.__class__ = Adapted


def dilate(layer: nn.Module) -> None:
    conv = layer.dwconv
    conv.dilation, conv.padding = (2, 2), tuple(2 * side for side in conv.padding)


def reflect(layer: nn.Module) -> None:
    dim = len(layer.dwconv.weight)
    layer.dwconv = nn.Conv2d(dim, dim, 5, padding=2, padding_mode="reflect")


# Done to `mod` or `mlp` of a block
CHANGES: dict[str, Change] = {
    "another activation": lambda layer: setattr(layer, "act", nn.ReLU()),
    "dilation": dilate,
    "a dense convolution with other padding": reflect,
    "a hook before the convolution": lambda layer: layer.dwconv.register_forward_pre_hook(lambda m, x: (0 * x[0],)),
    "a hook behind the activation": lambda layer: layer.act.register_forward_hook(lambda m, x, y: 0 * y),
    "a forward of its own": lambda layer: doctor(layer.dwconv),
    "a convolution of its own": lambda layer: setattr(layer.dwconv, "_conv_forward", lambda x, *_: 0 * x),
    "an adapter": adapt,
    "pruning": lambda layer: prune.l1_unstructured(layer.dwconv, "weight", amount=0.8),
    "spectral norm by hook": lambda layer: spectral_norm(layer.dwconv),
    "spectral norm by parametrization": lambda layer: parametrizations.spectral_norm(layer.dwconv),
    "no bias": lambda layer: layer.dwconv.register_parameter("bias", None),
}


@torch.no_grad()
@pytest.mark.parametrize("part", ["mod", "mlp"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", FEW)
def test_a_change_shows(name: str, change: str, part: str) -> None:
    """It changes the output, to the same with kernels and without, and after ``fuse``."""
    model = build(name)
    untouched = model(images())
    CHANGES[change](getattr(model.stages[-1].blocks[-1], part))
    model.eval()
    with ops.use_backend("reference"):
        expected = model(images())
    assert (expected - untouched).abs().max() > 1e-3 * untouched.abs().max()
    assert_close(model(images()), expected)
    assert_close(model.fuse()(images()), expected)


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("name", FEW)
def test_a_change_shows_compiled(name: str) -> None:
    """What was done before compiling; the other layers stay fused."""
    model = build(name)
    for change, part in (("a hook before the convolution", "mod"), ("another activation", "mlp")):
        CHANGES[change](getattr(model.stages[-1].blocks[-1], part))
    operators: list[str] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        operators.extend(str(node.target) for node in graph.graph.nodes if "conv2former" in str(node.target))
        return graph

    torch._dynamo.reset()
    out = torch.compile(model, backend=look, fullgraph=True)(images())
    torch._dynamo.reset()
    with ops.use_backend("reference"):
        assert_close(out, model(images()))
    names = ["mlp_middle"] if name not in MODULATED else ["mlp_middle", "modulation"]
    assert sorted(operators) == [f"conv2former.{name}.default" for name in names]


@torch.no_grad()
@pytest.mark.parametrize("change", ["stem", "downsample", "norm", "w1", "proj", "fc1", "scale", "blocks", "head"])
def test_what_was_done_before_is_still_there_when_fused(change: str, caplog: pytest.LogCaptureFixture) -> None:
    """A part with a hook stays as it is, and a line says so; the head has its layers still, and says nothing."""
    model = build("conv2former_t")
    block = model.stages[1].blocks[0]
    places = {"stem": model.stem.act, "downsample": model.stages[1].downsample[0], "norm": block.norm1}
    places |= {"w1": block.mod.w1, "proj": block.mod.proj, "fc1": block.mlp.fc1, "scale": block.ls1}
    places |= {"blocks": model.stages[1].blocks, "head": model.head.act}
    places[change].register_forward_hook(lambda module, given, out: 2 * out)
    expected = model(images())
    with caplog.at_level(logging.WARNING):
        assert_close(model.fuse()(images()), expected)
    said = ["fuse() leaves" in line and "has a hook" in line for line in caplog.messages]
    assert said == [True] * (change != "head")


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def doubling(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass that gives twice as much."""
    return type(f"Doubled{kind.__name__}", (kind,), {"forward": lambda self, *given: 2 * kind.forward(self, *given)})


def narrow(mod: Any) -> None:
    """Structured pruning: the modulation at half its width."""
    mod.w1, mod.w2, mod.proj = nn.Linear(48, 24), nn.Linear(48, 24), nn.Linear(24, 48)
    mod.dwconv = nn.Conv2d(24, 24, 11, padding=5, groups=24)


def subclass(module: nn.Module) -> None:
    module.__class__ = doubling(type(module))


# What stands in the way of fusing and is neither a hook nor a layer that was looked at above
STRUCTURES: dict[str, Change] = {
    "stem of another class": lambda model: subclass(model.stem),
    "blocks of another class": lambda model: subclass(model.stages[1].blocks),
    "block of another class": lambda model: subclass(model.stages[1].blocks[0]),
    "downsampling of another class": lambda model: subclass(model.stages[1].downsample),
    "longer downsampling": lambda model: model.stages[1].downsample.append(nn.ReLU()),
    "larger stride of the stem": lambda model: setattr(model.stem, "conv3", nn.Conv2d(16, 32, 4, 4, bias=False)),
    "uneven stride": lambda model: setattr(model.stem, "conv1", nn.Conv2d(3, 16, 3, (2, 1), 1, bias=False)),
    "narrow modulation": lambda model: narrow(model.stages[1].blocks[0].mod),
    "larger kernel in the MLP": lambda model: setattr(
        model.stages[1].blocks[0].mlp, "dwconv", nn.Conv2d(192, 192, 5, padding=2, groups=192)
    ),
    "another dropout": lambda model: setattr(model.head, "drop", Doubled()),
    "another pooling": lambda model: subclass(model.head.global_pool.pool),
    "pooling that leaves dimensions": lambda model: setattr(
        model.head, "global_pool", SelectAdaptivePool2d(pool_type="avg", flatten=False, input_fmt="NHWC")
    ),
    "something behind the pooling": lambda model: setattr(model.head.global_pool, "flatten", Doubled()),
}


@torch.no_grad()
@pytest.mark.parametrize("change", STRUCTURES)
def test_other_structures_survive_fusing(change: str) -> None:
    model = build("conv2former_t")
    untouched = model(images())
    STRUCTURES[change](model)
    expected = model.eval()(images())
    found = copy.deepcopy(model).fuse()(images())
    assert expected.shape != untouched.shape or (expected - untouched).abs().max() > 1e-3 * untouched.abs().max()
    assert found.shape == expected.shape
    assert_close(found, expected)


@needs_compiler
@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_nothing_is_said_of_what_is_exported(caplog: pytest.LogCaptureFixture) -> None:
    """There an operation is fused only by a backend that was chosen by name."""
    model = build("conv2former_t")
    model.stages[0].blocks[0].mod.act = nn.ReLU()
    torch.jit.trace(model, images(), check_trace=False)  # the check would run the network itself
    torch.export.export(model, (images(),))
    ours = lambda: [record.message for record in caplog.records if record.name == "conv2former.ops"]  # noqa: E731
    assert not ours()
    with ops.use_backend("cpp"):
        torch.export.export(model, (images(),))
    assert len(ours()) == 1 and "a ReLU" in ours()[0]


@torch.no_grad()
def test_a_longer_embedding() -> None:
    model = build("conv2former_is_conv3")
    model.stem.proj.append(nn.ReLU())
    expected = model(images())
    assert_close(model.fuse()(images()), expected)


@needs_compiler
def test_compiled_transforms() -> None:
    """``torch.func`` under ``torch.compile``: plain PyTorch's gradients, as without compiling."""
    model, x = build("conv2former_t"), images()
    parameters = dict(model.named_parameters())

    def gradients(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        return torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)

    torch._dynamo.reset()
    found = torch.compile(gradients, backend="eager")(parameters)
    torch._dynamo.reset()
    for key, gradient in gradients(parameters).items():
        assert_close(found[key], gradient)


def test_weights_of_another_dtype_are_pytorchs_mistake() -> None:
    model = build("conv2former_t")
    model.stages[0].blocks[0].mod.dwconv.bfloat16()
    with pytest.raises(RuntimeError, match="should be the same"):
        model(images())


@torch.no_grad()
def test_hooks_for_all_modules() -> None:
    model, seen = build("conv2former_t"), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, out: seen.append(module))
    try:
        model(images())
        block = model.stages[0].blocks[0]
        assert {block.mod.act, block.mod.dwconv, block.mlp.act, block.mlp.dwconv} <= set(seen)
    finally:
        handle.remove()


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_a_profiler_that_exchanges_pytorchs_functions(fuse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As calflops and DeepSpeed do, to count: they are called for every convolution and product."""
    model, x = build("conv2former_t"), images()
    expected = (model.fuse() if fuse else model)(x)
    counts = {"conv2d": 0, "linear": 0}

    def counting(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*args: Any, **kwargs: Any) -> Tensor:
            counts[name] += 1
            return function(*args, **kwargs)

        return counted

    for name in counts:
        monkeypatch.setattr(nn.functional, name, counting(name, getattr(nn.functional, name)))
    assert_close(model(x), expected)
    assert counts == {"conv2d": 3 + 1 + 4, "linear": 2 + 2 * (4 if fuse else 5)}


@needs_compiler
@torch.no_grad()
def test_tensors_on_other_devices() -> None:
    """Kernels read memory by address: a tensor without any must never reach them."""
    u, weight, bias = torch.randn(1, 4, 4, 32), torch.randn(32, 1, 5, 5), torch.randn(32)
    assert backend.fused("modulation", u, weight, bias, u)
    assert not backend.fused("modulation", u, weight.to("meta"), bias, u)
    assert not backend.fused("modulation", u, weight, bias.to("meta"), u)
    assert not backend.fused("modulation", u, weight, bias, u.to("meta"))
    assert guard.not_gelu(nn.GELU(approximate="tanh")) and not guard.not_gelu(nn.GELU())  # 1e-5 apart


@needs_compiler
@torch.no_grad()
def test_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Why an operation is not fused where it could be: at WARNING, with the reason."""
    model = build("conv2former_t")
    for block in (model.stages[0].blocks[0], model.stages[1].blocks[0]):
        block.mod.act = nn.ReLU()
        block.mlp.dwconv.register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.WARNING, logger="conv2former.ops"):
        for _ in range(2):
            model(images())
        with ops.use_backend("reference"):
            model(images())
    assert caplog.messages == [
        "modulation on cpu is computed by plain PyTorch, because the activation, a ReLU, is not the exact GELU",
        "mlp_middle on cpu is computed by plain PyTorch, because a Conv2d has a hook",
    ]


@pytest.mark.parametrize("name", EACH)
def test_gradients_of_single_images(name: str) -> None:
    """``vmap(grad(...))`` of the whole network, as for differential privacy, against one image at a time."""
    model, x = build(name), images()
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (image[None],)).square().mean()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, image in enumerate(x):
        single = torch.autograd.grad(model(image[None]).square().mean(), list(parameters.values()))
        for gradient, key in zip(single, parameters, strict=True):
            assert (found[key][i] - gradient).abs().max() <= 1e-3 * gradient.abs().max() + 1e-6, key


def test_copies_have_hooks_of_their_own() -> None:
    model = build("conv2former_t")
    other = copy.deepcopy(model)
    other.stages[0].blocks[0].mod.dwconv.register_forward_hook(lambda m, x, y: 0 * y)
    with torch.no_grad():
        assert not torch.equal(model(images()), other(images()))


@torch.no_grad()
@pytest.mark.parametrize("name", ["conv2former_atto", "conv2former_t_sum"])
def test_state_dicts_are_those_of_before(name: str) -> None:
    """Hooks and parametrizations aside, a depthwise convolution is a plain ``nn.Conv2d``, its names as ever."""
    block = build(name).stages[0].blocks[0]
    assert type(block.mod.dwconv) is type(block.mlp.dwconv) is nn.Conv2d
    assert type(block.mod.act) is type(block.mlp.act) is nn.GELU
    assert [key for key in block.state_dict() if "dwconv" in key] == [
        f"{part}.dwconv.{kind}" for part in ("mod", "mlp") for kind in ("weight", "bias")
    ]
