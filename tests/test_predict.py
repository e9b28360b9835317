"""Prediction on image files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from conv2former.engine.predict import predict, run_predict
from conv2former.errors import UserError
from digits import one_picture


@pytest.fixture
def run(finished: Path) -> Path:
    return finished


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    one_picture(folder / "a.png")
    one_picture(folder / "more" / "a.png", 1)
    Image.fromarray(load_sample_images().images[0]).save(folder / "temple.jpg")
    return folder


def test_a_line_per_file(run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_predict(run, [pictures, pictures / "a.png"], top_k=3) == 0
    output = capsys.readouterr()
    rows = [json.loads(line) for line in output.out.splitlines()]
    assert [Path(row["file"]).relative_to(pictures).as_posix() for row in rows].count("a.png") == 2
    assert len(rows) == 4 and all(row["ok"] for row in rows) and output.err == ""
    for row in rows:
        probabilities = [entry["probability"] for entry in row["top"]]
        assert len(row["top"]) == 3 and probabilities == sorted(probabilities, reverse=True)
        assert all(entry["label"] == f"digit-{entry['index']}" for entry in row["top"])


def test_masks_are_not_taken_for_images(run: Path, tmp_path: Path) -> None:
    for name in ("val/images/a.png", "val/masks/a.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        one_picture(tmp_path / name)
    with pytest.raises(
        UserError, match=r"val holds images and their masks: give .*val/images, and .*val/masks beside it if "
    ):
        list(predict(run, tmp_path))
    assert len(list(predict(run, tmp_path / "val" / "images"))) == 1
    assert len(list(predict(run, [tmp_path / "val" / "images", tmp_path / "val" / "masks"]))) == 2


def test_the_batch_does_not_change_a_prediction(run: Path, pictures: Path) -> None:
    one, many = (list(predict(run, [pictures], batch_size=size, top_k=4)) for size in (1, 8))
    for mine, theirs in zip(one, many, strict=True):
        for a, b in zip(mine["top"], theirs["top"], strict=True):
            assert a["index"] == b["index"] and a["probability"] == pytest.approx(b["probability"], abs=1e-6)
        assert sum(entry["probability"] for entry in mine["top"]) == pytest.approx(1)


def test_one_bad_file_does_not_stop_the_rest(run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "b.jpg").write_text("not a image")
    status = run_predict(run, [pictures / "b.jpg", pictures / "none.png", pictures], out=pictures / "out", batch_size=2)
    output = capsys.readouterr()
    rows = [json.loads(line) for line in output.out.splitlines()]
    assert status == 1 and output.err.splitlines()[-1] == "3 of 6 files could not be read"
    assert [row["ok"] for row in rows].count(False) == 3
    assert all(set(row) == {"file", "ok", *(("top", "drawn_file") if row["ok"] else ("error",))} for row in rows)
    assert all(Path(row["drawn_file"]).is_file() for row in rows if row["ok"])
    assert "\n" not in rows[0]["error"]


def test_annotated_pictures_do_not_overwrite_each_other(run: Path, pictures: Path) -> None:
    assert run_predict(run, [pictures, pictures / "more" / "a.png"], out=pictures.parent / "out") == 0
    drawn = sorted(
        path.relative_to(pictures.parent / "out").as_posix() for path in pictures.parent.glob("out/**/*.png")
    )
    assert drawn == ["a.predicted.png", "more/a.predicted.png", "temple.predicted.png"]
    assert run_predict(run, [pictures / "a.png", pictures / "more" / "a.png"], out=pictures.parent / "flat") == 0
    assert sorted(os.listdir(pictures.parent / "flat")) == ["a-2.predicted.png", "a.predicted.png"]
    assert Image.open(pictures.parent / "out" / "temple.predicted.png").width == 512


def test_drawing_into_the_folder_of_the_inputs_spares_them(run: Path, pictures: Path) -> None:
    before = {path: path.read_bytes() for path in pictures.rglob("*") if path.is_file()}
    assert run_predict(run, [pictures], out=pictures) == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    assert len(list(pictures.rglob("*.predicted.png"))) == 3


def test_what_is_refused(run: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in"):
        list(predict(run, [tmp_path / "empty"]))
    with pytest.raises(UserError, match="nowhere"):
        list(predict(tmp_path / "nowhere", [pictures]))
    with pytest.raises(UserError, match="cannot write the output folder"):
        run_predict(run, [pictures], out=pictures / "a.png" / "out")


def test_a_model_without_names_gives_numbers(run: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "best", tmp_path / "bare")
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    del config["label_names"]
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    (row,) = predict(tmp_path / "bare", [pictures / "a.png"], top_k=1)
    assert row["top"][0]["label"] == str(row["top"][0]["index"])


def test_one_path_is_enough(run: Path, pictures: Path) -> None:
    wanted = list(predict(run, [pictures / "a.png"]))
    assert list(predict(run, pictures / "a.png")) == list(predict(run, str(pictures / "a.png"))) == wanted


def test_addresses_are_not_fetched(run: Path) -> None:
    with pytest.raises(UserError, match=r"^https:/+example.org/a.jpg: images are not fetched from addresses"):
        list(predict(run, [Path("https://example.org/a.jpg")]))


def test_names_do_not_depend_on_the_other_images(run: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copy(pictures / "a.png", tmp_path / "1.png")
    words = dict(out=tmp_path / "out", out_file=tmp_path / "rows.jsonl")
    assert run_predict(run, [tmp_path / "1.png"], **words) == 0  # type: ignore[arg-type]
    Image.open(pictures / "a.png").convert("RGB").save(tmp_path / "1.jpg")
    assert run_predict(run, [tmp_path / "1.jpg", tmp_path / "1.png"], **words) == 0  # type: ignore[arg-type]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    drawn = [Path(row["drawn_file"]).name for row in rows]
    assert drawn == ["1.jpg.predicted.png", "1.predicted.png"] == sorted(os.listdir(tmp_path / "out"))
    assert run_predict(run, [tmp_path / "1.png"], out_file=tmp_path / "plain.jsonl") == 0
    with pytest.raises(UserError, match="has rows without drawn_file: give another --out-file"):
        run_predict(run, [tmp_path / "1.png"], out=tmp_path / "out", out_file=tmp_path / "plain.jsonl")
