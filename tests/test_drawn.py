"""What a report draws: names of every kind, objects of one class, and that nothing of it ends a finished training."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conv2former.engine.evaluate import evaluate
from conv2former.engine.train import train
from conv2former.tasks.segmentation.palettes import class_colours
from conv2former.tasks.segmentation.task import draw_classes
from conv2former.viz import plots
from conv2former.viz.drawing import colour, label_overlay, objects, outline, with_bars
from digits import tiny_recipe

NAMES = [
    "$5",
    "a$_$",
    "$x^$",
    "caf\udce9",
    "two\nlines",
    "tab\t",
    "日本",
    "_hidden",
    "\\frac{",
    "%d {}",
    "",
    "x" * 300,
    "\x00",
]


@pytest.mark.filterwarnings("error:constrained_layout")
def test_names_of_every_kind_are_drawn(tmp_path: Path) -> None:
    count = len(NAMES)
    plots.confusion_matrix(np.eye(count, dtype=int), NAMES, tmp_path / "matrix.png")
    image = Image.new("RGB", (40, 30))
    plots.prediction_sheet([(image, f"{name} 9%\nis {name}", False) for name in NAMES], [], tmp_path / "sheet.png")
    plots.draw_curves({name: [] for name in NAMES}, tmp_path / "curves.png", "epoch")
    draw_classes(image, np.arange(30 * 40).reshape(30, 40) % count, NAMES)
    with_bars(image, [(name, 0.5) for name in NAMES])
    objects(image, [(1, 1, 9, 9)] * count, NAMES, [0] * count, [None] * count)
    assert plots.drawable("a$b\nc\udce9") == "a\\$b\nc\\udce9"


def test_objects_of_one_class_are_told_apart() -> None:
    left, right = (np.zeros((40, 60), np.uint8) for _ in range(2))
    left[5:35, 5:30], right[5:35, 30:55] = 1, 1  # side by side
    blank = Image.new("RGB", (60, 40), (128, 128, 128))
    drawn = np.asarray(objects(blank, [(5, 5, 30, 35), (30, 5, 55, 35)], ["", ""], [0, 1], [left, right]))
    assert tuple(drawn[20, 15]) != tuple(drawn[20, 45]), "the fillings differ"
    same = np.asarray(objects(blank, [], [], [], [])).copy()
    assert (same == 128).all()
    one = np.asarray(objects(blank, [(0, 0, 1, 1)] * 2, ["", ""], [3, 3], [left, right]))
    edge = tuple(one[20, 29]), tuple(one[20, 30])
    assert edge == (colour(3), colour(3)) and tuple(one[20, 15]) != colour(3), "an outline lies between them"
    assert outline(left.astype(bool), 1).sum() == 2 * (30 + 25) - 4


def test_a_training_with_such_names_finishes_and_goes_on(tmp_path: Path) -> None:
    names = [b"$5", b"a$_$", b"caf\xe9", b"ok"]
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in names:
            folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"data", part.encode(), name)))
            folder.mkdir(parents=True)
            for number in range(4):
                Image.fromarray(generator.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f"{number}.png")
    recipe = tiny_recipe("schedule.epochs=1", "schedule.warmup_epochs=0", "data.workers=0", "data.val_fraction=0")
    run = tmp_path / "run"
    train(recipe, data=tmp_path / "data", out=run)
    for name in ("confusion_matrix.png", "predictions.png", "learning_curves.png", "best/README.md"):
        assert (run / name).is_file(), name
    train(None, data=None, out=run, resume=True)
    assert evaluate(run, workers=0)[1] == run
    events = [json.loads(line)["event"] for line in (run / "history.jsonl").read_text().splitlines()]
    assert events[-1] == "finished"


def test_what_cannot_be_drawn_is_left_out_with_a_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("no\nway")

    for name in ("confusion_matrix", "draw_curves"):
        monkeypatch.setattr(plots, name, fail)
    recipe = tiny_recipe("schedule.epochs=1", "schedule.warmup_epochs=0", "data.workers=0")
    train(recipe, data=data, out=tmp_path / "run")
    said = capsys.readouterr().err
    assert "left out: confusion_matrix.png: ZeroDivisionError: no way" in said and "left out: learning curves" in said
    assert (tmp_path / "run" / "predictions.png").is_file() and (tmp_path / "run" / "best" / "README.md").is_file()


def test_classes_have_the_colours_of_their_data_set() -> None:
    camvid = [
        "Sky",
        "Building",
        "Pole",
        "Road",
        "Pavement",
        "Tree",
        "SignSymbol",
        "Fence",
        "Car",
        "Pedestrian",
        "Bicyclist",
    ]
    assert class_colours(camvid)[:3] == [(128, 128, 128), (128, 0, 0), (192, 192, 128)]
    assert class_colours(["Background", "crack"]) == [None, colour(1)]
    assert class_colours(["wall", "Car"]) == [colour(0), colour(1)], "two names do not make a data set"
    image = Image.new("RGB", (3, 1), "white")
    labels = np.array([[1, 255, 0]], np.uint8)
    found = np.asarray(label_overlay(image, labels, [None, *class_colours(camvid)[1:]]))[0]
    assert [tuple(pixel) for pixel in found] == [(185, 114, 114), (255, 255, 255), (255, 255, 255)]
