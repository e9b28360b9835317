"""The engine: what a run leaves behind, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor

from conv2former.engine.automatic import checked_weights
from conv2former.engine.run_dir import RunDir
from conv2former.engine.train import train
from conv2former.errors import UserError
from conv2former.models.conv2former import Conv2Former
from digits import tiny_recipe, write_digits
from runs import after_step, stopped_run, weights

pytestmark = pytest.mark.usefixtures("quick")


def test_a_run_leaves_everything_behind(finished: Path) -> None:
    names = {path.name for path in finished.iterdir() if path.name != ".lock"}
    assert names == {
        *("recipe.yaml", "run.json", "history.jsonl", "metrics.jsonl", "metrics.csv", "tensorboard", "checkpoints"),
        *(
            "best",
            "last",
            "evaluation.json",
            "confusion_matrix.png",
            "predictions.png",
            "learning_curves.png",
            "mistakes.csv",
        ),
    }
    assert not list(finished.rglob("*.partial"))
    epochs = RunDir(finished).rows("epoch")
    assert [row["epoch"] for row in epochs] == [1, 2, 3]
    assert len((finished / "metrics.csv").read_text().splitlines()) == 4
    assert RunDir(finished).recipe() == tiny_recipe()
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
    best = max(row["val_top1"] for row in RunDir(finished).rows("epoch"))
    assert json.loads((finished / "evaluation.json").read_text())["top1"] == pytest.approx(best)


def test_the_loss_falls(finished: Path) -> None:
    rows = RunDir(finished).rows("epoch")
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_the_learning_rate_follows_the_schedule(finished: Path) -> None:
    recipe = tiny_recipe()
    peak = recipe.optim.base_lr * recipe.optim.batch_size / recipe.optim.base_batch
    last = RunDir(finished).rows("step")[-1]
    # the last of 12 steps is step 11, seven steps after the warm-up of four, of a cosine over eight
    expected = 1e-6 + 0.5 * (peak - 1e-6) * (1 + torch.cos(torch.tensor(torch.pi * 7 / 8, dtype=torch.double)))
    assert last["lr"] == pytest.approx(float(expected))


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


def test_arguments_that_are_not_the_networks_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.args cannot hold pretrained"):
        train(tiny_recipe("model.args.pretrained=true"), data=data, out=tmp_path / "run")


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


def test_fine_tuning_at_another_resolution_from_a_local_dir(finished: Path, tmp_path: Path) -> None:
    data = write_digits(tmp_path / "data", classes=5)
    recipe = tiny_recipe(f"model.weights=local-dir:{finished / 'last'}", "model.args={}", "data.input_size=24")
    result = train(recipe, data=data, out=tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "best" / "config.json").read_text())
    assert (
        result is not None
        and len(result.details["per_class"]) == 5
        and saved["pretrained_cfg"]["input_size"] == [3, 24, 24]
    )


def test_weights_of_images_of_another_size_are_said(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for size, said in ((32, True), (24, False)):
        checked_weights(tiny_recipe(f"model.weights={finished}", "model.args={}", f"data.input_size={size}"))
        line = f"of images of 16 pixels, this trains with {size}; with their size: --set data.input_size=16"
        assert (line in capfd.readouterr().err) == said


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
    with pytest.raises(UserError, match=r"expects images of mean .*: add --set data.mean=auto$"):
        train(recipe, data=data, out=tmp_path / "run")


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
    original = Conv2Former.forward

    def spying(self: Conv2Former, images: torch.Tensor) -> torch.Tensor:
        logits = original(self, images)
        if self.training and not isinstance(logits, FakeTensor):
            seen.add(logits.dtype)
        return logits

    monkeypatch.setattr(Conv2Former, "forward", spying)
    short = ("schedule.epochs=1", "schedule.warmup_epochs=0")
    train(tiny_recipe(f"engine.precision={precision}", *short), data=data, out=tmp_path / "run")
    assert seen == {dtype}


@pytest.mark.parametrize(
    "switch",
    [
        *("engine.channels_last=false", "optim.clip_grad=1.0"),
        pytest.param("engine.grad_checkpointing=true", marks=pytest.mark.slow),  # the next test has it, too
    ],
)
def test_switches(data: Path, tmp_path: Path, switch: str) -> None:
    result = train(tiny_recipe(switch, "schedule.epochs=2"), data=data, out=tmp_path / "run")
    assert result is not None and result.details["images"] == 16


def test_grad_checkpointing_changes_nothing(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there in a run that goes on, too, whose network is not tried out again."""
    recipe, checkpointed = tiny_recipe("engine.grad_checkpointing=true"), []
    stopped_run(recipe, data, tmp_path / "run", monkeypatch)
    monkeypatch.setattr("conv2former.engine.train.try_out", lambda task: pytest.fail("it was trained by this recipe"))
    after_step(
        monkeypatch,
        6,
        lambda trainer: checkpointed.extend(stage.grad_checkpointing for stage in trainer.task.model.stages),
    )
    train(None, data=data, out=tmp_path / "run", resume=True)
    assert checkpointed and all(checkpointed)
    mine, theirs = weights(tmp_path / "run"), weights(finished)
    # BatchNorm and dropout sit outside the recomputed blocks, so the arithmetic is the same to the last bit
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_timm_model_trains_under_the_same_recipe(data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("model.name=test_convnext", "model.args={}", "data.input_size=32", "schedule.epochs=2")
    result = train(recipe, data=data, out=tmp_path / "run")
    assert result is not None and [*result.details["per_class"]] == [f"digit-{i}" for i in range(4)]
