"""The network against the paper: counts, names, arithmetic, initialisation, input sizes, precisions, compilers.

``python tests/test_model.py > tests/fixtures/state_dict_shapes.json`` writes the fixture of names and shapes anew.
"""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import conv2former
from conv2former.models.conv2former import Block, ConvMod, Mlp, drop_path_rates

SHAPES_FILE = Path(__file__).parent / "fixtures" / "state_dict_shapes.json"

NETWORKS = sorted(
    name for module in ("variants", "isotropic") for name in timm.list_models("conv2former*", module=module)
)

# small versions, by the arguments of the entrypoints
SHALLOW: dict[str, Any] = dict(dims=(8, 12, 16, 24), depths=(1, 1, 2, 1), head_hidden_size=20, num_classes=7)
SHALLOW_ISOTROPIC: dict[str, Any] = dict(dim=16, depth=3, head_hidden_size=20, num_classes=7)


def wave(*shape: int) -> Tensor:
    """A image by formula, with values of magnitude 1."""
    return torch.sin(0.1 * torch.arange(math.prod(shape), dtype=torch.float64) ** 1.2).view(shape).float()


# ---------------------------------------------------------------------------------------------------------------------
# Names


def test_registered_names():
    assert NETWORKS == [
        "conv2former_atto",
        "conv2former_b",
        "conv2former_femto",
        "conv2former_ib",
        "conv2former_ib_conv3",
        "conv2former_is",
        "conv2former_is_conv3",
        "conv2former_l",
        "conv2former_n",
        "conv2former_pico",
        "conv2former_s",
        "conv2former_t",
        "conv2former_test",
    ]


def shapes(model: nn.Module) -> dict[str, str]:
    """Names and shapes of the state dict. The equal blocks of a stage are one entry with their number: ``blocks.12x``.

    Raises:
        AssertionError: the blocks of a stage have gaps in their numbers, or differ.
    """
    blocks: dict[str, list[tuple[int, str]]] = {}
    for key, tensor in model.state_dict().items():
        number = re.search(r"\bblocks\.(\d+)\.", key)
        pattern = re.sub(r"\bblocks\.\d+\.", "blocks.{}x.", key)
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        blocks.setdefault(pattern, []).append((int(number[1]) if number else 0, shape))
    for pattern, found in blocks.items():
        assert [number for number, _ in found] == list(range(len(found))), f"numbers of {pattern}"
        assert len({shape for _, shape in found}) == 1, f"shapes of {pattern}"
    return {pattern.format(len(found)): found[0][1] for pattern, found in blocks.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_state_dict_names_and_shapes(name, on_meta):
    """Checkpoints depend on them: a change here needs a converter."""
    assert shapes(on_meta(name)) == json.loads(SHAPES_FILE.read_text())[name]


# ---------------------------------------------------------------------------------------------------------------------
# Counts: Table 1, Table 5, Fig. 4a; Table 7. Multiply-adds of convolutions and linear layers, in G. test_zoo.py
# holds the stored counts against the same numbers; the slow tests count the larger networks anew.

SLOW = pytest.mark.slow


def count(model: nn.Module, size: int) -> tuple[int, int]:
    """Parameters and multiply-adds at ``size`` x ``size``."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, size, size, device="meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("size", "kernel_size", "image", "parameters", "macs"),
    [
        ("n", 7, 224, 14_992_840, 2.330),
        ("t", 11, 224, 26_697_204, 4.361),
        pytest.param("n", 11, 224, 15_241_672, 2.406, marks=SLOW),
        pytest.param("s", 11, 224, 50_032_692, 8.708, marks=SLOW),
        pytest.param("b", 11, 224, 90_029_112, 15.890, marks=SLOW),
        pytest.param("b", 7, 224, 88_784_952, 15.565, marks=SLOW),
        pytest.param("l", 11, 224, 198_893_736, 36.037, marks=SLOW),
        pytest.param("b", 11, 384, 90_029_112, 46.695, marks=SLOW),
        pytest.param("l", 11, 384, 198_893_736, 105.904, marks=SLOW),
        # Fig. 4a
        pytest.param("t", 5, 224, 26_137_332, 4.190, marks=SLOW),
        pytest.param("t", 7, 224, 26_277_300, 4.232, marks=SLOW),
        pytest.param("t", 9, 224, 26_463_924, 4.289, marks=SLOW),
        pytest.param("t", 15, 224, 27_303_732, 4.545, marks=SLOW),
        pytest.param("t", 21, 224, 28_563_444, 4.930, marks=SLOW),
        pytest.param("b", 5, 224, 88_370_232, 15.457, marks=SLOW),
        pytest.param("b", 9, 224, 89_337_912, 15.709, marks=SLOW),
        pytest.param("b", 15, 224, 91_826_232, 16.360, marks=SLOW),
        pytest.param("b", 21, 224, 95_558_712, 17.335, marks=SLOW),
    ],
)
def test_counts(size, kernel_size, image, parameters, macs, on_meta):
    counted = count(on_meta(f"conv2former_{size}", kernel_size=kernel_size), image)
    assert (counted[0], round(counted[1] / 1e9, 3)) == (parameters, macs)


@pytest.mark.parametrize(("size", "kernel_size"), [("n", 7), ("t", 11), ("s", 11), ("b", 11), ("l", 11)])
def test_default_kernel_sizes(size, kernel_size, on_meta):
    """11 as in Table 1; N has the released checkpoint's 7."""
    kernels = {m.dwconv.kernel_size for m in on_meta(f"conv2former_{size}").modules() if isinstance(m, ConvMod)}
    assert kernels == {(kernel_size, kernel_size)}


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("is", 23.2, 4.28),
        pytest.param("ib", 85.7, 16.51, marks=SLOW),
        pytest.param("is_conv3", 23.4, 4.47, marks=SLOW),
        pytest.param("ib_conv3", 87.0, 17.3, marks=SLOW),
    ],
)
def test_isotropic_counts(name, parameters, macs, on_meta):
    counted = count(on_meta(f"conv2former_{name}"), 224)
    digits = 1 if name == "ib_conv3" else 2  # as many as facts.md gives
    assert (round(counted[0] / 1e6, 1), round(counted[1] / 1e9, digits)) == (parameters, macs)


@pytest.mark.parametrize(("name", "parameters"), [("pico", 9.2), ("femto", 5.4), ("atto", 3.8), ("test", 0.1)])
def test_parameters_outside_the_paper(name, parameters, on_meta):
    assert round(sum(p.numel() for p in on_meta(f"conv2former_{name}").parameters()) / 1e6, 1) == parameters


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic: the same network written a second time, channels first, from the formulae of the paper


class Reference:
    """Functions of the weights alone. ``weights`` maps the names of the state dict to tensors."""

    def __init__(self, weights: dict[str, Tensor], *, training: bool) -> None:
        self.weights = weights
        self.training = training

    def conv(self, x: Tensor, name: str, **kwargs: Any) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        weight = weight[..., None, None] if weight.ndim == 2 else weight  # linear layers are 1x1 convolutions
        return F.conv2d(x, weight, self.weights.get(f"{name}.bias"), **kwargs)

    def depthwise(self, x: Tensor, name: str) -> Tensor:
        margin = self.weights[f"{name}.weight"].shape[-1] // 2
        return self.conv(F.pad(x, [margin] * 4), name, groups=x.shape[1])

    def scale(self, x: Tensor, name: str) -> Tensor:
        return x * self.weights[name][:, None, None]

    def layer_norm(self, x: Tensor, name: str) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).square().mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.scale(x, f"{name}.weight") + self.weights[f"{name}.bias"][:, None, None]

    def batch_norm(self, x: Tensor, name: str) -> Tensor:
        if self.training:
            mean = x.mean((0, 2, 3))
            variance = (x - mean[:, None, None]).square().mean((0, 2, 3))
        else:
            mean, variance = self.weights[f"{name}.running_mean"], self.weights[f"{name}.running_var"]
        x = (x - mean[:, None, None]) / torch.sqrt(variance + 1e-5)[:, None, None]
        return self.scale(x, f"{name}.weight") + self.weights[f"{name}.bias"][:, None, None]

    def gelu(self, x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def block(self, x: Tensor, name: str) -> Tensor:
        y = self.layer_norm(x, f"{name}.norm1")
        a = self.depthwise(self.gelu(self.conv(y, f"{name}.mod.w1")), f"{name}.mod.dwconv")
        v = self.conv(y, f"{name}.mod.w2")
        x = x + self.scale(self.conv(a * v, f"{name}.mod.proj"), f"{name}.ls1.gamma")
        h = self.gelu(self.conv(self.layer_norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        h = h + self.gelu(self.depthwise(h, f"{name}.mlp.dwconv"))
        return x + self.scale(self.conv(h, f"{name}.mlp.fc2"), f"{name}.ls2.gamma")

    def stem(self, x: Tensor, strides: tuple[int, int, int], convs: list[str], norms: list[str]) -> Tensor:
        x = self.batch_norm(self.gelu(self.conv(x, convs[0], stride=strides[0], padding=1)), norms[0])
        x = self.batch_norm(self.gelu(self.conv(x, convs[1], stride=strides[1], padding=1)), norms[1])
        return self.conv(x, convs[2], stride=strides[2])

    def head(self, x: Tensor) -> Tensor:
        x = self.layer_norm(self.gelu(self.conv(x, "head.conv")), "head.norm").mean((2, 3))
        return x @ self.weights["head.fc.weight"].T + self.weights["head.fc.bias"]

    def hierarchical(self, x: Tensor, depths: tuple[int, ...], first_stride: int = 2) -> Tensor:
        convs, norms = ["stem.conv1", "stem.conv2", "stem.conv3"], ["stem.norm1", "stem.norm2"]
        x = self.stem(x, (first_stride, 1, 2), convs, norms)
        for i, depth in enumerate(depths):
            if i > 0:
                x = self.conv(self.layer_norm(x, f"stages.{i}.downsample.0"), f"stages.{i}.downsample.1", stride=2)
            for j in range(depth):
                x = self.block(x, f"stages.{i}.blocks.{j}")
        return self.head(x)

    def isotropic(self, x: Tensor, depth: int, convs: int) -> Tensor:
        if convs == 1:
            x = self.conv(x, "stem.proj", stride=16)
        else:
            names = [f"stem.proj.{i}" for i in (0, 3, 6)]
            x = self.stem(x, (4, 2, 2), names, ["stem.proj.2", "stem.proj.5"])
        for j in range(depth):
            x = self.block(x, f"stages.0.blocks.{j}")
        return self.head(x)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("name", "size", "arguments"),
    [
        ("conv2former_t", (64, 64), SHALLOW),
        ("conv2former_t", (45, 102), SHALLOW),  # rows left over everywhere; maps smaller than the kernel
        ("conv2former_n", (32, 32), SHALLOW | dict(in_chans=4)),
        ("conv2former_t", (33, 40), SHALLOW | dict(stem_stride=2, kernel_size=5)),
        ("conv2former_is", (50, 65), SHALLOW_ISOTROPIC),
        ("conv2former_is_conv3", (50, 65), SHALLOW_ISOTROPIC),
    ],
)
def test_arithmetic(name, size, arguments, training, fill):
    """Outputs and all gradients of the network are those of the formulae."""
    model = fill(timm.create_model(name, **arguments)).double().train(training)
    weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    parameters = {k: weights[k].requires_grad_() for k, _ in model.named_parameters()}
    reference = Reference(weights, training=training)
    x = torch.randn(3, arguments.get("in_chans", 3), *size, dtype=torch.float64)
    x, x_reference = x.clone().requires_grad_(), x.clone().requires_grad_()

    y = model(x)
    if "depths" in arguments:
        first_stride = arguments.get("stem_stride", 4) // 2
        y_reference = reference.hierarchical(x_reference, arguments["depths"], first_stride)
    else:
        y_reference = reference.isotropic(x_reference, arguments["depth"], 3 if "conv3" in name else 1)
    assert y_reference.abs().max() > 0.1
    torch.testing.assert_close(y, y_reference, rtol=1e-10, atol=1e-10)

    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    (y_reference * direction).sum().backward()
    torch.testing.assert_close(x.grad, x_reference.grad, rtol=1e-10, atol=1e-10)
    for key, parameter in model.named_parameters():
        assert parameters[key].grad.abs().max() > 0, f"{key} has no influence: this comparison would be empty"
        torch.testing.assert_close(
            parameter.grad, parameters[key].grad, rtol=1e-10, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("kernel_size", [5, 11])
def test_modulation_sees_exactly_its_kernel(kernel_size):
    """Each output depends on the k x k square around it, and on nothing else."""
    mod = ConvMod(2, kernel_size).double()
    x = torch.randn(1, 25, 23, 2, dtype=torch.float64, requires_grad=True)
    (influence,) = torch.autograd.grad(mod(x)[0, 12, 11].sum(), x)
    expected = torch.zeros(25, 23, dtype=torch.bool)
    k = kernel_size // 2
    expected[12 - k : 13 + k, 11 - k : 12 + k] = True
    assert torch.equal(influence[0].abs().sum(-1) > 0, expected)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("conv2former_test", {}, [0.357015, -0.111766, -0.076108, 0.164507, 0.395903, -0.531159]),
        (
            "conv2former_is_conv3",
            dict(dim=16, depth=2, head_hidden_size=24),
            [0.727088, 0.225756, -0.689691, -1.815164, -0.259152, 0.775599],
        ),
    ],
)
def test_pinned_outputs(name, arguments, expected, fill):
    """Weights and image by formula: the outputs must never change, or published weights lose their meaning."""
    model = fill(timm.create_model(name, num_classes=6, **arguments)).eval()
    with torch.inference_mode():
        y = model(wave(1, 3, 70, 85))
    torch.testing.assert_close(y, torch.tensor([expected]), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Initialisation and stochastic depth


NEUTRAL_0 = ("bias", "running_mean", "num_batches_tracked")


@pytest.mark.parametrize("name", ["conv2former_pico", "conv2former_is_conv3"])
def test_initialisation(name):
    """Normal with std 0.02 for convolutions and linear layers, zero biases, layer scale 1e-6, norms neutral."""
    model = timm.create_model(name)
    large = 0
    for key, p in model.state_dict().items():
        if p.ndim > 1 and p.numel() >= 20_000:
            large += 1
            assert p.mean().abs() < 1e-3, key
            assert p.std() == pytest.approx(0.02, rel=0.03), key
            assert (p.abs() > 0.04).float().mean() == pytest.approx(0.0455, abs=0.006), f"{key} is not normal"
        elif p.ndim > 1:
            assert p.std() == pytest.approx(0.02, rel=0.25), key
        elif key.endswith("gamma"):
            assert (p == 1e-6).all(), key
        else:
            assert (p == (0 if key.endswith(NEUTRAL_0) else 1)).all(), key
    assert large > 20


def test_new_classifier_is_initialised_alike():
    model = timm.create_model("conv2former_test")
    model.reset_classifier(500)
    assert model.head.fc.weight.detach().std() == pytest.approx(0.02, rel=0.03)
    assert (model.head.fc.bias == 0).all()


@pytest.mark.parametrize("value", [0.5, None])
def test_layer_scale_value(value):
    """In both branches of every block; None leaves the parameters out. (timm.create_model drops arguments of None.)"""
    model = conv2former.Conv2Former(dims=(8, 16), depths=(2, 1), kernel_size=3, ls_init_value=value)
    scales = [v for k, v in model.named_parameters() if "gamma" in k]
    assert len(scales) == (0 if value is None else 2 * 3)
    assert all((v == value).all() for v in scales)


def test_no_layer_scale_is_a_scale_of_1():
    without, with_ones = Block(8, 5, ls_init_value=None), Block(8, 5, ls_init_value=1.0)
    with_ones.load_state_dict(without.state_dict(), strict=False)
    x = torch.randn(2, 6, 7, 8)
    assert torch.equal(without(x), with_ones(x))


@pytest.mark.parametrize(("name", "depth"), [("conv2former_t", 21), ("conv2former_n", 14), ("conv2former_is", 18)])
def test_drop_path_rates(name, depth, on_meta):
    """Stochastic depth rises linearly from 0 at the first block to the given rate at the last, over all stages."""
    model = on_meta(name, drop_path_rate=0.3)
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    for branch in ("drop_path1", "drop_path2"):
        drops = [getattr(block, branch) for block in blocks]
        rates = [drop.drop_prob if isinstance(drop, DropPath) else 0.0 for drop in drops]
        assert rates == pytest.approx([0.3 * i / (depth - 1) for i in range(depth)])
    assert not any(isinstance(m, DropPath) for m in on_meta(name).modules())


def test_drop_path_rates_of_one_block():
    assert drop_path_rates(0.5, (1,)) == [[0.0]]


def test_drop_path_of_a_block(fill):
    """Each image drops each branch by itself; what stays is scaled up, so that the expectation does not change."""
    block = fill(Block(4, 3, drop_path=0.5))
    x = torch.randn(64, 5, 5, 4)
    y = block(x)
    middle = [x, x + 2 * block.ls1(block.mod(block.norm1(x)))]
    outcomes = [end for m in middle for end in (m, m + 2 * block.ls2(block.mlp(block.norm2(m))))]
    matches = torch.stack([torch.isclose(y, o, atol=1e-5).flatten(1).all(1) for o in outcomes])
    assert (matches.sum(0) == 1).all(), "an image is none of the four outcomes"
    assert (matches.sum(1) > 4).all(), "an outcome is missing among 64 images"
    block.eval()
    expected = x + block.ls1(block.mod(block.norm1(x)))
    torch.testing.assert_close(block(x), expected + block.ls2(block.mlp(block.norm2(expected))))


# ---------------------------------------------------------------------------------------------------------------------
# Inputs


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (63, 96), (95, 32), (40, 161)])
def test_sizes_of_the_maps(size):
    """Any size from 32 on: each convolution with stride 2 drops the row left over, the padded first one keeps it."""
    model = timm.create_model("conv2former_test", features_only=True).eval()
    expected = [tuple((s + 1) // 2 // 2**i for s in size) for i in (1, 2, 3, 4)]
    with torch.inference_mode():
        assert [tuple(f.shape[-2:]) for f in model(torch.randn(1, 3, *size))] == expected


@pytest.mark.parametrize("features_only", [False, True], ids=["classifier", "features"])
@pytest.mark.parametrize(
    ("name", "arguments", "smallest"),
    [
        ("conv2former_test", {}, 32),
        ("conv2former_test", dict(stem_stride=2), 16),
        ("conv2former_is", dict(dim=16, depth=4), 16),
        ("conv2former_is_conv3", dict(dim=16, depth=4), 16),
    ],
)
def test_smallest_image(name, arguments, smallest, features_only):
    model = timm.create_model(name, features_only=features_only, **arguments).eval()
    with torch.inference_mode():
        y = model(torch.randn(1, 3, smallest, smallest))
        assert all(f.isfinite().all() for f in (y if features_only else [y]))
        for size in [(smallest - 1, smallest), (smallest, smallest - 1)]:
            with pytest.raises(AssertionError, match=f"smaller than {smallest} pixels.*resize"):
                model(torch.randn(1, 3, *size))


def test_kernel_larger_than_the_map(fill):
    """On a 1x1 map only the middle of the kernel meets the map; the rest lies on the padding."""
    model = fill(timm.create_model("conv2former_t", **SHALLOW)).eval()
    x = torch.randn(2, 3, 32, 32)
    assert model.forward_features(x).shape[-2:] == (1, 1)
    before = model(x)
    kernel = model.stages[3].blocks[0].mod.dwconv.weight.data
    middle = kernel[..., 5, 5].clone()
    kernel.zero_()[..., 5, 5] = middle
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    kernel[..., 5, 5] = -middle
    assert (model(x) - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["conv2former_test", "conv2former_is"])
@pytest.mark.parametrize("in_chans", [1, 4])
def test_channels_of_the_image(name, in_chans):
    model = timm.create_model(name, in_chans=in_chans, **(SHALLOW_ISOTROPIC if "is" in name else SHALLOW))
    assert model.in_chans == in_chans
    assert model(torch.randn(2, in_chans, 32, 32)).shape == (2, 7)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3, 32, 32))


def test_stem_stride_2():
    """For small images: all maps twice as large, the same parameters, as timm is told."""
    model, usual = timm.create_model("conv2former_test", stem_stride=2), timm.create_model("conv2former_test")
    assert model.forward_features(torch.randn(1, 3, 64, 64)).shape[-2:] == (4, 4)
    assert [f["reduction"] for f in model.feature_info] == [2, 4, 8, 16]
    assert [f["reduction"] for f in usual.feature_info] == [4, 8, 16, 32]
    model.load_state_dict(usual.state_dict())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("conv2former_test", dict(kernel_size=4), "kernel_size is 4: use an odd number"),
        ("conv2former_test", dict(kernel_size=0), "kernel_size is 0: use an odd number"),
        ("conv2former_test", dict(kernel_size=-3), "kernel_size is -3: use an odd number"),
        ("conv2former_is", dict(kernel_size=6), "kernel_size is 6: use an odd number"),
        ("conv2former_test", dict(depths=(1, 1, 1)), "dims has 4 stages and depths 3"),
        ("conv2former_test", dict(stem_stride=3), "stem_stride is 3: use 4"),
        ("conv2former_is", dict(patch_embed_convs=2), "patch_embed_convs is 2: use 1 or 3"),
    ],
)
def test_wrong_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, **arguments)


@pytest.mark.parametrize("name", ["conv2former_test", "conv2former_t", "conv2former_is"])
def test_images_of_a_batch_are_independent(name, fill):
    """Not bit for bit, oneDNN and the BLAS choose other orders of summation for other batches."""
    arguments = dict(depth=4) if name == "conv2former_is" else dict(depths=(1, 1, 2, 1))
    model = fill(timm.create_model(name, **arguments)).eval()
    x = torch.randn(4, 3, 64, 64)
    with torch.inference_mode():
        together, alone = model(x), torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(alone, together, rtol=0, atol=2e-5)
    assert together.abs().max() > 1


def test_layout_of_the_input_does_not_matter(fill):
    model = fill(timm.create_model("conv2former_test")).eval()
    x = torch.randn(2, 3, 48, 64)
    layouts = [
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat([x, x], 3)[..., :64],
    ]
    with torch.inference_mode():
        expected = model(x)
        for other in layouts:
            torch.testing.assert_close(model(other), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(model.to(memory_format=torch.channels_last)(x), expected, rtol=0, atol=1e-6)
        one = x[:1].expand(3, -1, -1, -1)
        torch.testing.assert_close(model(one), expected[:1].expand(3, -1), rtol=0, atol=2e-5)


def test_inside_tensors_are_channels_last():
    """The blocks see contiguous (B, H, W, C): no copy between layouts."""
    model = timm.create_model("conv2former_test").eval()
    seen = []
    for m in model.modules():
        if isinstance(m, (ConvMod, Mlp)):
            m.register_forward_pre_hook(lambda module, args: seen.append(args[0].is_contiguous()))
    model(torch.randn(2, 3, 64, 96))
    assert len(seen) == 10
    assert all(seen)


# ---------------------------------------------------------------------------------------------------------------------
# Precisions


PRECISIONS = [(torch.bfloat16, 0.06), (torch.float16, 0.01)]


@pytest.mark.parametrize("magnitude", [1.0, 1e3])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["conv2former_t", "conv2former_is_conv3"])
def test_autocast(name, dtype, tolerance, magnitude, fill):
    """Outputs near those in float32, gradients in the same direction, also for images nobody normalised."""
    model = fill(timm.create_model(name, **(SHALLOW_ISOTROPIC if "is" in name else SHALLOW))).eval()
    x = magnitude * torch.randn(2, 3, 64, 48)
    target = torch.tensor([3, 5])

    def run(enabled: bool) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            y = model(x)
        F.cross_entropy(y.float(), target).backward()
        return y.detach().float(), torch.cat([p.grad.flatten() for p in model.parameters()])

    (y, grad), (expected, expected_grad) = run(True), run(False)
    assert (y - expected).abs().max() < tolerance * expected.abs().max()
    assert grad.isfinite().all()
    assert F.cosine_similarity(grad, expected_grad, dim=0) > 1 - tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["bf16", "fp16"])
def test_converted_model(dtype, tolerance, fill):
    model = fill(timm.create_model("conv2former_test")).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
        y = copy.deepcopy(model).to(dtype)(x.to(dtype))
        built = timm.create_model("conv2former_test", dtype=dtype).eval()
        built.load_state_dict(model.state_dict())
        assert torch.equal(built(x.to(dtype)), y)
    assert y.dtype == dtype
    assert (y.float() - expected).abs().max() < tolerance * expected.abs().max()


# ---------------------------------------------------------------------------------------------------------------------
# Gradient checkpointing, compilers


@pytest.mark.parametrize(("name", "blocks"), [("conv2former_test", 5), ("conv2former_is", 3)])
@pytest.mark.parametrize("features", [False, True], ids=["forward", "intermediates"])
def test_gradient_checkpointing(name, blocks, features, fill):
    """The same outputs and gradients, also with stochastic depth; every block runs again in the backward pass."""
    arguments = SHALLOW_ISOTROPIC if name == "conv2former_is" else {}
    model = fill(timm.create_model(name, drop_path_rate=0.3, **arguments)).train()
    runs = []
    for m in model.modules():
        if isinstance(m, ConvMod):
            m.register_forward_hook(lambda *_: runs.append(1))
    x = torch.randn(4, 3, 64, 64)

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        runs.clear()
        y = model.forward_intermediates(x, intermediates_only=True)[-1] if features else model(x)
        y.square().mean().backward()
        return [y, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    plain = run()
    assert len(runs) == blocks
    model.set_grad_checkpointing()
    checkpointed = run()
    assert len(runs) == 2 * blocks
    assert len(plain) == len(checkpointed)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    model.set_grad_checkpointing(False)
    run()
    assert len(runs) == blocks


def test_compile(fill):
    """torch.compile sees one graph, forward and backward."""
    model = fill(timm.create_model("conv2former_test", dims=(8, 16), depths=(1, 1)))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    expected.square().mean().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    y = compiled(x)
    y.square().mean().backward()
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)


def test_export(fill):
    """torch.export with a dynamic batch, the way to ONNX and AOTInductor."""
    model = fill(timm.create_model("conv2former_test")).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: batch},)).module()
    with torch.inference_mode():
        for n in (1, 2, 5):
            x = torch.randn(n, 3, 64, 64)
            torch.testing.assert_close(program(x), model(x), rtol=0, atol=1e-5)


def test_public_names(on_meta):
    assert isinstance(on_meta("conv2former_test"), conv2former.Conv2Former)
    assert isinstance(on_meta("conv2former_is"), conv2former.Conv2FormerIsotropic)


if __name__ == "__main__":
    with torch.device("meta"):
        print(json.dumps({name: shapes(timm.create_model(name)) for name in NETWORKS}, indent=1))
