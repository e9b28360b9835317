"""The engine: what a run leaves behind, and that it continues as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from conv2former import loop as engine
from conv2former.errors import UserError
from conv2former.recipes import Recipe
from conv2former.run import RunFolder
from conv2former.tasks.classification import ClassificationTask
from conv2former.train import Interrupted, train
from digits import TINY, tiny_recipe, write_digits

EVERYTHING = ["augment.mixup=0.8", "augment.cutmix=1.0", "augment.random_erasing=0.25", "model.drop_path_rate=0.3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    train(tiny_recipe(), data=data, out=out)
    return out


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last" / "model.safetensors")


def assert_same_run(run: Path, other: Path) -> None:
    mine, theirs = weights(run), weights(other)
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different, f"{len(different)} of {len(mine)} tensors differ: {different[:3]}"
    timing = "images_per_second"
    rows = [[{k: v for k, v in row.items() if k != timing} for row in RunFolder(r).rows()] for r in (run, other)]
    assert rows[0] == rows[1]


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The run is asked to stop as by Ctrl-C once ``step`` steps are done."""
    original = engine.Loop._step

    def stepping(self: engine.Loop, batches: object) -> None:
        original(self, batches)
        if self.position.step == step:
            self.stop.signum = signal.SIGINT

    monkeypatch.setattr(engine.Loop, "_step", stepping)


def stopped_run(recipe: Recipe, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *, step: int = 5) -> None:
    """A run that was stopped after ``step`` steps."""
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Interrupted):
            train(recipe, data=data, out=out)


def test_a_run_leaves_everything_behind(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        *("recipe.yaml", "run.json", "metrics.jsonl", "metrics.csv", "tensorboard", "checkpoints", "best", "last"),
        *("evaluation.json", "confusion_matrix.png", "predictions.png", "learning_curves.png"),
    }
    assert not list(finished.rglob("*.partial"))
    epochs = RunFolder(finished).rows("epoch")
    assert [row["epoch"] for row in epochs] == [1, 2, 3]
    assert len((finished / "metrics.csv").read_text().splitlines()) == 4
    assert RunFolder(finished).recipe() == tiny_recipe()
    assert any((finished / "tensorboard").iterdir())


def test_best_and_last_load_with_timm(finished: Path, data: Path) -> None:
    for folder in ("best", "last"):
        model = timm.create_model(f"local-dir:{finished / folder}", pretrained=True)
        assert model.num_classes == 4
        config = timm.data.resolve_model_data_config(model)
        assert config["input_size"] == (3, 16, 16) and config["crop_pct"] == 1.0
        saved = json.loads((finished / folder / "config.json").read_text())
        assert saved["label_names"] == [f"digit-{i}" for i in range(4)]
        assert saved["model_args"]["stem_stride"] == 2


def test_the_report_is_of_the_best_weights(finished: Path) -> None:
    best = max(row["val_top1"] for row in RunFolder(finished).rows("epoch"))
    assert json.loads((finished / "evaluation.json").read_text())["top1"] == pytest.approx(best)


def test_the_loss_falls(finished: Path) -> None:
    rows = RunFolder(finished).rows("epoch")
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_the_learning_rate_follows_the_schedule(finished: Path) -> None:
    recipe = tiny_recipe()
    peak = recipe.optim.base_lr * recipe.optim.batch_size / recipe.optim.base_batch
    last = RunFolder(finished).rows("step")[-1]
    # the last of 12 steps is step 11, seven steps after the warm-up of four, of a cosine over eight
    expected = 1e-6 + 0.5 * (peak - 1e-6) * (1 + torch.cos(torch.tensor(torch.pi * 7 / 8, dtype=torch.double)))
    assert last["lr"] == pytest.approx(float(expected))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_stopped_run_continues_bit_for_bit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, step: int
) -> None:
    recipe = tiny_recipe(*EVERYTHING, f"data.workers={workers}")
    train(recipe, data=data, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Interrupted, match="--resume") as stopped:
            train(recipe, data=data, out=tmp_path / "parts")
        assert stopped.value.code == 128 + signal.SIGINT
    train(None, data=None, out=tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_stop_during_the_evaluation_loses_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe()
    train(recipe, data=data, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 8)  # the last step of the second epoch: the evaluation meets the stop first
        with pytest.raises(Interrupted):
            train(recipe, data=data, out=tmp_path / "parts")
    assert [row["epoch"] for row in RunFolder(tmp_path / "parts").rows("epoch")] == [1]
    train(None, data=None, out=tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_accumulation_resumes_and_takes_the_images_of_the_large_batch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("optim.batch_size=8", "optim.accumulate=2", *EVERYTHING)
    train(recipe, data=data, out=tmp_path / "whole")
    stopped_run(recipe, data, tmp_path / "parts", monkeypatch)
    train(None, data=None, out=tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_killed_process_continues_bit_for_bit(data: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch, behind the first checkpoint; nothing is tidied up."""
    options = [f"--set={override}" for override in [*TINY, "schedule.epochs=12", "data.workers=2"]]
    command = [sys.executable, "-m", "conv2former_cli", "train"]
    start = [*command, "--recipe=quickstart", f"--data={data}", *options]
    killed = subprocess.Popen(
        [*start, f"--out={tmp_path / 'parts'}"], stderr=subprocess.DEVNULL, start_new_session=True
    )
    rows = tmp_path / "parts" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (rows.exists() and rows.read_text().count('"epoch", ') >= 3):
        assert killed.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "parts" / "evaluation.json").exists()
    subprocess.run([*command, f"--out={tmp_path / 'parts'}", "--resume"], check=True, capture_output=True)
    train(tiny_recipe("schedule.epochs=12", "data.workers=2"), data=data, out=tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(data: Path, tmp_path: Path, signum: signal.Signals) -> None:
    command = [sys.executable, "-m", "conv2former_cli", "train", "--recipe=quickstart", f"--data={data}"]
    options = [f"--set={override}" for override in [*TINY, "schedule.epochs=2000", "data.workers=2"]]
    run = subprocess.Popen(
        [*command, *options, f"--out={tmp_path / 'run'}"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    rows = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (rows.exists() and '"epoch", ' in rows.read_text()):
        assert run.poll() is None and time.monotonic() < deadline, "the run ended before Ctrl-C"
        time.sleep(0.02)
    os.killpg(run.pid, signum)  # as a terminal or a scheduler does: to the workers too
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + signum
    assert "Traceback" not in errors
    assert errors.rstrip().endswith(f"continue with: conv2former train --out {tmp_path / 'run'} --resume")
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert f"stopped at step {state['position']['step']}," in errors


def test_two_processes_share_the_work(data: Path, tmp_path: Path) -> None:
    options = [f"--set={override}" for override in [*TINY, "engine.devices=2", "optim.batch_size=8"]]
    command = [sys.executable, "-m", "conv2former_cli", "train", "--recipe=quickstart", f"--data={data}", *options]
    answer = subprocess.run([*command, f"--out={tmp_path / 'run'}"], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "batch 8 x 2 processes x 1 accumulated = 16" in answer.stderr
    assert answer.stdout.count("top-1") == 1
    rows = RunFolder(tmp_path / "run").rows("epoch")
    assert [row["step"] for row in rows] == [4, 8, 12]
    # every validation image counted once over both processes, in the loop and in the report
    assert "of 16)" in answer.stderr and json.loads((tmp_path / "run" / "evaluation.json").read_text())["images"] == 16


def test_a_finished_run_resumes_to_its_report(finished: Path) -> None:
    before = weights(finished)
    result = train(None, data=None, out=finished, resume=True)
    assert result is not None and result.counts["images"] == 16
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(finished).items())


def test_a_run_is_not_overwritten_by_accident(finished: Path, data: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"already holds a run.*--resume.*--overwrite"):
        train(tiny_recipe(), data=data, out=finished)
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_overwrite_replaces_a_run_and_nothing_else(data: Path, tmp_path: Path) -> None:
    short = tiny_recipe("schedule.epochs=1", "schedule.warmup_epochs=0")
    train(short, data=data, out=tmp_path / "run")
    train(short, data=data, out=tmp_path / "run", overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not a run"):
        train(short, data=data, out=tmp_path / "other", overwrite=True)
    assert (tmp_path / "other" / "thesis.txt").exists()


def test_overwrite_checks_the_input_before_it_deletes(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        train(tiny_recipe(), data=tmp_path / "nowhere", out=finished, overwrite=True)
    assert (finished / "best" / "model.safetensors").exists()


def test_resume_with_another_recipe_is_refused_with_the_difference(finished: Path) -> None:
    with pytest.raises(UserError, match=r"optim.weight_decay: run 0.05, given 0.1"):
        train(tiny_recipe("optim.weight_decay=0.1"), data=None, out=finished, resume=True)


def test_a_broken_image_ends_the_run_with_its_name_and_a_checkpoint(data: Path, tmp_path: Path) -> None:
    write_digits(tmp_path / "data")
    broken = tmp_path / "data" / "train" / "digit-2" / "broken.png"
    broken.write_bytes((next(broken.parent.glob("*.png"))).read_bytes()[:60])
    for workers in (0, 2):
        with pytest.raises(UserError, match=r"cannot read .*broken.png"):
            train(tiny_recipe(f"data.workers={workers}"), data=tmp_path / "data", out=tmp_path / f"run-{workers}")
        assert (tmp_path / f"run-{workers}" / "checkpoints" / "last.ckpt").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_spares_the_checkpoint(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the loss is not finite"):
        train(
            tiny_recipe("optim.name=sgd", "optim.base_lr=1e30", "schedule.warmup_epochs=0"),
            data=data,
            out=tmp_path / "run",
        )
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_arguments_that_are_not_the_networks_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.args cannot hold pretrained"):
        train(tiny_recipe("model.args.pretrained=true"), data=data, out=tmp_path / "run")


def test_the_last_step_cannot_poison_the_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses of an epoch are finite; its last update is not."""
    original = engine.Loop._log

    def poisoning(self: engine.Loop, started: float) -> None:
        if self.position.step == 8:
            self.model.head.fc.weight.data.fill_(float("nan"))
        original(self, started)

    monkeypatch.setattr(engine.Loop, "_log", poisoning)
    with pytest.raises(UserError, match="not finite"):
        train(tiny_recipe(), data=data, out=tmp_path / "run")
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["position"]["step"] == 4


def test_clipping_meets_a_gradient_that_is_not_finite(data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("optim.name=sgd", "optim.base_lr=1e30", "optim.clip_grad=1", "schedule.warmup_epochs=0")
    with pytest.raises(UserError, match="the loss is not finite"):
        train(recipe, data=data, out=tmp_path / "run")


def test_a_batch_larger_than_the_set_says_which_fits(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"64 training images are fewer than one batch of 128.*optim.batch_size=64"):
        train(tiny_recipe("optim.batch_size=128"), data=data, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_cannot_be_made_is_one_line(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the output folder"):
        train(tiny_recipe(), data=data, out=tmp_path / "file" / "run")


def test_fine_tuning_takes_the_weights_and_a_new_classifier(finished: Path, tmp_path: Path) -> None:
    data = write_digits(tmp_path / "data", classes=3)
    recipe = tiny_recipe(f"model.weights={finished}", "optim.base_lr=1e-12", "schedule.epochs=1", *FROZEN)
    train(recipe, data=data, out=tmp_path / "run")
    before, after = load_file(finished / "best" / "model.safetensors"), weights(tmp_path / "run")
    assert after["head.fc.weight"].shape[0] == 3
    torch.testing.assert_close(after["stages.0.blocks.0.mod.w1.weight"], before["stages.0.blocks.0.mod.w1.weight"])


FROZEN = ["schedule.warmup_epochs=0", "schedule.min_lr=0"]


def test_weights_of_another_model_are_refused(finished: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a conv2former_test, the recipe says conv2former_atto"):
        train(tiny_recipe(f"model.weights={finished}", "model.name=conv2former_atto"), data=data, out=tmp_path / "run")


def test_a_partial_fit_of_the_weights_is_refused(finished: Path, data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(f"model.weights={finished}", "model.args.depths=[1,1,3,1]")
    with pytest.raises(UserError, match=r"does not fit the recipe's model.args: stages\.2\.blocks\.2"):
        train(recipe, data=data, out=tmp_path / "run")


def test_fine_tuning_keeps_the_arguments_of_the_weights(finished: Path, data: Path, tmp_path: Path) -> None:
    """The stem's stride leaves no trace in the weights; it comes from their configuration."""
    recipe = tiny_recipe(f"model.weights={finished}", "model.args={}", "schedule.epochs=2")
    train(recipe, data=data, out=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "best" / "config.json").read_text())["model_args"]["stem_stride"] == 2


def test_weights_for_images_normalised_otherwise_are_refused(finished: Path, data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(f"model.weights={finished}", "data.mean=[0.5,0.5,0.5]")
    with pytest.raises(UserError, match=r"expects images of mean .*add --set data.mean=\[0.485"):
        train(recipe, data=data, out=tmp_path / "run")


def test_a_resumed_run_needs_its_first_weights_no_more(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished / "best", tmp_path / "weights")
    recipe = tiny_recipe(f"model.weights={tmp_path / 'weights'}", "model.args={}")
    stopped_run(recipe, data, tmp_path / "run", monkeypatch)
    shutil.rmtree(tmp_path / "weights")
    result = train(None, data=None, out=tmp_path / "run", resume=True)
    assert result is not None and result.counts["images"] == 16


def test_resume_on_other_images_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_digits(tmp_path / "data")
    stopped_run(tiny_recipe(), data, tmp_path / "run", monkeypatch)
    victim = next((data / "train" / "digit-1").iterdir())
    content = victim.read_bytes()
    victim.unlink()
    with pytest.raises(UserError, match=r"started with images .*'train': 64.*now they are .*'train': 63"):
        train(None, data=None, out=tmp_path / "run", resume=True)
    victim.with_name("other.png").write_bytes(content)
    with pytest.raises(UserError, match="started with other files"):
        train(None, data=None, out=tmp_path / "run", resume=True)


def test_a_damaged_checkpoint_is_one_line(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_run(tiny_recipe(), data, tmp_path / "run", monkeypatch)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"last\.ckpt, it is damaged") as error:
        train(None, data=None, out=tmp_path / "run", resume=True)
    assert "\n" not in str(error.value)


def test_a_broken_validation_image_keeps_the_epoch(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "data")
    next((data / "val" / "digit-2").iterdir()).write_bytes(b"")
    with pytest.raises(UserError, match="cannot read"):
        train(tiny_recipe(), data=data, out=tmp_path / "run")
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["position"]["step"] == 4


def test_a_folder_with_other_things_is_never_overwritten(finished: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis\.txt, which no run has written"):
        train(tiny_recipe(), data=data, out=tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()


@pytest.mark.parametrize(("precision", "dtype"), [("32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_precision_reaches_the_network(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, dtype: torch.dtype
) -> None:
    """Asked of the classifier's own output, before Fabric turns what the step returns into float32."""
    seen = set()
    original = ClassificationTask.forward

    def spying(self: ClassificationTask, images: torch.Tensor) -> torch.Tensor:
        logits = original(self, images)
        seen.add(logits.dtype)
        return logits

    monkeypatch.setattr(ClassificationTask, "forward", spying)
    train(tiny_recipe(f"engine.precision={precision}", "schedule.epochs=2"), data=data, out=tmp_path / "run")
    assert seen == {dtype}


@pytest.mark.parametrize(
    "switch", ["engine.channels_last=false", "engine.grad_checkpointing=true", "optim.clip_grad=1.0"]
)
def test_switches(data: Path, tmp_path: Path, switch: str) -> None:
    result = train(tiny_recipe(switch, "schedule.epochs=2"), data=data, out=tmp_path / "run")
    assert result is not None and result.counts["images"] == 16


def test_grad_checkpointing_changes_nothing(finished: Path, data: Path, tmp_path: Path) -> None:
    train(tiny_recipe("engine.grad_checkpointing=true"), data=data, out=tmp_path / "run")
    mine, theirs = weights(tmp_path / "run"), weights(finished)
    # BatchNorm and dropout sit outside the recomputed blocks, so the arithmetic is the same to the last bit
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_timm_model_trains_under_the_same_recipe(data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("model.name=test_convnext", "model.args={}", "data.input_size=32", "schedule.epochs=2")
    result = train(recipe, data=data, out=tmp_path / "run")
    assert result is not None and result.classes == [f"digit-{i}" for i in range(4)]
