"""Checkpoints: safe reading, the authors' names, conversion, folders in timm's hub layout."""

import argparse
import copy
import functools
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import IMAGENET_DEFAULT_MEAN, resolve_model_data_config
from torch import nn

from authors import authors_state_dict
from conv2former.checkpoints import (
    convert,
    convert_authors_state_dict,
    hub,
    load_pretrained,
    read_state_dict,
    save_pretrained,
)
from conv2former.errors import UserError

NAME = "conv2former_test"


def trained(name: str = NAME, **kwargs: object) -> nn.Module:
    """A model in evaluation mode whose every parameter and statistic matters to its output."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("gamma"):
                tensor.fill_(1.0)
            elif key.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif key.endswith("num_batches_tracked"):
                tensor.fill_(7)
            elif tensor.ndim < 2:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained(num_classes=7)


@functools.cache
def known_shapes(name: str, **model_args: Any) -> dict[str, Any]:
    return hub.expected_shapes(name, **model_args)


@pytest.fixture(autouse=True)
def quick_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that do not fit are compared with all sizes, whose shapes are worked out once."""
    monkeypatch.setattr(sys.modules["conv2former.checkpoints.convert"], "expected_shapes", known_shapes)


@pytest.fixture
def checkpoint(model: nn.Module, tmp_path: Path) -> Path:
    """A bare state dict with the authors' names."""
    path = tmp_path / "authors.pth.tar"
    torch.save(authors_state_dict(model.state_dict()), path)
    return path


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Same names, order aside, and the same bits."""
    assert sorted(a) == sorted(b)
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


def refusal(*args: object, **kwargs: object) -> str:
    """Message of the UserError that a call ends in, which has to be one line."""
    function, *rest = args
    with pytest.raises(UserError) as caught:
        function(*rest, **kwargs)  # type: ignore[operator]
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# Names


def names_of_t() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' T checkpoint, written out from what is known of it."""
    shapes: dict[str, tuple[int, ...]] = {
        "downsample_layers.0.0.weight": (36, 3, 3, 3),
        "downsample_layers.0.3.weight": (36, 36, 3, 3),
        "downsample_layers.0.6.weight": (72, 36, 2, 2),
    }
    for norm in (2, 5):
        for key in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"downsample_layers.0.{norm}.{key}"] = (36,)
        shapes[f"downsample_layers.0.{norm}.num_batches_tracked"] = ()
    dims = (72, 144, 288, 576)
    for i in (1, 2, 3):
        shapes[f"downsample_layers.{i}.0.weight"] = shapes[f"downsample_layers.{i}.0.bias"] = (dims[i - 1],)
        shapes[f"downsample_layers.{i}.1.weight"] = (dims[i], dims[i - 1], 2, 2)
        shapes[f"downsample_layers.{i}.1.bias"] = (dims[i],)
    for i, (c, depth) in enumerate(zip(dims, (3, 3, 12, 3), strict=True)):
        for j in range(depth):
            block = f"stages.{i}.{j}."
            shapes[block + "layer_scale_1"] = shapes[block + "layer_scale_2"] = (c,)
            for key, weight in {
                "attn.norm": (c,),
                "attn.att.0": (c, c, 1, 1),
                "attn.att.2": (c, 1, 11, 11),
                "attn.v": (c, c, 1, 1),
                "attn.proj": (c, c, 1, 1),
                "mlp.norm": (c,),
                "mlp.fc1": (4 * c, c, 1, 1),
                "mlp.pos": (4 * c, 1, 3, 3),
                "mlp.fc2": (c, 4 * c, 1, 1),
            }.items():
                shapes[f"{block}{key}.weight"] = weight
                shapes[f"{block}{key}.bias"] = weight[:1]
    shapes["head.0.weight"], shapes["head.0.bias"] = (1280, 576, 1, 1), (1280,)
    shapes["head.2.weight"] = shapes["head.2.bias"] = (1280,)
    shapes["pred.weight"], shapes["pred.bias"] = (1000, 1280), (1000,)
    return shapes


def test_authors_names_and_shapes_of_t_and_outputs_after_the_way_back() -> None:
    model = trained("conv2former_t")
    theirs = authors_state_dict(model.state_dict())
    assert {key: tuple(tensor.shape) for key, tensor in theirs.items()} == names_of_t()

    back = convert_authors_state_dict(theirs)
    assert_same(back, model.state_dict())
    other = timm.create_model("conv2former_t").eval()
    other.load_state_dict(back)
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(other(x), expected, rtol=0, atol=1e-6)
    assert expected.std() > 1e-3  # not the constant that random weights with small layer scales give


def test_each_module_of_the_authors_means_the_module_of_the_same_place() -> None:
    """By position in the forward pass: swapping W1 and W2, or the norms, would keep every shape."""
    theirs = {key: torch.zeros(shape) for key, shape in names_of_t().items()}
    marked = {
        "stages.2.5.attn.att.0.weight": "stages.2.blocks.5.mod.w1.weight",
        "stages.2.5.attn.v.weight": "stages.2.blocks.5.mod.w2.weight",
        "stages.2.5.attn.proj.weight": "stages.2.blocks.5.mod.proj.weight",
        "stages.2.5.attn.norm.bias": "stages.2.blocks.5.norm1.bias",
        "stages.2.5.mlp.norm.bias": "stages.2.blocks.5.norm2.bias",
        "stages.2.5.layer_scale_1": "stages.2.blocks.5.ls1.gamma",
        "stages.2.5.layer_scale_2": "stages.2.blocks.5.ls2.gamma",
        "downsample_layers.0.2.running_mean": "stem.norm1.running_mean",
        "downsample_layers.0.5.running_mean": "stem.norm2.running_mean",
        "downsample_layers.1.0.weight": "stages.1.downsample.0.weight",
        "downsample_layers.3.1.bias": "stages.3.downsample.1.bias",
        "head.2.weight": "head.norm.weight",
        "pred.bias": "head.fc.bias",
    }
    for number, key in enumerate(marked, start=1):
        theirs[key].fill_(number)
    ours = convert_authors_state_dict(theirs)
    for number, key in enumerate(marked.values(), start=1):
        assert ours[key].eq(number).all(), key


def test_our_names_pass_through_unchanged(model: nn.Module) -> None:
    state_dict = model.state_dict()
    passed = convert_authors_state_dict(state_dict)
    assert list(passed) == list(state_dict)
    assert all(passed[key] is state_dict[key] for key in passed)


def test_both_names_of_one_parameter_are_refused(model: nn.Module) -> None:
    state_dict = model.state_dict()
    assert "head.fc.bias" in refusal(convert_authors_state_dict, state_dict | {"pred.bias": state_dict["head.fc.bias"]})


# Reading


@pytest.mark.parametrize(
    "keys",
    [
        *[(), ("state_dict",), ("state_dict_ema",), ("model",), ("model_ema",), ("model", "model_ema")],
        *[("ema",), ("ema_state_dict",), ("model_state_dict",), ("net",)],
    ],
)
def test_state_dict_is_found_under_each_key(model: nn.Module, tmp_path: Path, keys: tuple[str, ...]) -> None:
    wrapped = model.state_dict()
    for key in reversed(keys):
        wrapped = {"epoch": 3, "optimizer_state_dict": {"state": {0: {"step": torch.zeros(1)}}}, key: wrapped}
    torch.save(wrapped, tmp_path / "c.pth")
    assert_same(read_state_dict(tmp_path / "c.pth"), model.state_dict())


def test_averaged_weights_are_a_choice(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    torch.save({"state_dict": {"w": torch.zeros(2)}, "state_dict_ema": {"w": torch.ones(2)}}, path)
    assert read_state_dict(path)["w"].tolist() == [1, 1]
    assert read_state_dict(path, ema=False)["w"].tolist() == [0, 0]

    torch.save({"state_dict": {"w": torch.zeros(2)}, "state_dict_ema": None}, path)
    assert read_state_dict(path)["w"].tolist() == [0, 0]

    torch.save({"state_dict_ema": {"w": torch.ones(2)}}, path)
    assert "--no-ema" in refusal(read_state_dict, path, ema=False)


def test_wrappers_prefixes_go(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    torch.save({"module.a.module.b": torch.zeros(1), "_orig_mod.module.c": torch.ones(1)}, path)
    assert list(read_state_dict(path)) == ["a.module.b", "c"]
    torch.save({"a._orig_mod.b": torch.zeros(1), "c._checkpoint_wrapped_module.d": torch.ones(1)}, path)
    assert list(read_state_dict(path)) == ["a.b", "c.d"]
    torch.save({"module.a": torch.zeros(1), "a": torch.ones(1)}, path)
    assert "twice" in refusal(read_state_dict, path)


def test_training_checkpoint_with_arguments_and_optimizer(model: nn.Module, tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    state_dict = {f"module.{key}": tensor.clone() for key, tensor in model.state_dict().items()}
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():  # the optimizer's state is there without a step that would change the shared model
        for parameter in model.parameters():
            optimizer.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(parameter)}
    model.zero_grad()
    path = tmp_path / "checkpoint-299.pth.tar"
    args = argparse.Namespace(model="conv2former_t", lr=1e-3, mean=(0.5, 0.5, 0.5))
    torch.save(
        OrderedDict(
            epoch=299, arch="x", args=args, optimizer=optimizer.state_dict(), metric=83.2, state_dict=state_dict
        ),
        path,
    )
    assert_same(read_state_dict(path), expected)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # allowed for that file only


def test_parameters_come_out_as_plain_tensors(tmp_path: Path) -> None:
    torch.save({"w": nn.Parameter(torch.ones(2))}, tmp_path / "c.pth")
    weight = read_state_dict(tmp_path / "c.pth")["w"]
    assert type(weight) is torch.Tensor
    assert not weight.requires_grad


class Bomb:
    """Unpickling one makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.target,)


def write_bomb(path: Path, target: Path, form: str) -> None:
    content = {"state_dict": {"w": torch.zeros(2)}, "args": Bomb(target)}
    if form.startswith("raw"):
        with open(path, "wb") as file:
            pickle.dump({"state_dict": {}, "args": Bomb(target)}, file, protocol=int(form[-1]))
    else:
        torch.save(
            content, path, _use_new_zipfile_serialization=form != "legacy", pickle_protocol=4 if "4" in form else 2
        )


@pytest.mark.parametrize("form", ["raw2", "raw4", "raw5", "legacy", "zip", "zip4"])
def test_a_pickle_that_runs_code_is_refused_by_name_and_does_not_run(tmp_path: Path, form: str) -> None:
    path, target = tmp_path / "c.pth.tar", tmp_path / "made"
    write_bomb(path, target, form)
    for call in (read_state_dict, lambda path: convert(path, tmp_path / "dst", model=NAME)):
        message = refusal(call, path)
        if form in ("raw4", "raw5", "zip4"):  # protocols of pickle that PyTorch's safe reader does not know
            assert "not a pickle of tensors" in message
        else:
            assert ("posix.mkdir" in message or "nt.mkdir" in message) and "nothing in it was executed" in message
        assert "weights_only" not in message
        assert not target.exists()
    assert not (tmp_path / "dst").exists()

    if form == "zip":  # the bomb is live: without the safe reader it goes off
        torch.load(path, weights_only=False)
    elif form.startswith("raw"):
        pickle.loads(path.read_bytes())
    else:
        return
    assert target.exists()


def test_a_class_that_is_not_on_the_list_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(
        {"state_dict": {"w": torch.zeros(1)}, "path": Path("x"), "args": argparse.Namespace(a=1)}, tmp_path / "c.pth"
    )
    message = refusal(read_state_dict, tmp_path / "c.pth")
    assert "PosixPath" in message or "WindowsPath" in message
    assert "Namespace" not in message  # that one is not the reason


def test_files_that_are_no_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    assert "does not exist" in refusal(read_state_dict, tmp_path / "missing.pth")

    empty = tmp_path / "empty.pth"
    empty.touch()
    assert "empty" in refusal(read_state_dict, empty)

    other = tmp_path / "login.pth"
    other.write_text("Please log in")
    message = refusal(read_state_dict, other)
    assert "something else" in message
    assert "weights_only" not in message  # torch's own text advises to read the file unsafely

    script = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), script)
    message = refusal(read_state_dict, script)
    assert "TorchScript" in message
    assert "False" not in message

    tensor = tmp_path / "tensor.pth"
    torch.save(torch.zeros(3), tensor)
    assert "Tensor" in refusal(read_state_dict, tensor)

    settings = tmp_path / "settings.pth"
    torch.save({"epoch": 3, "state_dict": {}}, settings)
    assert "no weights, only epoch" in refusal(read_state_dict, settings)

    loop: dict[str, object] = {}
    loop["model"] = loop
    torch.save(loop, settings)
    assert "no weights" in refusal(read_state_dict, settings)

    sparse = tmp_path / "sparse.pth"
    torch.save({"w": torch.eye(2).to_sparse()}, sparse)
    assert "dense" in refusal(read_state_dict, sparse)

    torch.save({"w": torch.zeros(2, device="meta")}, sparse)
    assert "dense" in refusal(read_state_dict, sparse)


def test_folder_in_place_of_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unpacked"
    folder.mkdir()
    message = refusal(read_state_dict, folder)
    assert "is a folder" in message
    assert "do not unpack" not in message
    with zipfile.ZipFile(checkpoint) as archive:  # what unpacking a .pth.tar leaves
        archive.extractall(folder)
    assert "do not unpack it" in refusal(read_state_dict, folder)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.99])
def test_truncated_files(model: nn.Module, tmp_path: Path, form: str, keep: float) -> None:
    path = tmp_path / ("c.safetensors" if form == "safetensors" else "c.pth")
    if form == "safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=form == "zip")
    assert_same(read_state_dict(path), model.state_dict())
    with open(path, "r+b") as file:
        file.truncate(int(path.stat().st_size * keep))
    assert "damaged" in refusal(read_state_dict, path)


def test_a_pickle_called_safetensors_is_not_unpickled(tmp_path: Path) -> None:
    path, target = tmp_path / "c.safetensors", tmp_path / "made"
    write_bomb(path, target, "legacy")
    assert "is no safetensors file but PyTorch's: rename it to c.pth" in refusal(read_state_dict, path)
    assert not target.exists()


# Converting


@pytest.mark.parametrize("form", ["authors", "ours", "training", "safetensors"])
def test_convert_gives_a_folder_that_timm_loads(model: nn.Module, tmp_path: Path, form: str) -> None:
    src, dst = tmp_path / "c.pth.tar", tmp_path / "weights" / "test"
    theirs = authors_state_dict(model.state_dict())
    if form == "safetensors":
        src = tmp_path / "c.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in theirs.items()}, src)
    elif form == "training":
        averaged = {f"module.{key}": tensor for key, tensor in theirs.items()}
        plain = {key: torch.zeros_like(tensor) for key, tensor in theirs.items()}
        torch.save({"state_dict": plain, "state_dict_ema": averaged, "args": argparse.Namespace(lr=1)}, src)
    else:
        torch.save(theirs if form == "authors" else model.state_dict(), src)

    report = convert(src, dst, model=NAME)

    assert (report.folder, report.model, report.kernel_size, report.num_classes) == (dst, NAME, 5, 7)
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert report.ema == (form == "training")
    assert sorted(os.listdir(dst)) == ["config.json", "model.safetensors"]
    assert os.listdir(dst.parent) == ["test"]  # no temporary folder stays
    assert_same(load_file(dst / "model.safetensors"), model.state_dict())
    loaded = timm.create_model(f"local-dir:{dst}", pretrained=True)
    assert_same(loaded.state_dict(), model.state_dict())

    config = json.loads((dst / "config.json").read_text())
    assert config["conv2former"] == {
        "source": src.name,
        "sha256": report.sha256,
        "normalisation": "imagenet",
        "ema": form == "training",
    }
    assert len(report.sha256) == 64
    assert "untrained" not in json.dumps(config)
    assert "license" not in config["pretrained_cfg"]


def test_convert_takes_the_plain_weights_where_asked(model: nn.Module, tmp_path: Path) -> None:
    src, dst = tmp_path / "c.pth", tmp_path / "dst"
    averaged = {key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items()}
    torch.save({"state_dict": model.state_dict(), "state_dict_ema": averaged}, src)
    assert not convert(src, dst, model=NAME, ema=False).ema
    assert_same(load_file(dst / "model.safetensors"), model.state_dict())


@pytest.mark.parametrize("kernel_size", [7, 11])
def test_convert_finds_the_kernel_size(tmp_path: Path, kernel_size: int) -> None:
    model = trained(kernel_size=kernel_size, num_classes=3)
    src, dst = tmp_path / "c.pth", tmp_path / "dst"
    torch.save(authors_state_dict(model.state_dict()), src)
    assert convert(src, dst, model=NAME).kernel_size == kernel_size
    assert json.loads((dst / "config.json").read_text())["model_args"]["kernel_size"] == kernel_size
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(load_pretrained(dst)(x), model(x), rtol=0, atol=1e-6)


def test_converted_folder_takes_another_number_of_classes_and_gives_features(
    model: nn.Module, checkpoint: Path, tmp_path: Path
) -> None:
    dst = tmp_path / "dst"
    convert(checkpoint, dst, model=NAME)
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        stages = model.forward_intermediates(x, intermediates_only=True)
        for create in (
            lambda **kwargs: timm.create_model(f"local-dir:{dst}", pretrained=True, **kwargs).eval(),
            lambda **kwargs: load_pretrained(dst, **kwargs),
        ):
            other = create(num_classes=11)
            assert other(x).shape == (2, 11)
            assert torch.equal(other.forward_features(x), model.forward_features(x))
            assert torch.equal(other.forward_head(stages[-1], pre_logits=True), model.forward_head(stages[-1], True))
            features = create(features_only=True)
            for ours, theirs in zip(features(x), stages, strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("mean_std", "mean", "std"),
    [("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ("half", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))],
)
def test_normalisation_is_recorded_and_used(
    checkpoint: Path, tmp_path: Path, mean_std: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    dst = tmp_path / "dst"
    assert convert(checkpoint, dst, model=NAME, mean_std=mean_std).normalisation == mean_std  # type: ignore[arg-type]
    for model in (timm.create_model(f"local-dir:{dst}", pretrained=True), load_pretrained(dst)):
        config = resolve_model_data_config(model)
        assert (tuple(config["mean"]), tuple(config["std"])) == (mean, std)
    assert json.loads((dst / "config.json").read_text())["conv2former"]["normalisation"] == mean_std


def zeros(name: str, **kwargs: object) -> dict[str, torch.Tensor]:
    """A state dict of the right names and shapes that takes no room."""
    with torch.device("meta"):
        state_dict = timm.create_model(name, **kwargs).state_dict()
    return {key: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for key, tensor in state_dict.items()}


def test_a_fused_network_is_not_saved(tmp_path: Path) -> None:
    assert "save it before fuse()" in refusal(save_pretrained, timm.create_model(NAME).eval().fuse(), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_configuration_repeats_nothing(tmp_path: Path) -> None:
    """transformers gives the number of classes itself, and fails where ``model_args`` has it too."""
    model = timm.create_model(NAME, num_classes=7, kernel_size=7, in_chans=1)
    config = json.loads((save_pretrained(model, tmp_path / "a") / "config.json").read_text())
    assert (config["num_classes"], config["model_args"]) == (7, {"kernel_size": 7, "in_chans": 1})
    other = load_pretrained(save_pretrained(timm.create_model(NAME, num_classes=0, global_pool="max"), tmp_path / "b"))
    assert (other.num_classes, other.head.global_pool.pool_type) == (0, "max")


@pytest.mark.slow  # half a gigabyte is written
def test_a_tag_sets_the_input_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes of B at 384 are those at 224; only the name tells."""
    written = []

    def save(export: nn.Module, directory: str, **kwargs: object) -> None:
        os.mkdir(directory)
        Path(directory, "config.json").write_text('{"num_classes": 2}')
        written.append(export.pretrained_cfg)

    monkeypatch.setattr(hub, "save_for_hf", save)
    torch.save(zeros("conv2former_b", num_classes=2), tmp_path / "c.pth")
    for model in ("conv2former_b", "conv2former_b.untrained_384"):
        assert convert(tmp_path / "c.pth", tmp_path / model, model=model).model == "conv2former_b"
    assert [cfg["architecture"] for cfg in written] == ["conv2former_b", "conv2former_b"]
    assert [cfg["input_size"] for cfg in written] == [(3, 224, 224), (3, 384, 384)]
    assert [cfg["crop_pct"] for cfg in written] == [0.9, 1.0]


def test_a_checkpoint_of_another_size_is_refused_with_names_and_the_size_that_fits(tmp_path: Path) -> None:
    src, dst = tmp_path / "c.pth", tmp_path / "dst"
    torch.save(authors_state_dict(zeros("conv2former_s", num_classes=5, kernel_size=7)), src)

    message = refusal(convert, src, dst, model="conv2former_t")  # the same widths, other depths
    assert "unexpected stages.0.blocks.3.norm1.weight, " in message
    assert "and 457 more" in message
    assert "missing" not in message  # 23 blocks more, of 20 tensors each
    assert message.endswith("it fits conv2former_s: give that as model")

    message = refusal(convert, src, dst, model="conv2former_n")
    assert "stem.conv1.weight is (36, 3, 3, 3) instead of (32, 3, 3, 3)" in message
    assert message.endswith("it fits conv2former_s: give that as model")
    assert not dst.exists()


def test_checkpoints_that_fit_nothing(model: nn.Module, tmp_path: Path) -> None:
    src, dst = tmp_path / "c.pth", tmp_path / "dst"
    state_dict = authors_state_dict(model.state_dict())

    torch.save({key: tensor for key, tensor in state_dict.items() if key != "head.2.bias"}, src)
    message = refusal(convert, src, dst, model=NAME)
    assert "missing head.norm.bias" in message
    assert "fits no registered size" in message

    torch.save(state_dict | {"extra.weight": torch.zeros(1)}, src)
    assert "unexpected extra.weight" in refusal(convert, src, dst, model=NAME)

    torch.save(timm.create_model("resnet18").state_dict(), src)
    message = refusal(convert, src, dst, model=NAME)
    assert "not a Conv2Former checkpoint" in message
    assert "conv1.weight" in message

    key = "stages.0.0.attn.att.2.weight"
    torch.save(state_dict | {key: state_dict[key][..., :4]}, src)
    assert "odd" in refusal(convert, src, dst, model=NAME)
    assert not dst.exists()


def test_a_checkpoint_without_classifier_becomes_a_model_without_classes(model: nn.Module, tmp_path: Path) -> None:
    src, dst = tmp_path / "c.pth", tmp_path / "dst"
    state_dict = authors_state_dict(model.state_dict())
    torch.save({key: tensor for key, tensor in state_dict.items() if not key.startswith("pred.")}, src)
    assert convert(src, dst, model=NAME).num_classes == 0
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(load_pretrained(dst)(x), model.forward_head(model.forward_features(x), pre_logits=True))


def test_names_of_models(checkpoint: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    assert "nearest name is conv2former_test" in refusal(convert, checkpoint, dst, model="conv2former_tst")
    assert "nearest name is" in refusal(convert, checkpoint, dst, model="")
    for other in ("resnet18", "conv2former_is", "conv2former_t_sum"):
        message = refusal(convert, checkpoint, dst, model=other)
        assert other in message
        assert "use one of conv2former_" in message
    assert "'nonsense'" in refusal(convert, checkpoint, dst, model=f"{NAME}.nonsense")
    assert "mean_std" in refusal(convert, checkpoint, dst, model=NAME, mean_std="none")
    assert not dst.exists()


def test_what_is_in_the_way_is_kept(model: nn.Module, checkpoint: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    dst.mkdir()
    convert(checkpoint, dst, model=NAME)  # an empty folder is no obstacle
    before = (dst / "config.json").read_bytes()

    assert "already" in refusal(convert, checkpoint, dst, model=NAME, mean_std="half")
    assert (dst / "config.json").read_bytes() == before
    convert(checkpoint, dst, model=NAME, mean_std="half", overwrite=True)
    assert (dst / "config.json").read_bytes() != before

    (dst / "notes.txt").write_text("mine")
    for call in (lambda: convert(checkpoint, dst, model=NAME, overwrite=True), lambda: save_pretrained(model, dst)):
        assert "notes.txt" in refusal(call)
    assert (dst / "notes.txt").read_text() == "mine"

    assert "is a file" in refusal(convert, checkpoint, checkpoint, model=NAME, overwrite=True)
    assert "cannot be written" in refusal(convert, checkpoint, checkpoint / "below", model=NAME)
    assert read_state_dict(checkpoint)


# Folders


def test_saved_model_comes_back_bit_for_bit(model: nn.Module, tmp_path: Path) -> None:
    labels = list("abcdefg")
    folder = save_pretrained(
        model,
        tmp_path / "a" / "b",
        label_names=labels,
        pretrained_cfg=dict(crop_pct=0.5, interpolation="bilinear"),
        extra=dict(conv2former=dict(epoch=3)),
    )
    config = json.loads((folder / "config.json").read_text())
    assert config["conv2former"] == {"epoch": 3}
    assert (config["architecture"], config["num_classes"]) == (NAME, 7)
    for loaded in (timm.create_model(f"local-dir:{folder}", pretrained=True), load_pretrained(folder)):
        assert_same(loaded.state_dict(), model.state_dict())
        assert loaded.pretrained_cfg["label_names"] == labels
        config = resolve_model_data_config(loaded)
        assert (config["crop_pct"], config["interpolation"]) == (0.5, "bilinear")
    assert not load_pretrained(folder).training


def test_saving_does_not_touch_the_model(model: nn.Module, tmp_path: Path) -> None:
    cfg = json.dumps(model.pretrained_cfg)
    state_dict = model.state_dict
    save_pretrained(model, tmp_path / "m", pretrained_cfg=dict(mean=(0.5, 0.5, 0.5)))
    assert json.dumps(model.pretrained_cfg) == cfg
    assert model.state_dict == state_dict
    assert model.state_dict()["head.fc.bias"].data_ptr() == model.head.fc.bias.data_ptr()


def test_tensors_that_are_not_contiguous_are_saved(model: nn.Module, tmp_path: Path) -> None:
    other = trained(num_classes=7).to(memory_format=torch.channels_last)
    assert not other.stem.conv1.weight.is_contiguous()
    save_pretrained(other, tmp_path / "m")
    assert_same(load_file(tmp_path / "m" / "model.safetensors"), model.state_dict())


def test_arguments_of_the_architecture_are_recorded(tmp_path: Path) -> None:
    model = trained(kernel_size=9, head_hidden_size=32, in_chans=1)
    args = dict(kernel_size=9, head_hidden_size=32, in_chans=1)
    save_pretrained(model, tmp_path / "m", model_args=args, pretrained_cfg=dict(input_size=(1, 64, 64)))
    assert_same(load_pretrained(tmp_path / "m").state_dict(), model.state_dict())


def test_labels_that_no_longer_fit_are_dropped(model: nn.Module, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path / "a", label_names=list("abcdefg"))
    other = load_pretrained(tmp_path / "a", num_classes=2)
    save_pretrained(other, tmp_path / "b")
    assert "label_names" not in load_pretrained(tmp_path / "b").pretrained_cfg
    with pytest.raises(ValueError, match="3 label names for 7 classes"):
        save_pretrained(model, tmp_path / "c", label_names=list("abc"))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a bug")])
def test_a_failed_save_leaves_the_old_model(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    folder = save_pretrained(model, tmp_path / "m")
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    def fail(export: nn.Module, directory: str, **kwargs: object) -> None:
        os.mkdir(directory)
        Path(directory, "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(hub, "save_for_hf", fail)
    if isinstance(error, OSError):
        assert "No space left" in refusal(save_pretrained, model, folder)
    else:  # not the user's mistake
        with pytest.raises(RuntimeError, match="a bug"):
            save_pretrained(model, folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
    assert os.listdir(tmp_path) == ["m"]


def test_a_failed_swap_brings_the_old_model_back(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_pretrained(model, tmp_path / "m")
    before = (folder / "config.json").read_bytes()
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    assert "Input/output error" in refusal(save_pretrained, model, folder, extra=dict(a=1))
    assert (folder / "config.json").read_bytes() == before
    assert os.listdir(tmp_path) == ["m"]


def test_load_takes_folder_weights_file_and_run(model: nn.Module, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_pretrained(model, run / "last", extra=dict(conv2former="last"))
    assert_same(load_pretrained(run).state_dict(), model.state_dict())

    other = trained(num_classes=2)
    save_pretrained(other, run / "best")
    assert_same(load_pretrained(run).state_dict(), other.state_dict())
    assert_same(load_pretrained(str(run / "last")).state_dict(), model.state_dict())
    assert_same(load_pretrained(run / "last" / "model.safetensors").state_dict(), model.state_dict())


def test_loaded_model_keeps_no_second_copy_of_its_weights(model: nn.Module, tmp_path: Path) -> None:
    folder = save_pretrained(model, tmp_path / "m")
    for loaded in (load_pretrained(folder), load_pretrained(folder, features_only=True)):
        for module in loaded.modules():
            assert "state_dict" not in getattr(module, "pretrained_cfg", {})
            assert "state_dict" not in getattr(module, "default_cfg", {})


def test_pickled_weights_in_a_folder_are_read_safely(model: nn.Module, tmp_path: Path) -> None:
    folder = save_pretrained(model, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert_same(load_pretrained(folder).state_dict(), model.state_dict())

    write_bomb(folder / "pytorch_model.bin", tmp_path / "made", "zip")
    assert "mkdir" in refusal(load_pretrained, folder)
    save_file(model.state_dict(), folder / "model.safetensors")
    assert_same(load_pretrained(folder).state_dict(), model.state_dict())  # the pickle beside it is not looked at
    assert not (tmp_path / "made").exists()


def test_load_says_what_is_wrong_with_a_path(model: nn.Module, checkpoint: Path, tmp_path: Path) -> None:
    assert "does not exist" in refusal(load_pretrained, tmp_path / "missing")

    folder = tmp_path / "empty"
    folder.mkdir()
    message = refusal(load_pretrained, folder)
    assert "config.json" in message and "give a run" in message

    assert f"conv2former convert {checkpoint} DST" in refusal(load_pretrained, checkpoint)
    save_file(model.state_dict(), folder / "model.safetensors")
    assert "conv2former convert" in refusal(load_pretrained, folder / "model.safetensors")


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_load_says_what_is_wrong_with_a_folder(model: nn.Module, tmp_path: Path) -> None:
    good = save_pretrained(model, tmp_path / "good")
    numbers = iter(range(100))

    def copy() -> Path:
        return Path(shutil.copytree(good, tmp_path / str(next(numbers))))

    folder = copy()
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(load_pretrained, folder)

    folder = copy()
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    assert "damaged" in refusal(load_pretrained, folder)

    for text in ("{", "", "\ufeff{}", "[]", "{}", '{"architecture": 3}'):
        folder = copy()
        (folder / "config.json").write_text(text)
        assert str(folder / "config.json") in refusal(load_pretrained, folder)
    folder = copy()
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "is not JSON" in refusal(load_pretrained, folder)

    folder = copy()
    edit_config(folder, architecture="conv2former_tset")
    assert "did you mean 'conv2former_test'" in refusal(load_pretrained, folder)
    edit_config(folder, architecture="my_own_net")
    assert "'my_own_net', which timm does not know" in refusal(load_pretrained, folder)

    folder = copy()
    edit_config(folder, model_args=[1])
    assert "model_args" in refusal(load_pretrained, folder)
    edit_config(folder, model_args={"kernel_size": 4})
    assert "kernel_size is 4" in refusal(load_pretrained, folder)
    edit_config(folder, model_args={"no_such_argument": 1})
    assert "no_such_argument" in refusal(load_pretrained, folder)


@pytest.mark.parametrize("model_args", [{}, {"num_classes": 3}, {"features_only": True}])
def test_weights_that_do_not_fit_the_configuration_are_refused(
    model: nn.Module, tmp_path: Path, model_args: dict[str, object]
) -> None:
    """Also where classes change, which makes timm load what it finds and leave the rest random."""
    folder = save_pretrained(model, tmp_path / "m")
    state_dict = model.state_dict()
    lost = {key: tensor for key, tensor in state_dict.items() if key != "stages.1.blocks.0.mod.w1.weight"}
    save_file(lost, folder / "model.safetensors")
    message = refusal(load_pretrained, folder, **model_args)
    assert "missing stages.1.blocks.0.mod.w1.weight" in message
    assert NAME in message


def test_other_networks_of_timm_are_saved_and_loaded(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=3)
    save_pretrained(model, tmp_path / "m", label_names=["x", "y", "z"])
    assert_same(load_pretrained(tmp_path / "m").state_dict(), model.state_dict())


def test_wrappers_and_numbers_that_are_none(tmp_path: Path) -> None:
    """The only dictionary of tensors, whatever it is called; a counter of a profiler's; NaN."""
    state = timm.create_model("conv2former_test", num_classes=5).state_dict()
    outer = {"epoch": 3, "net": {f"model.{name}": value for name, value in state.items()}}
    torch.save({"experiment": outer}, tmp_path / "deep.pth")
    report = convert(tmp_path / "deep.pth", tmp_path / "deep", model="conv2former_test")
    assert report.num_classes == 5 and not report.notes
    older = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    averaged = {f"module.{name}": value for name, value in older.items()} | {"n_averaged": torch.ones(1)}
    torch.save(averaged, tmp_path / "s.pth")
    assert not convert(tmp_path / "s.pth", tmp_path / "s", model="conv2former_test").notes
    beside = state | {"stem.conv1.total_ops": torch.zeros(1)}
    torch.save({f"net.backbone.{k}": v for k, v in beside.items()} | {"loss.weight": torch.ones(1)}, tmp_path / "a.pth")
    assert "1 tensors beside the network" in str(convert(tmp_path / "a.pth", tmp_path / "a", model="conv2former_test"))
    torch.save({k: v for k, v in state.items() if not k.startswith("head")}, tmp_path / "headless.pth")
    report = convert(tmp_path / "headless.pth", tmp_path / "headless", model="conv2former_test")
    assert report.num_classes == 0 and "it has no head" in str(report)
    two = {f"{name}.{key}": value for name in ("student", "teacher") for key, value in state.items()}
    torch.save(two, tmp_path / "two.pth")
    assert "holds 2 networks (student., teacher.)" in refusal(
        convert, tmp_path / "two.pth", tmp_path / "two", model="conv2former_test"
    )
    state["stem.conv1.weight"] = state["stem.conv1.weight"] * float("nan")
    torch.save(state, tmp_path / "nan.pth")
    message = refusal(convert, tmp_path / "nan.pth", tmp_path / "nan", model="conv2former_test")
    assert "holds values that are no numbers (stem.conv1.weight)" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of Git LFS: fetch the file itself"),
        (b"\n<!DOCTYPE html><html><body>Please log in", "a web page"),
        (b"\x1f\x8b\x08", "compressed by gzip: unpack it first"),
    ],
)
def test_what_a_download_leaves_in_the_place_of_a_file(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.pth").write_bytes(content)
    assert message in refusal(read_state_dict, tmp_path / "c.pth")


def test_the_content_says_how_a_file_is_read(model: nn.Module, tmp_path: Path) -> None:
    save_file(model.state_dict(), tmp_path / "c.pth")
    assert_same(read_state_dict(tmp_path / "c.pth"), model.state_dict())


@pytest.mark.parametrize(("name", "dtype"), [("a.weight", "int8"), ("a.gamma", "complex64"), ("a.bias", "int64")])
def test_weights_that_are_not_in_floating_point(name: str, dtype: str, checkpoint: Path, tmp_path: Path) -> None:
    wrong = {name: torch.ones(2, dtype=getattr(torch, dtype)), "a.index": torch.ones(2, dtype=torch.int64)}
    torch.save(wrong, tmp_path / "wrong.pth")
    message = f"holds {name} as {dtype}: save the weights in floating point"
    assert message in refusal(read_state_dict, tmp_path / "wrong.pth")
    # beside a network they are left out, as whatever else is there
    network = {f"net.{key}": value for key, value in read_state_dict(checkpoint).items()}
    torch.save(network | wrong, tmp_path / "beside.pth")
    report = convert(tmp_path / "beside.pth", tmp_path / "converted", model=NAME)
    assert "2 tensors beside the network are left out" in str(report)


def test_a_bare_file_is_told_the_way_that_it_can_go(checkpoint: Path, tmp_path: Path) -> None:
    assert f"conv2former convert {checkpoint} DST" in refusal(load_pretrained, checkpoint)
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "other.pth")
    assert "timm.models.save_for_hf(model, FOLDER)" in refusal(load_pretrained, tmp_path / "other.pth")


def test_what_a_checkpoint_says_of_itself_counts(tmp_path: Path) -> None:
    """timm's train.py keeps its arguments: some leave no trace in the weights, and the network would be another."""
    model, x = timm.create_model(NAME, num_classes=3, global_pool="avgmax").eval(), torch.randn(1, 3, 64, 64)
    args = argparse.Namespace(model=NAME, gp="avgmax", model_kwargs={}, mean=[0.5] * 3, std=None, img_size=64)
    content = dict(arch=NAME, state_dict=model.state_dict(), args=args)
    torch.save(content, tmp_path / "a.pth.tar")
    report = convert(tmp_path / "a.pth.tar", tmp_path / "a", model=NAME)
    said = "from the arguments in a.pth.tar: global_pool avgmax, input_size (3, 64, 64), mean (0.5, 0.5, 0.5)"
    assert said in str(report)
    made = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True).eval()
    assert torch.equal(made(x), model(x))
    config = resolve_model_data_config(made)
    assert tuple(config["mean"]) == (0.5, 0.5, 0.5) and config["input_size"] == (3, 64, 64)
    convert(tmp_path / "a.pth.tar", tmp_path / "half", model=NAME, mean_std="half")  # what is asked for comes first
    made = timm.create_model(f"local-dir:{tmp_path / 'half'}", pretrained=True)
    assert tuple(resolve_model_data_config(made)["std"]) == (0.5, 0.5, 0.5)
    convert(tmp_path / "a.pth.tar", tmp_path / "net", model=NAME, mean_std="imagenet")
    made = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True)
    assert tuple(resolve_model_data_config(made)["mean"]) == IMAGENET_DEFAULT_MEAN
    torch.save(content | dict(arch="conv2former_n_sum"), tmp_path / "b.pth.tar")
    assert "says that it holds a conv2former_n_sum" in refusal(
        convert, tmp_path / "b.pth.tar", tmp_path / "b", model=NAME
    )


def test_shapes_and_images_come_from_the_arguments_too(tmp_path: Path) -> None:
    model = timm.create_model(NAME, num_classes=3, head_hidden_size=24)
    args: dict[str, Any] = dict(
        model_kwargs=dict(head_hidden_size=24), input_size=[3, 96, 96], crop_pct=1.0, interpolation="bilinear"
    )
    path = tmp_path / "a.pth.tar"
    torch.save(dict(state_dict=model.state_dict(), args=argparse.Namespace(**args)), path)
    convert(path, tmp_path / "a", model=NAME)
    config = resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True))
    assert {key: config[key] for key in ("input_size", "crop_pct", "interpolation")} == dict(
        input_size=(3, 96, 96), crop_pct=1.0, interpolation="bilinear"
    )
    for wrong, message in (
        (dict(std=[0.0, 0.0, 0.0]), "prepare no images: std.0"),
        (dict(input_size=None, img_size=8184), "prepare no images: input_size.1"),
        (dict(model_kwargs=dict(stem_stride=3)), "no network has the arguments in a.pth.tar"),
    ):
        torch.save(dict(state_dict=model.state_dict(), args=argparse.Namespace(**(args | wrong))), path)
        assert message in refusal(convert, path, tmp_path / "b", model=NAME)
        assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("key", ["ema_model", "swa_state_dict", "averaged_model"])
def test_averages_of_other_programs(tmp_path: Path, key: str) -> None:
    path, plain, averaged = tmp_path / "a.pth", {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    torch.save({"state_dict": plain, key: averaged}, path)
    assert read_state_dict(path)["w"].tolist() == [1, 1]
    assert read_state_dict(path, ema=False)["w"].tolist() == [0, 0]
    torch.save({"state_dict": plain, "ema": {"decay": torch.tensor(0.9), "num_updates": torch.tensor(3)}}, path)
    assert read_state_dict(path)["w"].tolist() == [0, 0]
    torch.save({"state_dict": plain, "ema": {"decay": torch.tensor(0.9), "shadow": averaged}}, path)
    assert read_state_dict(path)["w"].tolist() == [1, 1]


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "a.pth")
    for name, mode in (("a.zip", "zip"), ("a.tar", "tar")):
        shutil.make_archive(str(tmp_path / "a"), mode, tmp_path, "a.pth")
        assert f"is no checkpoint but a {mode} file" in refusal(read_state_dict, tmp_path / name)
    np.savez(tmp_path / "b.npz", w=np.zeros(2))
    assert "a zip file (of w.npy)" in refusal(read_state_dict, tmp_path / "b.npz")
    torch.save({"w": np.zeros(2)}, tmp_path / "c.pth")
    assert "save its weights alone, as tensors" in refusal(read_state_dict, tmp_path / "c.pth")
    torch.save(dict(task={"model.w": torch.zeros(2)}, optimizer={}, position={}, scaler=None), tmp_path / "d.ckpt")
    assert "is what a training resumes from" in refusal(read_state_dict, tmp_path / "d.ckpt")
    assert "give hf-hub:OWNER/NAME" in refusal(load_pretrained, "https://huggingface.co/timm/a")
    assert "or hf-hub:timm/abc" in refusal(load_pretrained, "timm/abc")
    assert "--model resnet18.a1_in1k --pretrained" in refusal(load_pretrained, "resnet18.a1_in1k")


def test_wrapped_models_are_saved_and_parts_are_refused(model: nn.Module, tmp_path: Path) -> None:
    save_pretrained(torch.compile(model), tmp_path / "a")  # type: ignore[arg-type]
    load_pretrained(tmp_path / "a")
    part = timm.create_model(NAME, features_only=True)
    assert "(features_only makes parts): save the whole model" in refusal(save_pretrained, part, tmp_path / "b")


def test_changed_networks_are_named(model: nn.Module, tmp_path: Path) -> None:
    state = model.state_dict()
    name = "stages.0.blocks.0.mod.w1"
    changed = {
        "merge them": state | {f"{name}.base_layer.weight": state[f"{name}.weight"]},
        "prune.remove": state | {f"{name}.weight_orig": state[f"{name}.weight"]},
        "features_only": {f"stages_0.{key}": value for key, value in state.items() if key.startswith("stem")},
        "before fuse": fuse(model).state_dict(),
    }
    for way, content in changed.items():
        torch.save(content, tmp_path / "c.pth")
        assert way in refusal(convert, tmp_path / "c.pth", tmp_path / "out", model=NAME)


def fuse(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().fuse()  # type: ignore[operator]
