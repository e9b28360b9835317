"""Detection and segmentation from end to end: trained, resumed, evaluated, asked, fine-tuned, given bad input."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conv2former import checkpoints
from conv2former.data.rle import decode_mask
from conv2former.engine.evaluate import evaluate
from conv2former.engine.predict import predict, run_predict
from conv2former.engine.run_dir import RunDir
from conv2former.engine.train import train
from conv2former.errors import UserError
from conv2former.recipes import Recipe
from conv2former.tasks import task_class
from digits import tiny_recipe
from runs import assert_same_run, start, stopped_run, weights
from scenes import small_detector, small_segmenter, write_coco, write_pairs

pytestmark = pytest.mark.usefixtures("quick")


TASKS = ["detection", "segmentation"]


def small(task: str, *overrides: str) -> Recipe:
    return (small_detector if task == "detection" else small_segmenter)(*overrides)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("scenes")
    return dict(detection=write_coco(root / "coco"), segmentation=write_pairs(root / "pairs"))


@pytest.fixture(scope="module")
def runs(scenes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each task; not to be changed."""
    root = tmp_path_factory.mktemp("runs")
    for task in TASKS:
        train(small(task), data=scenes[task], out=root / task)
    return {task: root / task for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_a_run_leaves_what_it_must(runs: dict[str, Path], task: str) -> None:
    run = RunDir.open(runs[task])
    rows = run.rows("epoch")
    headline = "val_box_ap" if task == "detection" else "val_miou"
    assert [row["epoch"] for row in rows] == [1, 2] and all(row[headline] is not None for row in rows)
    for name in ("evaluation.json", "predictions.png", "learning_curves.png", "best/config.json", "metrics.csv"):
        assert (run.path / name).is_file(), name
    found = json.loads((run.path / "evaluation.json").read_text())
    best = max(row[headline] for row in rows)
    value = found["box"]["ap"] if task == "detection" else found["miou"]
    assert value == pytest.approx(best, abs=1e-4)
    config = json.loads((run.best / "config.json").read_text())
    assert config["task"] == task and config["conv2former"]["recipe_hash"] == run.recipe().digest()
    assert checkpoints.saved_task(run.path) == task


@pytest.mark.parametrize("task", TASKS)
def test_a_stopped_run_continues_bit_for_bit(
    runs: dict[str, Path], scenes: dict[str, Path], task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_run(small(task), scenes[task], tmp_path / "run", monkeypatch, step=1)
    train(None, data=None, out=tmp_path / "run", resume=True)
    assert_same_run(runs[task], tmp_path / "run")


@pytest.mark.parametrize("task", ["segmentation", pytest.param("detection", marks=pytest.mark.slow)])
def test_readers_do_not_change_a_run(runs: dict[str, Path], scenes: dict[str, Path], task: str, tmp_path: Path) -> None:
    train(small(task, "data.workers=2"), data=scenes[task], out=tmp_path / "run")
    mine, theirs = weights(runs[task]), weights(tmp_path / "run")
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_detections_are_coco_results(runs: dict[str, Path], scenes: dict[str, Path], tmp_path: Path) -> None:
    recipe = small_detector("detector.score_threshold=0.0", "detector.max_detections=5", "schedule.epochs=1")
    evaluation = train(recipe, data=scenes["detection"], out=tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "detections.json").read_text())
    assert evaluation is not None and len(rows) == 10 == evaluation.details["detections"]
    assert {row["image_id"] for row in rows} == {100, 101} and {row["category_id"] for row in rows} <= {3, 7}
    assert decode_mask(rows[0]["segmentation"]).shape == (96, 128)


@pytest.mark.parametrize("task", TASKS)
def test_evaluation_repeats_the_run_and_takes_other_data(
    runs: dict[str, Path], scenes: dict[str, Path], task: str, tmp_path: Path
) -> None:
    again, folder = evaluate(runs[task], workers=0, out=tmp_path / "again")
    kept = json.loads((runs[task] / "evaluation.json").read_text())
    found = again.details
    for key in ("box", "mask", "miou", "pixel_accuracy", "matrix"):
        assert found.get(key) == kept.get(key), key
    assert folder == tmp_path / "again" and (folder / "predictions.png").is_file()
    model, _ = evaluate(runs[task] / "best", data=scenes[task], workers=0)
    assert model.details["images"] == (2 if task == "detection" else 6)


def test_multi_scale_is_for_segmentation(runs: dict[str, Path]) -> None:
    evaluation, folder = evaluate(runs["segmentation"], workers=0, multi_scale=True)
    assert evaluation.details["multi_scale"] and evaluation.line.startswith("multi-scale mIoU")
    assert folder == runs["segmentation"] / "evaluations" / "multi_scale"
    for given in (dict(multi_scale=True), dict(source="tar"), dict(batch_size=2)):
        with pytest.raises(UserError, match=r"is for (segmentation|classification), this is a detection model"):
            evaluate(runs["detection"], **given)
    with pytest.raises(UserError, match="--top-k is for classification"):
        list(predict(runs["segmentation"], [runs["segmentation"]], top_k=3))
    with pytest.raises(UserError, match="--threshold is for detection"):
        list(predict(runs["segmentation"], [runs["segmentation"]], threshold=0.3))


def test_prediction_draws_and_prints(
    runs: dict[str, Path], scenes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = scenes["segmentation"] / "images"
    assert run_predict(runs["segmentation"], [pictures], out=tmp_path / "drawn") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 6 and all(row["ok"] for row in rows)
    for row in rows:
        assert sum(entry["share"] for entry in row["classes"]) == pytest.approx(1)
        covered = sum(decode_mask(entry["mask"]).astype(int) for entry in row["classes"])
        assert covered.shape == (96, 128) and (covered == 1).all()
    drawn = Image.open(tmp_path / "drawn" / "0.predicted.png")
    assert drawn.size[0] >= 128 and drawn.size[1] > 96
    (tmp_path / "broken.png").write_bytes(b"x")
    found = list(predict(runs["detection"], [tmp_path / "broken.png", pictures / "0.png"], threshold=0.0))
    assert [row["ok"] for row in found] == [False, True]
    for entry in found[1]["objects"]:
        assert entry["label"] in ("block", "disc") and len(entry["box"]) == 4
        assert decode_mask(entry["mask"]).shape == (96, 128)
    assert run_predict(runs["detection"], [pictures / "0.png"], out=tmp_path / "boxes", threshold=0.0) == 0


def test_models_of_other_tasks_are_refused(runs: dict[str, Path], scenes: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a detection model: segmentation starts from"):
        train(small_segmenter(f"model.weights={runs['detection']}"), data=scenes["segmentation"], out=tmp_path / "run")
    with pytest.raises(UserError, match="holds a detection model, not a classifier"):
        checkpoints.load_pretrained(runs["detection"])
    assert not (tmp_path / "run").exists()


def test_a_damaged_recipe_of_weights_is_one_line(
    runs: dict[str, Path], scenes: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(runs["detection"] / "best", tmp_path / "weights")
    file = tmp_path / "weights" / "config.json"
    for damage in ({}, dict(model=None), dict(model=dict(args=3))):
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(recipe=damage)))
        recipe = small_detector(f"model.weights={tmp_path / 'weights'}")
        with pytest.raises(UserError, match=r"the recipe in the config.json of .* is damaged: save the model again"):
            train(recipe, data=scenes["detection"], out=tmp_path / "run")


def test_weights_of_a_classifier_fill_the_backbone(
    finished: Path, scenes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    normal = [f"data.mean={list(tiny_recipe().data.mean)}", f"data.std={list(tiny_recipe().data.std)}"]
    # rate 0: what was loaded is what comes out
    still = ["schedule.epochs=1", "optim.base_lr=1e-30", "schedule.warmup_lr=0", "schedule.min_lr=0"]
    frozen = ["model.freeze_batchnorm=true", "model.args={stem_stride: 4}"]
    recipe = small_detector(f"model.weights={finished}", *frozen, *normal, *still)
    train(recipe, data=scenes["detection"], out=tmp_path / "run")
    said = capsys.readouterr().err
    assert (
        f"tensors of {finished} (conv2former_test) loaded" in said
        and "start new (pyramid" in said
        and "not used (head.conv" in said
    )
    start = checkpoints.load_pretrained(finished).state_dict()
    end = weights(tmp_path / "run")
    for name in ("stem.conv1.weight", "stem.norm1.running_mean", "stages.3.blocks.0.mlp.fc1.weight"):
        torch.testing.assert_close(end[f"backbone.model.{name}"], start[name], rtol=1e-5, atol=1e-7)
    with pytest.raises(UserError, match="expects images of mean"):
        other = small_detector(f"model.weights={finished}", "data.mean=[0.1,0.2,0.3]")
        train(other, data=scenes["detection"], out=tmp_path / "other")
    with pytest.raises(UserError, match="holds a conv2former_test, the recipe says conv2former_atto"):
        train(
            small_detector(f"model.weights={finished}", "model.name=conv2former_atto", *normal),
            data=scenes["detection"],
            out=tmp_path / "other",
        )


def test_a_detector_goes_on_to_other_classes(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What does not depend on the classes is kept; the rest starts new."""
    root = write_coco(tmp_path / "coco")
    for path in (root / "annotations").iterdir():
        content = json.loads(path.read_text())
        content["categories"].append(dict(id=9, name="star"))
        path.write_text(json.dumps(content))
    out = tmp_path / "run"
    train(small_detector(f"model.weights={runs['detection']}", "schedule.epochs=1"), data=root, out=out)
    said = capsys.readouterr().err
    assert "start new (stages.0.box_head" in said
    assert json.loads((out / "best" / "config.json").read_text())["label_names"] == ["block", "disc", "star"]


@pytest.mark.parametrize("task", TASKS)
def test_broken_images_are_listed_and_passed_over(scenes: dict[str, Path], task: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(scenes[task], root)
    broken = root / ("train2017/001.png" if task == "detection" else "masks/1.png")
    broken.write_bytes(b"broken")
    with pytest.raises(UserError, match=broken.name):
        train(small(task, "schedule.epochs=1"), data=root, out=tmp_path / "a")
    train(small(task, "schedule.epochs=1", "data.on_bad_image=skip"), data=root, out=tmp_path / "b")
    assert broken.name in (tmp_path / "b" / "bad_images.jsonl").read_text()


def test_another_task_cannot_resume(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["detection"], tmp_path / "run")
    for force in (False, True):
        with pytest.raises(UserError, match="task"):
            train(small_segmenter(), data=None, out=tmp_path / "run", resume=True, force=force)
    with pytest.raises(UserError, match=r"detector.* cannot change in a run"):
        train(small_detector("detector.channels=8"), data=None, out=tmp_path / "run", resume=True, force=True)


def test_frozen_batch_norm_stays(scenes: dict[str, Path], tmp_path: Path) -> None:
    recipe = small("segmentation", "model.freeze_batchnorm=true", "schedule.epochs=1")
    train(recipe, data=scenes["segmentation"], out=tmp_path / "run")
    state = load_file(tmp_path / "run" / "last" / "model.safetensors")
    assert int(state["backbone.model.stem.norm1.num_batches_tracked"]) == 0
    assert torch.equal(state["backbone.model.stem.norm1.weight"], torch.ones(8))
    moved = [name for name in state if name.endswith("num_batches_tracked") and name.startswith("decoder")]
    assert moved and all(int(state[name]) > 0 for name in moved)


def test_a_batch_of_one_is_refused_where_batch_norm_needs_two(scenes: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"one image at a time.*raise optim\.batch_size"):
        train(small("segmentation", "optim.batch_size=1"), data=scenes["segmentation"], out=tmp_path / "run")


def test_evaluation_is_told_how_data_lies(runs: dict[str, Path], scenes: dict[str, Path], tmp_path: Path) -> None:
    train_set = ("data.val_images=train2017", "data.val_annotations=annotations/instances_train2017.json")
    found, _ = evaluate(runs["detection"] / "best", data=scenes["detection"], workers=0, settings=train_set)
    assert found.details["images"] == 4
    for settings, message in ((("optim.base_lr=1",), "only data.key=value"), (("data.nothing=1",), "unknown key")):
        with pytest.raises(UserError, match=message):
            evaluate(runs["detection"] / "best", data=scenes["detection"], settings=settings)
    with pytest.raises(UserError, match="--set says how the --data"):
        evaluate(runs["detection"], settings=train_set)


@pytest.mark.slow
def test_two_processes_count_what_one_counts(tmp_path: Path) -> None:
    """Three images on two processes: one share is filled up, and what fills it does not count.

    Every image has detections (threshold 0), weights stay (rate 0).
    """
    data = write_coco(tmp_path / "coco", val=3)
    still = ["optim.base_lr=1e-30", "schedule.epochs=1", "schedule.warmup_lr=0", "schedule.min_lr=0"]
    settings = [*still, "detector.score_threshold=0.0", "optim.batch_size=1"]
    rows: list[dict[str, Any]] = []
    for number in (1, 2):
        out = tmp_path / str(number)
        program = [sys.executable, "-m", "conv2former_cli", "train", "--recipe=smoke_detection"]
        options = [f"--set={entry}" for entry in [*settings, f"engine.devices={number}"]]
        process = start([*program, f"--data={data}", f"--out={out}", *options])
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
        assert "300 detections on 3 images" in said, said
        rows.append(RunDir(out).rows("epoch")[0])
    keys = [key for key in rows[0] if key.startswith("val_")]
    assert len(keys) == 6 and all(rows[0][key] == pytest.approx(rows[1][key], abs=1e-6) for key in keys)
    assert rows[0]["val_box_ap"] > 0 and np.isfinite(rows[0]["train_loss"])


@pytest.mark.parametrize("kind", TASKS)
def test_layers_for_other_classes_start_new(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the same number, but with other names or in another order: their weights would be those of other classes."""
    recipe = small(kind)
    task = task_class(kind).build(recipe, ["cat", "dog"])
    task.save(tmp_path / "model", state=task.model.state_dict(), note={})
    section = recipe.model.model_copy(update=dict(weights=str(tmp_path / "model")))
    capsys.readouterr()
    own = task.model.state_dict()
    for classes, same in ((["cat", "dog"], True), (["dog", "cat"], False)):
        found = task_class(kind).build(recipe, classes, section=section).model.state_dict()
        assert all(torch.equal(found[name], own[name]) for name in own) == same
        assert ("for other classes" in capsys.readouterr().err) != same
