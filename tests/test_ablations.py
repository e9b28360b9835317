"""The paper's alternatives to the Hadamard product (Fig. 4b, Table 6)."""

from __future__ import annotations

import ast
import inspect
import math

import pytest
import timm
import torch
from torch import Tensor, nn

import conv2former.models.conv2former
from conv2former.models.ablations import WEIGHTINGS, L1Mod, LinearMod, SigmoidMod, SumMod
from conv2former.models.conv2former import ConvMod

EPS = 1e-6


def by_hand(weighting: type[ConvMod], a: list[float], v: list[float]) -> list[float]:
    """Z at one position with C = len(a) channels, number by number."""
    if weighting is SumMod:
        return [x + y for x, y in zip(a, v, strict=True)]
    if weighting is SigmoidMod:
        return [y / (1 + math.exp(-x)) for x, y in zip(a, v, strict=True)]
    if weighting is L1Mod:
        return [x / sum(abs(e) for e in a) * y for x, y in zip(a, v, strict=True)]
    low, high = min(a), max(a)
    return [(x - low + EPS) / (high - low + EPS) * y for x, y in zip(a, v, strict=True)]


@pytest.mark.parametrize("weighting", WEIGHTINGS.values())
def test_against_the_formula(weighting):
    """Each position by itself, over its channels."""
    mod = weighting(3, 5)
    a, v = torch.randn(2, 3, 4, 3), torch.randn(2, 3, 4, 3)
    z = mod.combine(a, v)
    expected = [by_hand(weighting, x, y) for x, y in zip(a.view(-1, 3).tolist(), v.view(-1, 3).tolist(), strict=True)]
    torch.testing.assert_close(z.view(-1, 3), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        (SumMod, [2.0, 2.0, -3.0, 8.0]),
        (SigmoidMod, [0.7310586, 1.0, -0.1192029, 3.9280552]),
        (L1Mod, [1 / 7, 0.0, 2 / 7, 16 / 7]),
        (LinearMod, [3 / 6, 4 / 6, 0.0, 4.0]),
    ],
)
def test_worked_example(weighting, expected):
    """A = (1, 0, -2, 4) has |A| = 7 and the range [-2, 4]; V = (1, 2, -1, 4)."""
    a, v = torch.tensor([[[[1.0, 0.0, -2.0, 4.0]]]]), torch.tensor([[[[1.0, 2.0, -1.0, 4.0]]]])
    torch.testing.assert_close(weighting(4, 3).combine(a, v)[0, 0, 0], torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS.values())
def test_layer(weighting, fill):
    """The whole layer: the parameters of ConvMod by name and shape, A and V made as there, only the fusion differs."""
    mod, plain = fill(weighting(8, 5)), fill(ConvMod(8, 5))
    assert {k: v.shape for k, v in mod.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    x = torch.randn(2, 6, 7, 8)
    expected = mod.proj(mod.combine(plain.modulation_weights(x), plain.w2(x)))
    torch.testing.assert_close(mod(x), expected)
    assert (mod(x) - plain(x)).abs().max() > 0.05


@pytest.mark.parametrize("weighting", WEIGHTINGS.values())
def test_gradients(weighting):
    """Against finite differences of the formula, in float64 outside and float32 inside."""
    mod = weighting(4, 3)
    a, v = torch.randn(1, 2, 2, 4, requires_grad=True), torch.randn(1, 2, 2, 4, requires_grad=True)
    direction_a, direction_v, out = torch.randn_like(a), torch.randn_like(v), torch.randn_like(a)

    def along(t: float) -> float:
        rows_a, rows_v = (a + t * direction_a).view(-1, 4).tolist(), (v + t * direction_v).view(-1, 4).tolist()
        z = torch.tensor([by_hand(weighting, x, y) for x, y in zip(rows_a, rows_v, strict=True)])
        return float((z.double() * out.view(-1, 4).double()).sum())

    (mod.combine(a, v) * out).sum().backward()
    slope = float((a.grad * direction_a).sum() + (v.grad * direction_v).sum())
    assert slope == pytest.approx((along(1e-2) - along(-1e-2)) / 2e-2, rel=0.02, abs=0.02)


def test_l1_weights_sum_to_one():
    weights = L1Mod(6, 3).combine(torch.randn(2, 3, 3, 6), torch.ones(2, 3, 3, 6))
    torch.testing.assert_close(weights.abs().sum(-1), torch.ones(2, 3, 3))


def test_linear_weights_lie_in_the_half_open_interval():
    """(0, 1]: the largest is 1, the least above 0, whatever the range."""
    for scale in (1e-6, 1.0, 1e3, 1e6):
        weights = LinearMod(6, 3).combine(scale * torch.randn(2, 3, 3, 6), torch.ones(2, 3, 3, 6))
        assert (weights > 0).all()
        assert (weights.amax(-1) == 1).all()
        assert (weights <= 1).all()


@pytest.mark.parametrize(("weighting", "expected"), [(L1Mod, 1 / 6), (LinearMod, 1.0)])
def test_constant_weights(weighting, expected):
    """Equal channels get equal weights: 1 / C, or 1."""
    v = torch.randn(1, 2, 2, 6)
    torch.testing.assert_close(weighting(6, 3).combine(torch.full_like(v, 2.5), v), expected * v)


@pytest.mark.parametrize("weighting", WEIGHTINGS.values())
@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [
        (torch.float32, 0.0),
        (torch.float32, 1e-30),
        (torch.float32, 1e30),
        (torch.float16, 0.0),
        (torch.float16, 6e4),
        (torch.bfloat16, 0.0),
        (torch.bfloat16, 1e30),
    ],
)
def test_extreme_weights(weighting, dtype, magnitude):
    """A of zeros, tiny or huge: finite results in V's dtype. Norms and ranges in float16 would overflow."""
    a = (torch.tensor([1.0, -1.0, 0.5, 1.0] * 8) * magnitude).to(dtype).view(1, 1, 1, 32).requires_grad_()
    v = torch.linspace(-1, 1, 32).to(dtype).view(1, 1, 1, 32).requires_grad_()
    z = weighting(32, 3).combine(a, v)
    assert z.dtype == dtype
    assert z.isfinite().all()
    z.sum().backward()
    assert v.grad.isfinite().all()
    if not (weighting in (L1Mod, LinearMod) and dtype == torch.float16 and magnitude == 0):
        assert a.grad.isfinite().all()  # the exception's slope, V / eps, is beyond float16
    if weighting is LinearMod and magnitude == 0:
        torch.testing.assert_close(z, v)
    if weighting is L1Mod and magnitude == 6e4:
        expected = a.float() / a.float().abs().sum() * v.float()
        torch.testing.assert_close(z.float(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weighting", WEIGHTINGS.values())
def test_autocast(weighting, fill):
    mod = fill(weighting(16, 5))
    x = torch.randn(2, 6, 6, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = mod(x)
    assert z.dtype == torch.bfloat16
    torch.testing.assert_close(z.float(), mod(x), rtol=0.05, atol=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Networks


REGISTERED: dict[str, type[ConvMod]] = {
    "conv2former_n_sum": SumMod,
    "conv2former_t_sum": SumMod,
    "conv2former_s_sum": SumMod,
    "conv2former_b_sum": SumMod,
    "conv2former_l_sum": SumMod,
    "conv2former_t_sigmoid": SigmoidMod,
    "conv2former_t_l1": L1Mod,
    "conv2former_t_linear": LinearMod,
}


def modulations(model: nn.Module) -> set[type]:
    return {type(m) for m in model.modules() if isinstance(m, ConvMod)}


def test_registered_names():
    assert sorted(timm.list_models(module="ablations")) == sorted(REGISTERED)


@pytest.mark.parametrize(("name", "weighting"), REGISTERED.items())
def test_registered_network(name, weighting, on_meta):
    """The weighting in every block, and else the network without suffix: names, shapes, features, configuration."""
    model, plain = on_meta(name), on_meta(name.rsplit("_", 1)[0])
    assert modulations(model) == {weighting}
    assert modulations(plain) == {ConvMod}
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert model.feature_info == plain.feature_info
    different = {k for k in model.default_cfg if model.default_cfg[k] != plain.default_cfg.get(k)}
    assert different == {"architecture"}
    assert model.default_cfg["architecture"] == name


@pytest.mark.parametrize(("name", "weighting"), [("conv2former_test", SumMod), ("conv2former_is", LinearMod)])
def test_weighting_as_an_argument(name, weighting):
    arguments = dict(dim=8, depth=2) if name == "conv2former_is" else {}
    assert modulations(timm.create_model(name, mod_layer=weighting, **arguments)) == {weighting}


def test_weightings_make_different_networks(fill):
    """From the same weights."""
    x = torch.randn(1, 3, 64, 64)
    outputs: list[Tensor] = []
    for name in ["conv2former_t", *(f"conv2former_t_{weighting}" for weighting in WEIGHTINGS)]:
        model = fill(timm.create_model(name, dims=(8, 12, 16, 24), depths=(1, 1, 1, 1), num_classes=10)).eval()
        outputs.append(model(x))
    for i, one in enumerate(outputs):
        assert all((one - other).abs().max() > 1e-3 for other in outputs[:i])


def test_the_model_knows_nothing_of_them():
    """``model.py`` imports nothing from here and names no alternative in code (its docstrings may)."""
    tree = ast.parse(inspect.getsource(conv2former.models.conv2former))
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    known = {f"conv2former.{name}" for name in ("models.classifier", "models.fused", "models.layers", "ops")}
    assert {name for name in imported if "conv2former" in (name or "")} == known
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    names |= {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    assert not names & {weighting.__name__ for weighting in WEIGHTINGS.values()}
    assert not any("ablation" in name.lower() for name in names)
