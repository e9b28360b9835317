"""What timm's ``tests/test_models.py`` asks of every name, and tests/test_timm_contract.py does not.

That is torch.fx, scripts of its traces, networks cut off behind every stage. Then the options of timm's ConvNeXt.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import timm
import torch
from timm.models import create_feature_extractor
from torch import nn

from test_timm_contract import PYRAMIDS, assert_equal, images, name, small  # noqa: F401  two are fixtures

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated; timm's contract still has it


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_fx_then_script(small, fuse):  # noqa: F811
    """``test_model_forward_fx`` and ``test_model_forward_fx_torchscript``, also of a fused network."""
    model, x = small(), images(2)
    expected = model(x)
    traced = torch.fx.symbolic_trace(model.fuse() if fuse else model)
    close(traced(x), expected)
    close(torch.jit.script(traced)(x), expected)


def test_fx(small, name):  # noqa: F811
    """The traced network: outputs in evaluation, every gradient in training."""
    model = small(exportable=True)
    x = images(2)
    assert_equal([torch.fx.symbolic_trace(model)(x)], [model(x)], atol=1e-5)

    model.train()
    nodes = ["stages.3", "head.fc"] if name in PYRAMIDS else ["stages.0.blocks.4", "head.fc"]
    traced = create_feature_extractor(model, nodes).train()
    reference = copy.deepcopy(model)
    outputs = traced(x)
    assert list(outputs) == nodes
    outputs["head.fc"].square().mean().backward()
    reference(x).square().mean().backward()
    traced_grads = {k: p.grad for k, p in traced.named_parameters()}
    for key, p in reference.named_parameters():
        torch.testing.assert_close(
            traced_grads[key], p.grad, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_fx_keeps_the_modules(small):  # noqa: F811
    """A trace names the layers, as quantisation and feature extraction by name want it."""
    graph = torch.fx.symbolic_trace(small()).graph
    targets = {node.target for node in graph.nodes if node.op == "call_module"}
    assert {f"stages.0.blocks.0.{layer}" for layer in ("mod.act", "mod.dwconv", "mlp.act", "mlp.dwconv")} <= targets


def test_prune_at_every_index(small):  # noqa: F811
    """``test_prune_intermediate_layers_contract``: the same maps, no parameter left without use."""
    model, x = small(), images(2)
    taps = model.forward_intermediates(x, intermediates_only=True)
    whole = copy.deepcopy(model)
    whole.prune_intermediate_layers([len(taps) - 1], prune_head=False)
    close(whole(x), model(x))
    for i, tap in enumerate(taps):
        close(model.forward_intermediates(x, indices=[i], stop_early=True, intermediates_only=True)[0], tap)
        pruned = copy.deepcopy(model)
        kept = pruned.prune_intermediate_layers([i], prune_norm=True)
        close(pruned.forward_intermediates(x, indices=kept, intermediates_only=True)[0], tap)
        close(pruned.forward_features(x), tap)
        pruned.train().forward_features(x).sum().backward()
        assert not [key for key, parameter in pruned.named_parameters() if parameter.grad is None]


# ---------------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_output_stride(name, stride, small):  # noqa: F811
    """Every map has the stride that is announced, and the weights are those of the network with stride 32."""
    if name not in PYRAMIDS:
        if stride == 8:
            with pytest.raises(ValueError, match="output_stride is 8: this network can have 16, 32"):
                small(output_stride=8)
        else:
            model, same, x = small(output_stride=stride), small(), images()
            model.load_state_dict(same.state_dict())
            close(model(x), same(x))
        return
    model = small(output_stride=stride)
    assert [info["reduction"] for info in model.feature_info] == [min(4 * 2**i, stride) for i in range(4)]
    model.load_state_dict(small().state_dict())
    x = images(1, (64, 96))
    for info, found in zip(model.feature_info, model.forward_intermediates(x, intermediates_only=True), strict=True):
        assert found.shape[2:] == (64 // info["reduction"], 96 // info["reduction"])
    features = timm.create_model(name, features_only=True, output_stride=stride, dims=(8, 12, 16, 24), depths=(1,) * 4)
    assert features(x)[-1].shape == (1, 24, 64 // stride, 96 // stride)
    assert features.feature_info.reduction()[-1] == stride


@torch.no_grad()
def test_dilated_kernels_see_what_they_saw(fill):
    """A block with dilation 2 computes on every second position what the one without does on those positions alone.

    On positions of one parity, a convolution with dilation 2 is the one without on a map of half the size.
    """
    plain = fill(timm.create_model("conv2former_test", output_stride=32)).eval()
    dilated = timm.create_model("conv2former_test", output_stride=16).eval()
    dilated.load_state_dict(plain.state_dict())
    x = torch.randn(2, 14, 10, 48)
    block, same = dilated.stages[3].blocks[0], plain.stages[3].blocks[0]
    found = block(x)
    for i in (0, 1):
        for j in (0, 1):
            close(found[:, i::2, j::2], same(x[:, i::2, j::2]))


@pytest.mark.parametrize(
    ("options", "kind", "eps"),
    [
        (dict(act_layer="relu"), nn.ReLU, None),
        (dict(act_layer=nn.SiLU), nn.SiLU, None),
        (dict(norm_layer="rmsnorm"), timm.layers.RmsNorm, None),
        (dict(norm_layer=functools.partial(nn.LayerNorm, eps=1e-3)), nn.LayerNorm, 1e-3),
    ],
    ids=["relu", "silu", "rmsnorm", "another eps"],
)
def test_layers_of_other_kinds(name, options, kind, eps, small):  # noqa: F811
    model, x = small(**options), images(2)
    blocks = [block for stage in model.stages for block in stage.blocks]
    if "act_layer" in options:
        assert not any(isinstance(module, nn.GELU) for module in model.modules())
        assert all(type(block.mod.act) is type(block.mlp.act) is kind for block in blocks)
    else:
        norms = [norm for block in blocks for norm in (block.norm1, block.norm2)] + [model.head.norm]
        assert all(type(norm) is kind and (eps is None or norm.eps == eps) for norm in norms)
    expected = model(x)
    assert expected.isfinite().all() and not torch.equal(expected, small()(x))
    close(copy.deepcopy(model).fuse()(x), expected)


@pytest.mark.parametrize("layer", ["batchnorm2d", "groupnorm", "layernorm2d", "norm"])
def test_norms_of_maps_are_refused(layer):
    with pytest.raises(ValueError, match=f"norm_layer is '{layer}': use layernorm, "):
        timm.create_model("conv2former_test", norm_layer=layer)


def test_an_unknown_activation():
    with pytest.raises(ValueError, match="act_layer is 'nope': use a name of timm's"):
        timm.create_model("conv2former_test", act_layer="nope")


def test_head_init_scale(small):  # noqa: F811
    torch.manual_seed(0)
    plain = timm.create_model("conv2former_test")
    torch.manual_seed(0)
    scaled = timm.create_model("conv2former_test", head_init_scale=0.5)
    assert torch.equal(scaled.head.fc.weight, 0.5 * plain.head.fc.weight)
    assert torch.equal(scaled.head.conv.weight, plain.head.conv.weight)
