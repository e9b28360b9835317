"""What a training starts from: weights by name, a new classifier that is fitted first, nothing random in silence."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from torch import nn

from command import run_command
from conv2former.checkpoints import load_pretrained, save_pretrained
from conv2former.checkpoints.hub import find_model
from conv2former.checkpoints.weights import open_weights
from conv2former.config import ModelSection
from conv2former.engine.automatic import checked_weights, settled
from conv2former.engine.optim import build_optimizer
from conv2former.engine.train import train
from conv2former.errors import UserError
from conv2former.recipes import Recipe, load_recipe
from conv2former.tasks import task_class
from conv2former.tasks.classification import probe
from digits import one_picture
from hub import Hub
from runs import assert_same_run, stopped_run

pytestmark = pytest.mark.usefixtures("quick")


TINY_TIMM = "test_convnext.r160_in1k"  # the smallest network of which timm publishes weights
TINY = ["model.name=conv2former_test", "data.input_size=32", "data.workers=0", "optim.batch_size=8"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in for the Hugging Face hub, and an empty cache."""
    hub = Hub(tmp_path / "hub")
    for name, value in dict(
        ENDPOINT=hub.address,
        HUGGINGFACE_CO_URL_TEMPLATE=hub.address + "/{repo_id}/resolve/{revision}/{filename}",
        HF_HUB_DISABLE_XET=True,
        HF_HUB_CACHE=str(tmp_path / "cache"),
        HF_HUB_OFFLINE=False,
    ).items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    yield hub
    hub.shutdown()
    hub.server_close()


def finetune(*overrides: str) -> Recipe:
    return load_recipe("finetune", overrides=[*TINY, *overrides])


def test_a_repository_is_downloaded_once(hub: Hub, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(load_pretrained(finished), hub.root / "me" / "digits")
    folder, weights = find_model("hf-hub:me/digits")
    assert weights.read_bytes() == (hub.root / "me" / "digits" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"hf-hub:me/other is not on the hub, or is private: .*hf auth login"):
        find_model("hf-hub:me/other")
    with pytest.raises(UserError, match="give hf-hub:OWNER/NAME"):
        find_model("hf-hub:digits")
    (hub.root / "me" / "empty").mkdir()
    with pytest.raises(UserError, match="hf-hub:me/empty has no config"):
        find_model("hf-hub:me/empty")
    hub.shutdown()
    hub.server_close()
    assert find_model("hf-hub:me/digits") == (folder, weights), "the cache has it"
    with pytest.raises(
        UserError, match=r"hf-hub:me/new: neither in the cache nor to be downloaded .*HF_HUB_OFFLINE"
    ) as error:
        find_model("hf-hub:me/new")
    assert "\n" not in str(error.value)


def test_the_file_that_is_named_is_read(finished: Path, tmp_path: Path) -> None:
    folder = save_pretrained(load_pretrained(finished), tmp_path / "both")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_pretrained(folder).state_dict().items()}
    torch.save(zeros, folder / "pytorch_model.bin")
    for file, zero in {"pytorch_model.bin": True, "model.safetensors": False}.items():
        weights = open_weights(ModelSection(name="conv2former_test", weights=str(folder / file)))
        assert weights
        assert (not any(tensor.any() for tensor in weights.state.values())) == zero, file


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_what_timm_publishes(
    task: str, hub: Hub, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    published = timm.create_model(TINY_TIMM)
    save_pretrained(published, hub.root / "timm" / TINY_TIMM)
    name = dict(classification="finetune", segmentation="finetune_segmentation")[task]
    recipe = load_recipe(name, overrides=[f"model.name={TINY_TIMM}", "model.weights=timm", "model.drop_path_rate=0"])
    model = task_class(task).build(recipe, ["a", "b", "c"]).backbone
    own = model.state_dict()
    shared = {key: value for key, value in published.state_dict().items() if key in own and "head.fc" not in key}
    assert len(shared) > 20 and all(torch.equal(own[key], value) for key, value in shared.items())
    assert re.search(r"weights: \d+ tensors of timm \(test_convnext\) loaded, \d+ start new", capfd.readouterr().err)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert open_weights(recipe.model).state.keys() == published.state_dict().keys()  # type: ignore[union-attr]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub.root / "nothing"))
    with pytest.raises(UserError, match=rf"timm's weights of {TINY_TIMM}: neither in the cache nor to be downloaded"):
        len(open_weights(recipe.model).state)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="timm publishes no weights for conv2former_t: start from --pretrained"):
        open_weights(ModelSection(name="conv2former_t", weights="timm"))


def test_the_mean_follows_the_weights(
    finished: Path, tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    half = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    weights = save_pretrained(load_pretrained(finished), tmp_path / "weights", pretrained_cfg=half)
    short = ["schedule.epochs=1", "schedule.warmup_epochs=0"]
    train(finetune(f"model.weights={weights}", *short), data=data, out=tmp_path / "run")
    assert "not fitted before training: the classifier of the weights is for the same classes" in capfd.readouterr().err
    assert json.loads((tmp_path / "run/best/config.json").read_text())["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]
    both = ["data.mean=[0,0,0]", "data.std=[1,1,1]"]
    with pytest.raises(UserError, match=r"expects images of mean \(0.5, 0.5, 0.5\), std \(0.5") as error:
        train(finetune(f"model.weights={weights}", *both), data=data, out=tmp_path / "other")
    advice = shlex.split(str(error.value).partition(": add ")[2])
    assert advice == ["--set", "data.mean=auto", "--set", "data.std=auto"], "it can be pasted"
    again = finetune(f"model.weights={weights}", *both, *advice[1::2], *short)
    train(again, data=data, out=tmp_path / "other")
    with pytest.raises(UserError, match="--probe-only fits the head alone: the classifier of the weights is for"):
        train(finetune(f"model.weights={weights}", "model.fit_head=only"), data=data, out=tmp_path / "only")


@pytest.mark.parametrize("name", ["dpn68", "resnet18"])
def test_which_classifiers_can_be_fitted(name: str) -> None:
    recipe = finetune(f"model.name={name}", "model.needs_weights=false", "model.drop_path_rate=0")
    task = task_class("classification").build(recipe, ["a", "b"])
    assert (task.cannot_fit_head() is None) == (name == "resnet18")


def test_fine_tuning_does_not_start_at_random(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("finetune", "finetune_detection", "finetune_segmentation"):
        with pytest.raises(UserError, match=r"no weights are given: --pretrained .*--weights .*--from-scratch"):
            train(name, data=data, out=tmp_path / "run")
    options = ["--recipe", "finetune", "--data", str(data), *(f"--set={setting}" for setting in TINY)]
    options += ["--set=schedule.epochs=1", "--set=schedule.warmup_epochs=0", "--out", str(tmp_path / "run")]
    assert run_command(monkeypatch, "train", *options) == 1
    assert capfd.readouterr().err.count("\n") == 1 and not (tmp_path / "run").exists()
    assert run_command(monkeypatch, "train", *options, "--from-scratch") == 0
    said = capfd.readouterr().err
    assert "from random weights" in said and "features" not in said
    assert run_command(monkeypatch, "train", *options, "--from-scratch", "--weights", "x") == 1
    assert "exclude each other" in capfd.readouterr().err


def test_a_tag_without_weights_is_said(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = ["model.args={}", "schedule.epochs=1", "schedule.warmup_epochs=0"]
    recipe = load_recipe("quickstart", overrides=[f"model.name={TINY_TIMM}", "data.source=folder", *settings])
    train(recipe, data=data, out=tmp_path / "run")
    assert (
        f"warning: {TINY_TIMM} names weights, and training starts from random ones: add --pretrained"
        in capfd.readouterr().err
    )


def test_the_classifier_is_fitted_first(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Other names for the same digits: the classifier is new, and right before the first step."""
    renamed = tmp_path / "renamed"
    for split in ("train", "val"):
        for folder in (data / split).iterdir():
            (renamed / split).mkdir(parents=True, exist_ok=True)
            (renamed / split / folder.name.replace("digit", "number")).symlink_to(folder)
    recipe = finetune(f"model.weights={finished}", "schedule.epochs=2", "schedule.warmup_epochs=0")
    evaluation = train(recipe, data=renamed, out=tmp_path / "run")
    said = capfd.readouterr().err
    assert "2 start new (head.fc: its classes are others)" in said
    fitted = re.search(r"fitted to the features of 64 training images: ([\d.]+)% by cross-validation", said)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if row["kind"] == "epoch")
    assert fitted and float(fitted[1]) > 70 and first["step"] == 0 and first["val_top1"] >= 75
    assert evaluation is not None and evaluation.metrics["top1"] >= first["val_top1"]  # type: ignore[operator]
    only = train(finetune(f"model.weights={finished}", "model.fit_head=only"), data=renamed, out=tmp_path / "only")
    card = (tmp_path / "only" / "best" / "README.md").read_text()
    assert "| length | none: the classifier alone" in card and "| optimizer |" not in card
    assert only is not None and only.metrics["top1"] == first["val_top1"]
    stopped_run(recipe, renamed, tmp_path / "stopped", monkeypatch)
    train(None, data=None, out=tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "stopped")


def test_the_probe_finds_what_separates(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(300) % 3
    means = torch.randn(3, 40, generator=generator)
    features = means[targets] + torch.randn(300, 40, generator=generator) * 0.8
    features = features * torch.logspace(-2, 2, 40) + 5  # scales that differ, and a mean that is not zero
    fitted = probe.fit(features, targets, 3)
    right = (features @ fitted.weight.T + fitted.bias).argmax(1) == targets
    assert fitted.accuracy is not None and fitted.accuracy > 0.97 and right.float().mean() > 0.99
    few = probe.fit(features[:4], targets[:4], 3)
    assert torch.isfinite(few.weight).all() and few.accuracy is None
    monkeypatch.setattr(probe, "LONG", 0)
    assert probe.fit(features, targets, 3).accuracy is None
    assert not probe.fit(features, targets, 3, stopped=lambda: True).weight.any()


def test_the_head_has_a_learning_rate_of_its_own() -> None:
    task: Any = task_class("classification").build(
        finetune("optim.head_lr=5", "optim.layer_decay=null", "model.needs_weights=false"), ["a", "b"]
    )
    optim = task.recipe.optim
    groups = build_optimizer(task.model, optim, lr=1e-3, head=task.in_head).param_groups
    scale = {id(parameter): group.get("lr_scale", 1.0) for group in groups for parameter in group["params"]}
    assert len(scale) == len([*task.model.parameters()])
    for name, parameter in task.model.named_parameters():
        assert scale[id(parameter)] == (5 if name.startswith("head.fc.") else 1), name
    assert isinstance(task.model.get_classifier(), nn.Linear)


@pytest.mark.parametrize("images", [12, 1200])
def test_the_fraction_that_is_held_out_follows_the_images(images: int, finished: Path, tmp_path: Path) -> None:
    """Also if it is what was assumed before the images were counted; a validation set of one's own is left alone."""
    source = one_picture(tmp_path / "one.png")
    for number in range(images):
        folder = tmp_path / "one" / f"class-{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").hardlink_to(source)
    given = finetune(f"model.weights={finished}")
    recipe, splits = settled(given, tmp_path / "one", checked_weights(given))
    assert recipe.data.val_fraction == (0.2 if images < 1000 else 0.1)
    assert len(splits.val) == round(images * recipe.data.val_fraction / 2) * 2
    for split in ("train", "val"):
        shutil.copytree(tmp_path / "one", tmp_path / "two" / split)
    assert len(settled(given, tmp_path / "two", checked_weights(given))[1].val) == images
