"""Evaluation of saved models: exact counts, whatever the batch size and the number of workers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data import create_transform, resolve_model_data_config

from conv2former.checkpoints import load_pretrained
from conv2former.engine.devices import pick_device
from conv2former.engine.evaluate import evaluate
from conv2former.engine.train import train
from conv2former.errors import UserError
from conv2former.tasks.classification.sources import FolderSource
from digits import tiny_recipe, write_digits


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"), val=9)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train(tiny_recipe("schedule.epochs=2"), data=data, out=out)
    return out


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
        *("evaluation.json", "confusion_matrix.png", "predictions.png")
    }


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
