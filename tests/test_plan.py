"""The dry run: its arithmetic by hand, its memory against a real pass, and nothing left behind but a image."""

from __future__ import annotations

import functools
import re
import shutil
from pathlib import Path

import pytest
import timm
from PIL import Image

from command import run_command
from conv2former.checkpoints import save_pretrained
from conv2former.config import IMAGENET_MEAN, IMAGENET_STD
from conv2former.engine import dry_run as plan
from conv2former.engine.dry_run import activations, build_without_memory, saved_bytes, state_bytes
from conv2former.engine.trial import stand_in
from conv2former.errors import UserError
from conv2former.recipes import Recipe, load_recipe
from conv2former.tasks import task_class
from conv2former.tasks.classification.task import ClassificationTask
from digits import write_digits

SMALL = ["model.name=conv2former_test", "model.args={}"]


def small(recipe: str = "imagenet1k_t", *overrides: str) -> Recipe:
    return load_recipe(recipe, overrides=[*SMALL, "model.needs_weights=false", "data.input_size=64", *overrides])


dry_run = functools.partial(plan.dry_run, verbose=True)


def section(text: str, title: str) -> str:
    return re.split(rf"^== {title}.*$", text, flags=re.M)[1].split("\n\n==")[0].strip()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return dry_run(small(), data=None, out=tmp_path_factory.mktemp("plan"))


def test_the_recipe_and_its_hash(text: str, tmp_path: Path) -> None:
    shown, _, last = section(text, "recipe").rpartition("\n")
    (path := tmp_path / "shown.yaml").write_text(shown)
    shipped = small().settled({"data.mean": IMAGENET_MEAN, "data.std": IMAGENET_STD})
    assert load_recipe(path) == shipped.decided(False)
    assert last == f"hash {small().digest()}"


def test_images_batch_and_steps(text: str) -> None:
    assert section(text, "data").startswith("1,281,167 images of 1,000 classes, by the recipe's claim")
    lines = section(text, "batch").splitlines()
    assert lines[0].startswith("128 images per process x 8 processes")
    assert lines[0].endswith("x 1 micro-batch = effective batch 1,024")
    assert lines[1] == "learning rate: 0.001 x 1,024 / 1,024 = 0.001"
    assert [line.split() for line in lines[3:]] == [
        ["1", "128", "8", "1,024", "0.001", "1,251"],
        ["8", "128", "1", "1,024", "0.001", "1,251"],
        ["32", "32", "1", "1,024", "0.001", "1,251"],
    ]
    steps = section(text, "steps")
    assert "1,281,167 images / 1,024 = 1,251 steps per epoch" in steps
    assert "25,020 steps of warm-up (20 epochs)" in steps and "375,300 steps in all (300 epochs)" in steps
    assert "resumes unchanged on 1, 2, 4, 8 processes: an optimizer step has 8 micro-batches" in steps


def test_the_rate_grows_with_the_batch_and_the_claim_counts_what_is_held_out(tmp_path: Path) -> None:
    text = dry_run(small("imagenet22k_s"), data=None, out=tmp_path)
    assert "0.001 x 4,096 / 1,024 = 0.004" in text and "about 70,986 of them are held out" in text
    assert "14,126,136 images / 4,096 = 3,448 steps per epoch" in text and "310,320 steps in all (90 epochs)" in text
    assert "parameters" in section(text, "network") and "1,484" not in section(text, "network")


def test_images_are_counted_where_there_are_some(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "digits")
    train = len(list((data / "train").rglob("*.png")))
    text = dry_run(small("finetune", "optim.batch_size=4"), data=data, out=tmp_path)
    assert f"{train} training and 16 validation images" in section(text, "data")
    assert f"{train} images / 4 = {train // 4} steps per epoch" in section(text, "steps")
    with pytest.raises(UserError, match=rf"{train} training images are fewer than one batch of 1024: lower optim"):
        dry_run(small(), data=data, out=tmp_path)


def test_what_is_said_of_the_images_is_said_here_too(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "digits")
    copied = next((data / "train").rglob("*.png"))
    shutil.copy(copied, data / "val" / copied.parent.name / "copied.png")
    text = plan.dry_run(small("finetune", "optim.batch_size=4"), data=data, out=None)
    assert text.count("1 of the 17 validation images are training images, too") == 1
    assert text.count("17 validation images") == 2  # the numbers once


def test_without_data_or_claim_it_says_so(tmp_path: Path) -> None:
    text = dry_run(small("finetune"), data=None, out=tmp_path)
    assert "number of images unknown" in section(text, "data") and "--data DIR tells it" in text
    assert "steps unknown without --data" in section(text, "steps")


def test_a_number_of_processes_that_cannot_share_the_batch(tmp_path: Path) -> None:
    rows = section(dry_run(small("imagenet1k_t", "optim.global_batch=1040"), data=None, out=tmp_path), "batch")
    assert "32  " in rows and "cannot be shared by 32 processes" in rows
    with pytest.raises(UserError, match="cannot be shared by 7 processes"):
        dry_run(small("imagenet1k_t", "claim.processes=7"), data=None, out=tmp_path)


def test_groups_by_layer(text: str, tmp_path: Path) -> None:
    model = timm.create_model("conv2former_test")
    vectors, rest = ([p for p in model.parameters() if (p.ndim == 1) is flat] for flat in (True, False))
    table = [line.split("  ") for line in section(text, "parameter groups").splitlines()]
    rows = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in table}
    assert rows["decayed"] == [str(len(rest)), f"{sum(p.numel() for p in rest):,}", "0.05", "1"]
    assert rows["not decayed"] == [str(len(vectors)), f"{sum(p.numel() for p in vectors):,}", "0", "1"]
    layered = section(dry_run(small("finetune", "optim.layer_decay=0.8"), data=None, out=tmp_path), "parameter groups")
    scales = {int(m[1]): float(m[2]) for m in re.finditer(r"layer (\d+),.*  (\S+)$", layered, re.M)}
    deepest = max(scales)
    assert scales == pytest.approx({k: 0.8 ** (deepest - k) for k in range(deepest + 1)}, rel=1e-3)


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_activations_are_those_of_a_real_pass(precision: str) -> None:
    recipe = small("imagenet1k_t", f"engine.precision={precision}")
    found = activations(build_without_memory(recipe, classes=10))
    model = timm.create_model("conv2former_test", num_classes=10, drop_path_rate=recipe.model.drop_path_rate)
    task = ClassificationTask(model, recipe).train()
    for batch in (2, 6):
        step = functools.partial(task.training_step, task.example_batch(batch))
        real = saved_bytes(task, step, half=precision != "32")
        assert found.fixed + batch * found.per_image == pytest.approx(real, rel=0.01)
    assert found.whole


def test_activations_of_a_detector_are_those_of_its_backbone(tmp_path: Path) -> None:
    """Its loss needs values: nothing of the attempt is counted."""
    recipe = load_recipe("smoke_detection")
    found = activations(build_without_memory(recipe, classes=3))
    task = task_class("detection").build(recipe, ["a", "b", "c"]).train()
    real = [saved_bytes(task, functools.partial(stand_in, task, count), half=False) for count in (2, 4)]
    assert not found.whole and found.per_image == pytest.approx((real[1] - real[0]) / 2, rel=0.02)


def test_half_width_and_checkpointing_save_activations() -> None:
    def per_image(*overrides: str) -> int:
        recipe = small("imagenet1k_t", *overrides)
        return activations(build_without_memory(recipe, classes=10)).per_image

    full, half = per_image("engine.precision=32"), per_image()
    assert 0.5 * full < half < 0.75 * full
    assert per_image("engine.grad_checkpointing=true") < 0.7 * half


@pytest.mark.parametrize(
    ("optimizer", "vector", "matrix"), [("adamw", 8, 8), ("sgd", 4, 4), ("lion", 4, 4), ("muon", 8, 4)]
)
def test_optimizer_state_by_kind_of_tensor(optimizer: str, vector: int, matrix: int) -> None:
    assert state_bytes(small("imagenet1k_t", f"optim.name={optimizer}").optim) == {1: vector, 2: matrix, 4: matrix}


def sizes(text: str) -> dict[str, float]:
    """MiB by what they hold."""
    found = re.finditer(r"^([^\d\n]*?)  +([\d.]+) (GiB|MiB)", section(text, "memory"), re.M)
    return {m[1]: float(m[2]) * (1024 if m[3] == "GiB" else 1) for m in found}


def test_memory_adds_up_and_fsdp_shares_it(tmp_path: Path) -> None:
    overrides = ["model.name=conv2former_atto", "model.args.depths=[1,1,1,1]"]
    overrides += ["optim.batch_size=2", "optim.ema_decay=0.999"]
    plain = sizes(dry_run(small("imagenet1k_t", *overrides), data=None, out=tmp_path))
    model = timm.create_model("conv2former_atto", depths=(1, 1, 1, 1))
    weights = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    assert plain["weights"] == plain["gradients"] == plain["averaged weights"] == pytest.approx(weights, abs=0.06)
    assert plain["optimizer state"] == pytest.approx(2 * weights, abs=0.06)
    assert plain["sum"] == pytest.approx(sum(size for what, size in plain.items() if what != "sum"), abs=0.3)
    shared = sizes(dry_run(small("imagenet1k_t", *overrides, "engine.strategy=fsdp"), data=None, out=tmp_path))
    assert shared["weights"] == shared["gradients"] == pytest.approx(weights / 8, abs=0.06)
    assert shared["optimizer state"] == pytest.approx(2 * weights / 8, abs=0.06)
    assert shared["activations"] == plain["activations"] > 1


def test_weights_need_not_exist(tmp_path: Path) -> None:
    text = dry_run(small("imagenet1k_ft224_s"), data=None, out=tmp_path)
    assert "starts from runs/imagenet22k_s, which is not there yet" in text


def test_weights_are_looked_at(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"fine-tunes, and no weights are given: --pretrained .*--weights.*--from-scratch"
    ):
        dry_run(load_recipe("finetune"), data=None, out=None)
    save_pretrained(timm.create_model("conv2former_test", num_classes=3, kernel_size=5), tmp_path / "weights")
    text = dry_run(small("finetune", f"model.weights={tmp_path / 'weights'}"), data=None, out=None)
    assert f"starts from {tmp_path / 'weights'} (conv2former_test)" in text and "kernel_size: 5" in section(
        text, "recipe"
    )
    with pytest.raises(
        UserError, match="holds a conv2former_test, the recipe says resnet18: give --model conv2former_test"
    ):
        dry_run(small("finetune", f"model.weights={tmp_path / 'weights'}", "model.name=resnet18"), data=None, out=None)


def test_the_summary_is_short_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = write_digits(tmp_path / "digits")
    text = plan.dry_run(small("finetune", "optim.batch_size=4"), data=data, out=None)
    assert len(text.splitlines()) <= 12 and [path.name for path in tmp_path.iterdir()] == ["digits"]
    assert re.search(r"memory: [\d.]+ MiB of tensors for each process", text) and re.search(
        r"time: about \d+ \w+ of training here", text
    )


def test_mistakes_are_found(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be trained on images of 16 x 16 pixels: the image is smaller than 32"):
        dry_run(small("imagenet1k_t", "data.input_size=16"), data=None, out=tmp_path)
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"model.args of conv2former_test: kernel_size is 4"):
        dry_run(small("imagenet1k_t", "model.args.kernel_size=4"), data=None, out=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*schedule.png"):
        dry_run(small(), data=None, out=tmp_path / "file" / "schedule.png")


def test_a_picture_is_drawn_if_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "--out FILE.png draws the learning rate" in dry_run(small(), data=None, out=Path("runs/new"))
    assert not [*tmp_path.iterdir()]  # the folder of a training that may follow is not touched
    assert "runs/plan.png shows the learning rate" in dry_run(small(), data=None, out=Path("runs/plan.png"))
    assert Image.open("runs/plan.png").size[0] > 800


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit status of ``conv2former train ARGUMENTS``, in this process."""
    return run_command(monkeypatch, "train", *arguments)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "--recipe", "quickstart", "--dry-run") == 0
    assert "1,438 images / 64 = 22 steps per epoch" in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]
    for arguments, message in (
        (["--recipe", "quickstart"], "error: no run folder given: name one with --out DIR"),
        (["--dry-run"], "error: --dry-run plans a recipe"),
        (["--recipe", "quickstart", "--dry-run", "--resume"], "error: --dry-run plans a recipe"),
    ):
        assert command(monkeypatch, *arguments) == 1
        answer = capsys.readouterr().err
        assert answer.startswith(message) and answer.count("\n") == 1


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [
        ("coco_mask_rcnn_t", "44,856,828"),
        pytest.param("coco_cascade_mask_rcnn_s", "106,027,518", marks=pytest.mark.slow),  # heads: test_detector.py
        ("ade20k_upernet_t", "55,511,096"),
    ],
)
def test_detectors_and_segmenters_are_planned(recipe: str, parameters: str, tmp_path: Path) -> None:
    """Exact parameters of the paper's networks without data; the parts add up."""
    planned = dry_run(load_recipe(recipe), data=None, out=tmp_path)
    found = re.match(r"conv2former_[ts]: ([\d,]+) parameters \((.*)\)", section(planned, "network"))
    assert found and found[1] == parameters
    parts = [
        int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d(?=,|$)", re.sub(r"[a-z]+ ", "", found[2]))
    ]
    assert sum(parts) == int(parameters.replace(",", ""))
    assert "effective batch 16" in section(planned, "batch") and "GiB" in section(planned, "memory per process")
    steps = "160,000 steps in all (126.7 epochs)" if recipe.startswith("ade") else "263,844 steps in all (36 epochs)"
    assert steps in section(planned, "steps")
