"""Evaluation of saved models: exact counts, whatever the batch size and the number of workers."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from conv2former.checkpoints import load_pretrained
from conv2former.engine.devices import pick_device
from conv2former.engine.evaluate import evaluate
from conv2former.engine.report import best_weights
from conv2former.engine.run_dir import RunDir
from conv2former.engine.train import train
from conv2former.errors import UserError
from conv2former.tasks.classification.metrics import ClassificationMetric, Records
from conv2former.tasks.classification.sources import FolderSource
from conv2former.tasks.segmentation.metrics import SegmentationMetric
from digits import tiny_recipe, write_digits


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"), val=9)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train(tiny_recipe("schedule.epochs=2"), data=data, out=out)
    return out


@pytest.mark.usefixtures("quick")
def test_counts_equal_a_plain_loop_whatever_batch_and_workers(run: Path, data: Path) -> None:
    model = load_pretrained(run).eval()
    source = FolderSource(data / "val")
    transform = create_transform(**resolve_model_data_config(model), is_training=False)  # timm's own, normalised
    with torch.inference_mode():
        predicted = [int(model(transform(source.load(i))[None]).argmax()) for i in range(len(source))]
    expected = np.zeros((4, 4), int)
    for target, guess in zip(source.targets, predicted, strict=True):
        expected[target, guess] += 1
    for batch_size, workers in ((1, 0), (7, 0), (64, 2)):
        result, _ = evaluate(run, data=data, batch_size=batch_size, workers=workers)
        assert result.details["images"] == 36
        assert np.array_equal(result.records.matrix(4), expected)
        assert result.details["correct"] == np.trace(expected)
        assert [row["correct"] for row in result.details["per_class"].values()] == expected.diagonal().tolist()
        assert all(row["images"] == 9 for row in result.details["per_class"].values())


@pytest.mark.usefixtures("quick")
def test_without_data_a_run_is_evaluated_on_its_own_validation_set(run: Path) -> None:
    before = json.loads((run / "evaluation.json").read_text())
    result, folder = evaluate(run, data=None, workers=0)
    after = json.loads(json.dumps(result.details))
    assert folder == run and after.pop("loss") == pytest.approx(before.pop("loss"), rel=1e-6) and after == before
    assert before["per_class"]["digit-0"]["images"] == 9


def test_a_saved_model_reports_where_it_is_told(run: Path, data: Path, tmp_path: Path) -> None:
    _, folder = evaluate(run / "best", data=data / "val", workers=0)
    assert folder is None
    evaluate(run / "best" / "model.safetensors", data=data, out=tmp_path / "report", workers=0)
    assert {p.name for p in (tmp_path / "report").iterdir()} == {
        *("evaluation.json", "confusion_matrix.png", "predictions.png", "mistakes.csv")
    }


@pytest.mark.usefixtures("quick")
def test_images_of_the_training_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Class folders alone: a part is held out, and the whole folder holds the images of the training, too."""
    folder = write_digits(tmp_path / "digits", train=12) / "train"
    recipe = tiny_recipe("schedule.epochs=1", "schedule.warmup_epochs=0", "data.val_fraction=0.25")
    train(recipe, data=folder, out=tmp_path / "run")
    capsys.readouterr()
    evaluate(tmp_path / "run", data=folder, workers=0)
    assert "was trained on 36 of these 48 images: leave --data out" in capsys.readouterr().err
    result, _ = evaluate(tmp_path / "run", workers=0)
    assert result.details["images"] == 12 and "was trained on" not in capsys.readouterr().err
    rows = list(csv.DictReader((tmp_path / "run" / "mistakes.csv").open()))
    wrong = np.flatnonzero(result.records.predicted != result.records.targets)
    assert len(rows) == len(wrong) and all((folder / row["file"]).is_file() for row in rows)
    shutil.copytree(folder, tmp_path / "copied")
    evaluate(tmp_path / "run", data=tmp_path / "copied", workers=0)
    assert "warning: 36 of the 48 images are training images, too" in capsys.readouterr().err
    held = (tmp_path / "run" / "held_out.txt").read_text().splitlines()
    assert len({*held}) == 12 and {row["file"] for row in rows} <= {*held}
    assert all(row["file"].startswith(row["true"]) and row["predicted"] != row["true"] for row in rows)


def test_the_best_weights_are_named(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    copied = RunDir(tmp_path / "run")

    def said(*found: float) -> str | None:
        rows = [dict(kind="epoch", step=4 * n, epoch=float(n), val_top1=top1) for n, top1 in enumerate(found)]
        copied.metrics_jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = json.loads((copied.best / "config.json").read_text())
        config["conv2former"]["epoch"] = max(rows, key=lambda row: row["val_top1"])["epoch"]  # as training writes it
        (copied.best / "config.json").write_text(json.dumps(config))
        return best_weights(copied)

    assert said(50.0, 60.0) is None
    assert said(50.0, 60.0, 60.0) == "the best weights are those of epoch 1"
    assert said(78.3, 64.3, 65.9) == (
        "the best weights are those before the first step, and training made them no better: try a lower learning rate "
        "(--lr) or more --epochs"
    )


def test_what_is_refused(run: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data"):
        evaluate(run / "best", data=None)
    with pytest.raises(UserError, match="no such"):
        evaluate(run, data=tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere"):
        evaluate(tmp_path / "nowhere", data=data)
    with pytest.raises(UserError, match="does not know"):
        evaluate(run, data=write_digits(tmp_path / "five", classes=5, train=1, val=1))
    with pytest.raises(UserError, match=r"unknown layout of images 'tars'; did you mean 'tar'\?; there are"):
        evaluate(run, data=data, source="tars")
    with pytest.raises(UserError, match="--device cpu"):
        pick_device("cuda:99")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the report"):
        evaluate(run, data=data, out=tmp_path / "file" / "report", workers=0)


@pytest.mark.parametrize("wrong", [0, 3, 40])
def test_the_sheet_shows_no_image_twice(wrong: int) -> None:
    """The worst mistakes, then others of every class."""
    seen: list[int] = []

    class Numbered:
        def load(self, index: int, max_pixels: int) -> Image.Image:
            seen.append(index)
            return Image.new("RGB", (4, 4))

    targets = np.arange(40) // 10
    predicted = np.where(np.arange(40) % 13 < (wrong > 0) * (1 + (wrong == 40) * 13), (targets + 1) % 4, targets)
    records = Records(np.arange(40), targets, predicted, np.full(40, 0.9), np.linspace(0, 0.1, 40))
    mistakes, others = records.sheet(["a", "b", "c", "d"], Numbered())  # type: ignore[arg-type]
    assert len(seen) == len({*seen}) == len(mistakes) + len(others)
    assert len(mistakes) == min((predicted != targets).sum(), 16) and not any(right for _, _, right in mistakes)
    if wrong < 40:
        assert {index // 10 for index in seen[len(mistakes) :]} == {0, 1, 2, 3}


@pytest.mark.usefixtures("quick")
def test_a_model_that_finds_one_class_everywhere_is_called_so(
    run: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_class(self: Any, logits: Tensor, *rest: Any) -> None:
        forced = torch.zeros_like(logits)
        forced[:, 2] = 9
        update(self, forced, *rest)

    update = ClassificationMetric.update
    monkeypatch.setattr(ClassificationMetric, "update", one_class)
    evaluate(run, data=data)
    assert "warning: all images were taken for 'digit-2': train longer, or start from" in capsys.readouterr().err
    pixels = SegmentationMetric(["road", "car"])
    truth = torch.tensor([[[0, 1]]], dtype=torch.uint8)
    for probabilities, said in (
        ([[0.1, 0.2], [0.9, 0.8]], "all pixels were taken for 'car'"),
        ([[0.9, 0], [0, 1]], ""),
    ):
        pixels.reset()
        pixels.update([(slice(0, 1), torch.tensor(probabilities).reshape(1, 2, 1, 2))], truth)
        assert pixels.result().useless == said
