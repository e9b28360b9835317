"""Every registered name keeps timm's contract: what timm's tests ask of a model of its own, and what its docs promise.

What depends on the full size runs on the meta device (shapes, names) or once with weights (``test_full_size``). The
rest goes through the same entrypoints with small widths and depths. One name of each kind is a default test.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_model_data_config
from timm.layers import DropPath
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import conv2former  # noqa: F401  registers the names

NAMES = timm.list_models("conv2former*")
# one of each kind: a pyramid, one for smaller images, both embeddings of a row of blocks; the other weightings, whose
# arithmetic tests/test_ablations.py has, are slow tests
KINDS = [f"conv2former_{kind}" for kind in ("t", "test", "is", "is_conv3")]
EACH = [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in NAMES]
PYRAMIDS = [name for name in NAMES if not name.startswith("conv2former_i")]

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated; timm's contract still has it


@pytest.fixture(params=EACH)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def small(name: str, fill: Callable[[nn.Module], nn.Module]) -> Callable[..., nn.Module]:
    """A function that builds the small version of ``name`` for evaluation, with further arguments."""

    def build(**kwargs: Any) -> nn.Module:
        return fill(timm.create_model(name, **(small_args(name) | kwargs))).eval()

    return build


def small_args(name: str) -> dict[str, Any]:
    """Widths and depths that make any of the networks small. Kernel, embedding and weighting stay those of the name."""
    args: dict[str, Any] = dict(head_hidden_size=20, num_classes=10)
    return args | (dict(dims=(8, 12, 16, 24), depths=(1, 1, 2, 1)) if name in PYRAMIDS else dict(dim=16, depth=5))


def images(batch: int = 1, size: tuple[int, int] = (64, 48)) -> Tensor:
    return torch.randn(batch, 3, *size)


def assert_equal(actual: list[Tensor], expected: list[Tensor], atol: float = 0.0) -> None:
    """The same tensors in the same order, and something in them."""
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_names():
    assert len(NAMES) == 21
    assert not timm.list_models("conv2former*", pretrained=True), "weights are announced"


# ---------------------------------------------------------------------------------------------------------------------
# Full size


@pytest.mark.parametrize("name", EACH)
def test_full_size(name):
    """With all weights, in training and in evaluation: finite outputs, a finite gradient for every parameter."""
    model = timm.create_model(name, num_classes=42)
    y = model(images(2, (64, 64)))
    assert y.shape == (2, 42)
    y.mean().backward()
    assert not [k for k, p in model.named_parameters() if p.grad is None]
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()
    with torch.inference_mode():
        assert model.eval()(images()).isfinite().all()


def test_default_cfg(name, on_meta):
    """The configuration tells the truth about the network, at its own input size; every parameter gets a gradient."""
    model = on_meta(name)
    cfg = model.default_cfg
    assert model.num_classes == cfg["num_classes"] == 1000
    assert model.in_chans == cfg["input_size"][0] == 3
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert model.state_dict()[f"{cfg['classifier']}.weight"].shape == (1000, model.head_hidden_size)
    assert model.state_dict()[f"{cfg['first_conv']}.weight"].shape[1] == 3

    features = model.forward_features(torch.empty(1, *cfg["input_size"], device="meta"))
    assert features.shape == (1, model.num_features, *cfg["pool_size"])
    assert model.feature_info[-1]["num_chs"] == model.num_features
    y = model.forward_head(features)
    assert y.shape == (1, 1000)
    gradients = torch.autograd.grad(y.mean(), list(model.parameters()))
    assert [g.shape for g in gradients] == [p.shape for p in model.parameters()]


def test_smallest_input(small):
    """``min_input_size`` is taken, and leaves one position."""
    model = small()
    features = model.forward_features(images(1, model.default_cfg["min_input_size"][1:]))
    assert features.shape[-2:] == (1, 1)
    assert model.forward_head(features).isfinite().all()


@pytest.mark.parametrize("size", ["b", "l"])
def test_configuration_for_384(size, on_meta):
    cfg = on_meta(f"conv2former_{size}.untrained_384").default_cfg
    assert (cfg["input_size"], cfg["pool_size"], cfg["crop_pct"]) == ((3, 384, 384), (12, 12), 1.0)
    assert on_meta(f"conv2former_{size}").default_cfg["input_size"] == (3, 224, 224)


def test_data_config(name, on_meta):
    """The preprocessing that timm derives, with the authors' mean and deviation."""
    config = resolve_model_data_config(on_meta(name))
    size = 64 if name == "conv2former_test" else 224
    assert config["input_size"] == (3, size, size)
    assert (config["mean"], config["std"]) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert (config["interpolation"], config["crop_pct"], config["crop_mode"]) == ("bicubic", 0.9, "center")


@pytest.mark.parametrize("coarse", [False, True], ids=["fine", "coarse"])
def test_layer_groups(name, coarse, on_meta):
    """Each parameter is in one group; ids rise from the stem over the blocks to the classifier."""
    model = on_meta(name)
    ids = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert ids.keys() == {k for k, _ in model.named_parameters()}
    ordered = [ids[k] for k, _ in model.named_parameters()]
    assert ordered == sorted(ordered)
    assert {v for k, v in ids.items() if k.startswith("stem.")} == {0}
    assert {k for k, v in ids.items() if v == 0} == {k for k in ids if k.startswith("stem.")}
    assert sorted(set(ordered)) == list(range(max(ordered) + 1))
    blocks = sum(len(stage.blocks) for stage in model.stages)
    assert max(ordered) + 1 == (len(model.stages) if coarse else blocks) + 2
    last = {k for k, v in ids.items() if v == max(ordered)}
    expected = {k for k in ids if k.startswith("head." if coarse else "head.fc.")}
    assert last == expected


def test_layer_decay(name, on_meta):
    """timm's layer-wise decay takes all parameters once: full rate at the classifier, least at the stem."""
    model = on_meta(name)
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, layer_decay=0.9, no_weight_decay_list=model.no_weight_decay()
    )
    of_parameter = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(of_parameter) == len(list(model.parameters()))
    blocks = sum(len(stage.blocks) for stage in model.stages)
    for key, p in model.named_parameters():
        assert of_parameter[id(p)]["weight_decay"] == (0 if p.ndim == 1 else 0.05), key
        if key.startswith("stem."):
            assert of_parameter[id(p)]["lr_scale"] == pytest.approx(0.9 ** (blocks + 1))
        if key.startswith("head.fc"):
            assert of_parameter[id(p)]["lr_scale"] == 1


def test_no_weight_decay_names_parameters(name, on_meta):
    model = on_meta(name)
    assert model.no_weight_decay() <= {k for k, _ in model.named_parameters()}


# ---------------------------------------------------------------------------------------------------------------------
# The head


def test_forward_is_features_then_head(small):
    model = small()
    x = images()
    features = model.forward_features(x)
    assert_equal([model.forward_head(features)], [model(x)])
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (1, model.head_hidden_size)
    assert_equal([model.get_classifier()(pre_logits)], [model(x)])


def test_reset_classifier(small):
    model = small()
    x = images(2)
    height, width = model.forward_features(x).shape[-2:]
    pre_logits = model.forward_head(model.forward_features(x), pre_logits=True)

    model.reset_classifier(0)
    assert model.num_classes == 0
    assert isinstance(model.get_classifier(), nn.Identity)
    assert_equal([model(x)], [pre_logits])

    model.reset_classifier(0, "")
    unpooled = model(x)
    assert unpooled.shape == (2, model.head_hidden_size, height, width)
    torch.testing.assert_close(unpooled.mean((2, 3)), pre_logits, rtol=0, atol=1e-5)

    model.reset_classifier(3, "")
    dense = model(x)
    assert dense.shape == (2, 3, height, width)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == unpooled.shape

    classifier = model.get_classifier()
    model.reset_classifier(3, "avg")
    assert model.num_classes == 3
    assert model.get_classifier() is not classifier
    model.head.fc = classifier
    torch.testing.assert_close(model(x), dense.mean((2, 3)), rtol=0, atol=1e-5)  # a linear map of a mean
    assert not any(m.training for m in model.modules()), "a new module is in training mode"


def test_reset_classifier_keeps_device_and_dtype(small):
    """Also after the rest of the head is gone."""
    model = small().to("meta", torch.bfloat16)
    for arguments in [dict(), dict(reset_other=True), dict()]:
        model.reset_classifier(3, **arguments)
        weight = model.get_classifier().weight
        assert (weight.device.type, weight.dtype) == ("meta", torch.bfloat16)


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax"])
def test_global_pool(small, pool):
    """By argument and by reset, on the map that the head's norm leaves."""
    model = small(global_pool=pool)
    x = images(2)
    y, pre_logits = model(x), model.forward_head(model.forward_features(x), pre_logits=True)
    assert y.shape == (2, 10)
    assert pre_logits.shape == (2, model.head_hidden_size)
    other = small()
    other.reset_classifier(10, pool)
    other.load_state_dict(model.state_dict())
    assert_equal([other(x)], [y])

    other.reset_classifier(0, "")
    unpooled = other(x)
    mean, largest = unpooled.mean((2, 3)), unpooled.amax((2, 3))
    expected = dict(avg=mean, max=largest, avgmax=(mean + largest) / 2, catavgmax=torch.cat([mean, largest], 1))[pool]
    torch.testing.assert_close(pre_logits, expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Features


def levels(model: nn.Module) -> int:
    """Feature maps that the network can give."""
    return len(model.feature_info)


@pytest.mark.parametrize("out_indices", [None, (0, 2), (1,), (-2, -1)], ids=str)
def test_features_only(small, out_indices):
    """Channels and strides are those announced, the maps those of the whole network."""
    features = small(features_only=True, **({} if out_indices is None else dict(out_indices=out_indices)))
    model = small()
    x = images()
    maps = features(x)
    channels, reductions = features.feature_info.channels(), features.feature_info.reduction()
    assert len(maps) == (4 if out_indices is None else len(out_indices))
    assert [m.shape for m in maps] == [(1, c, 64 // r, 48 // r) for c, r in zip(channels, reductions, strict=True)]
    if out_indices is None:  # the stages; or the ends of the four quarters of the blocks, here of five
        out_indices = (0, 1, 2, 3) if len(model.stages) == 4 else (0, 1, 2, 4)
    assert_equal(maps, model.forward_intermediates(x, indices=list(out_indices), intermediates_only=True), atol=1e-5)


def test_default_features(name, on_meta):
    """Strides 4 to 32 in the network's widths; or four of the 18 blocks at stride 16, the last one among them."""
    pyramid = name in PYRAMIDS
    features = on_meta(name, features_only=True, **(dict(depths=(1, 1, 1, 1)) if pyramid else {}))
    reductions = [4, 8, 16, 32] if pyramid else [16] * 4
    assert features.feature_info.reduction() == reductions
    assert features.feature_info.channels() == [m["num_chs"] for m in on_meta(name).feature_info][-4:]
    maps = features(torch.empty(1, 3, 96, 64, device="meta"))
    assert [m.shape[1] for m in maps] == features.feature_info.channels()
    assert [m.shape[-2:] for m in maps] == [(96 // r, 64 // r) for r in reductions]
    expected = [f"stages.{i}" for i in range(4)] if pyramid else [f"stages.0.blocks.{i}" for i in (3, 8, 12, 17)]
    assert features.feature_info.module_name() == expected


def test_features_of_other_depths(name):
    """The default levels follow the number of stages or blocks."""
    arguments = dict(dims=(8, 12, 16), depths=(1, 1, 1)) if name in PYRAMIDS else dict(dim=8, depth=9)
    features = timm.create_model(name, features_only=True, **arguments)
    assert list(features.feature_info.out_indices) == ([0, 1, 2] if name in PYRAMIDS else [1, 3, 5, 8])
    assert len(features(images())) == len(features.feature_info.out_indices)


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter", "fx"])
@pytest.mark.parametrize("name", ["conv2former_test", "conv2former_t_l1"])
def test_kinds_of_feature_extractors(small, feature_cls):
    """All of timm's ways to the maps of a pyramid give the same."""
    x, model = images(), small()
    features = small(features_only=True, feature_cls=feature_cls, out_indices=(1, 3))
    if feature_cls == "fx":  # whose modules stand in the order of their use, so weights go by name
        names, weights = features.state_dict(), model.state_dict()
        features.load_state_dict({name: weights[name.removeprefix("graph_module.")] for name in names})
    maps = features(x)
    expected = model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
    assert_equal(list(maps.values()) if isinstance(maps, dict) else maps, expected, atol=1e-5)


def test_forward_intermediates(small):
    model = small()
    x = images()
    final, maps = model.forward_intermediates(x)
    assert_equal([final], [model.forward_features(x)])
    assert len(maps) == levels(model)
    assert_equal([maps[-1]], [final])
    assert_equal([model.forward_head(final)], [model(x)])
    assert all(m.shape[1] == info["num_chs"] for m, info in zip(maps, model.feature_info, strict=True))
    last = len(maps) - 1
    for indices, taken in [(2, [last - 1, last]), ([0, 2], [0, 2]), ((1,), [1]), ([-1, 0], [0, last])]:
        for stop_early in (False, True):
            some = model.forward_intermediates(x, indices, stop_early=stop_early, intermediates_only=True)
            assert_equal(some, [maps[i] for i in taken])
    assert_equal([model.forward_intermediates(x, [1])[0]], [final])
    assert_equal([model.forward_intermediates(x, [1], stop_early=True)[0]], [maps[1]])


def test_forward_intermediates_refuses(small):
    model = small()
    for indices in [[levels(model)], levels(model) + 1, 0]:
        with pytest.raises(AssertionError, match="out of range"):
            model.forward_intermediates(images(), indices)
    with pytest.raises(AssertionError, match="NCHW"):
        model.forward_intermediates(images(), output_fmt="NLC")


def test_prune_intermediate_layers(small):
    model, whole = small(), small()
    x = images()
    maps = whole.forward_intermediates(x, intermediates_only=True)
    parameters = sum(p.numel() for p in model.parameters())
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    assert sum(p.numel() for p in model.parameters()) < parameters
    assert_equal(model.forward_intermediates(x, [0, 2], intermediates_only=True), [maps[0], maps[2]])
    assert_equal([model.forward_features(x), model(x)], [maps[2], maps[2]])
    assert model.num_features == model.head_hidden_size == maps[2].shape[1]
    model.reset_classifier(6, "avg")
    assert model(x).shape == (1, 6)


def test_prune_keeps_what_is_asked_for(small):
    model, whole = small(), small()
    x = images()
    assert model.prune_intermediate_layers(1, prune_head=False) == [levels(whole) - 1]
    assert_equal([model(x)], [whole(x)])
    model.prune_intermediate_layers(1)
    assert_equal([model(x)], [whole.forward_features(x)])
    assert not any(k.startswith("head.") for k in model.state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# TorchScript


def test_torchscript(small):
    model = small(scriptable=True)
    x = images(2)
    scripted = torch.jit.script(model)
    assert_equal([scripted(x)], [model(x)], atol=1e-5)
    with pytest.raises(torch.jit.Error, match="smaller than"):
        scripted(images(size=(8, 8)))


def test_torchscript_features(small, name):
    """timm's extractor for single blocks, FeatureGetterNet, cannot be scripted with any model: it is traced."""
    features = small(features_only=True, scriptable=True)
    x = images(2)
    scripted = torch.jit.script(features) if name in PYRAMIDS else torch.jit.trace(features, x)
    assert_equal(scripted(x), features(x), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Training options


def test_gradient_checkpointing(small):
    model = small().train()
    x = images(2)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(x).square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.set_grad_checkpointing(True)
    assert_equal(gradients(), plain)


def test_drop_rates(small):
    """Both take effect in training and leave evaluation alone."""
    plain = small()
    x = images(4)
    for arguments in [dict(drop_path_rate=0.5), dict(drop_rate=0.5)]:
        model = small(**arguments)
        assert_equal([model(x)], [plain(x)])
        model.train()
        for m in model.modules():  # leave the batch statistics out of the comparison
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        assert (model(x) - plain(x)).abs().max() > 1e-3
        assert (model(x) - model(x)).abs().max() > 1e-3
    probabilities = [m.drop_prob for m in small(drop_path_rate=0.5).modules() if isinstance(m, DropPath)]
    assert max(probabilities) == 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def test_no_weights_are_published(name):
    """One clear error that says how to get some."""
    for features_only in (False, True):
        with pytest.raises(
            RuntimeError, match=f"no weights are published for {name}: .*`conv2former convert .*{name}`"
        ):
            timm.create_model(name, pretrained=True, features_only=features_only)


def test_pretrained_weights_for_other_channels_and_classes(small, name, tmp_path):
    """timm adapts a checkpoint of ours: the first convolution summed to one channel, a new classifier."""
    source = small(num_classes=1000)
    file = tmp_path / "weights.pth"
    torch.save(source.state_dict(), file)
    arguments = small_args(name) | dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    model = timm.create_model(name, **(arguments | dict(in_chans=1, num_classes=5)))
    assert model.eval()(torch.randn(2, 1, 64, 64)).shape == (2, 5)
    first_conv, classifier = (model.default_cfg[k] for k in ("first_conv", "classifier"))
    weights, expected = model.state_dict(), source.state_dict()
    expected[f"{first_conv}.weight"] = expected[f"{first_conv}.weight"].sum(1, keepdim=True)
    for key in weights:
        if not key.startswith(f"{classifier}."):
            torch.testing.assert_close(weights[key], expected[key], rtol=0, atol=1e-6)

    features = timm.create_model(name, features_only=True, **arguments).eval()
    x = images()
    out_indices = list(features.feature_info.out_indices)
    assert_equal(features(x), source.forward_intermediates(x, out_indices, intermediates_only=True), atol=1e-5)


def test_hub_folder(small, name, tmp_path):
    """Saved and loaded again bit for bit, with arguments other than the name's, as a classifier and for features."""
    arguments = dict(kernel_size=3, in_chans=4, ls_init_value=0.1) | small_args(name)
    model = small(**arguments)
    model.reset_classifier(6)
    arguments.pop("num_classes")
    timm.models.save_for_hf(model, tmp_path, model_args=arguments, safe_serialization=True)
    assert {f.name for f in Path(tmp_path).iterdir()} == {"model.safetensors", "config.json"}

    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert_equal(list(loaded.state_dict().values()), list(model.state_dict().values()))
    x = torch.randn(1, 4, 40, 64)
    assert_equal([loaded(x)], [model(x)])
    assert loaded.num_classes == 6

    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True, out_indices=(0, 2))
    assert_equal(features.eval()(x), model.forward_intermediates(x, [0, 2], intermediates_only=True), atol=1e-5)
    changed = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)
    assert changed.eval()(x).shape == (1, 3)


def test_factory_options(name):
    """timm's device and dtype."""
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16, **small_args(name))
    tensors = [t for t in model.state_dict().values() if t.is_floating_point()]
    assert {(t.device.type, t.dtype) for t in tensors} == {("meta", torch.bfloat16)}


def test_copies(small):
    """deepcopy, pickle, the meta device."""
    model = small()
    x = images()
    expected = model(x)
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        for p in duplicate.parameters():
            p.zero_()
    assert_equal([model(x)], [expected])
    assert_equal([pickle.loads(pickle.dumps(model))(x)], [expected])
    assert model.to("meta")(x.to("meta")).shape == expected.shape
