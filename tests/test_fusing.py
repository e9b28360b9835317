"""``fuse``: the same network in evaluation with fewer operations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import SelectAdaptivePool2d
from timm.utils.model import reparameterize_model
from torch import nn

import conv2former  # noqa: F401  registers the names
from conv2former.engine.batchnorm import freeze
from conv2former.models.fused import FusedBlock
from conv2former.ops import block_weights

SMALL: dict[str, dict[str, Any]] = {
    "conv2former_t": dict(depths=(1, 1, 2, 1)),
    "conv2former_test": dict(stem_stride=2),
    "conv2former_t_l1": dict(dims=(16, 24, 32, 48), depths=(1, 1, 1, 1)),
    "conv2former_is": dict(dim=32, depth=2),
    "conv2former_is_conv3": dict(dim=32, depth=2),
}


def build(name: str, fill: Any, **arguments: Any) -> nn.Module:
    return fill(timm.create_model(name, num_classes=7, **(SMALL[name] | arguments))).eval()


@pytest.mark.parametrize("size", [(64, 64), (65, 98), (33, 47)], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_same_outputs(name: str, size: tuple[int, int], fill: Any) -> None:
    """To 1e-5 in float32 of the largest value, at even and odd sizes: the borders are where a norm is hard to move."""
    model, x = build(name, fill), torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = model(x)
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        fused = copy.deepcopy(model).fuse()
        for mine, theirs in (
            (fused(x), expected),
            (fused.forward_head(fused.forward_features(x), pre_logits=True), features),
        ):
            assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    blocks = [module for module in fused.modules() if isinstance(module, FusedBlock)]
    assert bool(blocks) == (name != "conv2former_t_l1")


def test_no_layer_scale(fill: Any) -> None:
    model, x = build("conv2former_test", fill, ls_init_value=None), torch.randn(1, 3, 64, 64)
    expected = model(x)
    torch.testing.assert_close(model.fuse()(x), expected, rtol=1e-4, atol=1e-5)


def test_a_frozen_stem_is_fused(fill: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Fine-tuning on few images freezes batch norm; its evaluations are as fast as others."""
    model, x = build("conv2former_test", fill), torch.randn(1, 3, 64, 64)
    freeze(model)
    expected = model(x)
    torch.testing.assert_close(model.fuse()(x), expected, rtol=1e-4, atol=1e-5)
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)] and not caplog.records


def test_timm_fuses_it_and_leaves_the_original(fill: Any) -> None:
    """``timm.utils.reparameterize_model``, which timm's scripts call for --reparam."""
    model, x = build("conv2former_test", fill), torch.randn(1, 3, 64, 64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused = reparameterize_model(model)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(dtype: torch.dtype, fill: Any) -> None:
    model, x = build("conv2former_test", fill), torch.randn(2, 3, 64, 64)
    expected = model(x)
    mine = model.to(dtype).fuse()(x.to(dtype))
    assert mine.dtype == dtype
    assert (mine - expected).abs().max() <= (1e-4 if dtype == torch.float64 else 0.1) * expected.abs().max()


def test_fewer_operations(fill: Any) -> None:
    """W1 and W2 are one product, norms' affine parts and layer scales are gone: blocks have one row of weights."""
    fused = build("conv2former_test", fill).fuse()
    block = fused.stages[0].blocks[0]
    assert [name for name, _ in block.named_parameters()] == ["weights"] and not list(block.children())
    w, *_ = block_weights(block.weights, 16, 64, 5)
    assert w.shape == (32, 16)


MAXIMUM = SelectAdaptivePool2d(pool_type="max", flatten=True, input_fmt="NHWC")
HEADS: dict[str, Any] = {
    "no pooling": lambda model: model.reset_classifier(7, ""),
    "another pooling": lambda model: model.reset_classifier(7, "max"),
    "another pooling, put there": lambda model: setattr(model.head, "global_pool", MAXIMUM),
    "no classes": lambda model: model.reset_classifier(0),
    "other classes": lambda model: model.reset_classifier(3),
    "no classifier": lambda model: setattr(model.head, "fc", nn.Identity()),
    "no bias": lambda model: setattr(model.head, "fc", nn.Linear(64, 5, bias=False)),
    "another classifier": lambda model: setattr(model.head, "fc", nn.Sequential(nn.Linear(64, 5))),
    "no norm": lambda model: setattr(model.head, "norm", nn.Identity()),
}


@torch.no_grad()
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("change", HEADS)
def test_heads_of_other_kinds_compute_as_before(change: str, before: bool, fill: Any) -> None:
    """Whether something is exchanged before the network is fused, or behind."""
    x, networks = torch.randn(2, 3, 64, 64), []
    for fuse in (False, True):
        model = build("conv2former_test", fill)
        if fuse and not before:
            model.fuse()
        HEADS[change](model)
        for parameter in model.head.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        networks.append(model.fuse() if fuse and before else model)
    plain, fused = networks
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)


def test_a_fused_head_that_trains_drops_out(fill: Any) -> None:
    model, x = build("conv2former_test", fill, drop_rate=0.5), torch.randn(2, 3, 64, 64)
    model = reparameterize_model(model.train())
    assert not torch.equal(model(x), model(x))


def test_twice_is_once(fill: Any) -> None:
    model, x = build("conv2former_test", fill), torch.randn(1, 3, 64, 64)
    expected = model.fuse()(x)
    assert torch.equal(reparameterize_model(model.fuse())(x), expected)
    assert not expected.requires_grad


def test_a_fused_network_can_be_scripted_and_traced(fill: Any) -> None:
    model, x = build("conv2former_test", fill).fuse(), torch.randn(1, 3, 65, 64)
    expected = model(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.jit.script(model)(x), expected, rtol=1e-4, atol=1e-4)
