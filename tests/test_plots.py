"""Learning curves: of one run or several, whole or half-way, and one clear line where they cannot be drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from command import run_command
from conv2former.engine.run_dir import RunDir
from conv2former.errors import UserError
from conv2former.tools.plot import plot_runs
from conv2former.viz import plots

STEPS = 6  # logged losses per epoch


def write_run(folder: Path, *, epochs: int = 2, steps: int = 0, timed: bool = True, **change: Any) -> Path:
    """A run folder with whole epochs, ``steps`` logged losses after them, and a line that is being written."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("{}")
    (folder / "run.json").write_text("{}")
    rows: list[dict[str, Any]] = []
    for step in range(1, epochs * STEPS + steps + 1):
        epoch = step / STEPS
        rows.append(dict(kind="step", step=10 * step, epoch=epoch, loss=2 / step, lr=1e-3) | change)
        if step % STEPS == 0 and epoch <= epochs:
            row = dict(kind="epoch", step=10 * step, epoch=epoch, train_loss=1.0, val_loss=1 / epoch)
            row |= dict(val_top1=50 + epoch, val_top5=90 + epoch, images_per_second=100.0)
            rows.append(row | (dict(data_wait=0.25, memory_gb=1.0, seconds=60 * epoch, skipped=0) if timed else {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "st')
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k)))
    return figures


def panels(figure: Figure) -> dict[str, Axes]:
    """Axes by the first word of their titles; the share of waiting has none and goes by its label."""
    return {(axes.get_title() or axes.get_ylabel()).split()[0]: axes for axes in figure.axes}


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].texts]


def test_one_run_is_drawn_into_its_folder(tmp_path: Path, drawn: list[Figure]) -> None:
    run = write_run(tmp_path / "run")
    assert plot_runs([run]) == run / "learning_curves.png"
    assert Image.open(run / "learning_curves.png").size[0] > 800
    shown = panels(drawn[0])
    assert set(shown) == {"loss", "validation", "learning", "training", "time"}
    training, validation = shown["loss"].lines
    np.testing.assert_allclose(training.get_ydata(), 2 / np.arange(1, 13))
    np.testing.assert_allclose(validation.get_xydata(), [(1, 1), (2, 0.5)])
    assert [line.get_label() for line in shown["validation"].lines] == ["top-1", "top-5"]
    np.testing.assert_allclose(shown["time"].lines[0].get_ydata(), [25, 25])
    assert legend(drawn[0]) == ["best top-1 52.00 at epoch 2"]
    rows = [row | ({"val_top5": 100.0} if row["kind"] == "epoch" else {}) for row in RunDir(run).rows()]
    plots.draw_curves({"few classes": rows}, tmp_path / "few.png", "epoch")
    assert [line.get_label() for line in panels(drawn[1])["validation"].lines] == ["top-1"]


def test_the_end_of_a_run_draws_the_same(tmp_path: Path, drawn: list[Figure]) -> None:
    run = write_run(tmp_path / "run")
    plot_runs([run], out=tmp_path / "one.png")
    plots.draw_curves({RunDir(run).title(): RunDir(run).rows()}, run / "learning_curves.png", "epoch")
    assert (run / "learning_curves.png").read_bytes() == (tmp_path / "one.png").read_bytes()


def test_several_runs_have_a_colour_and_a_name_each(
    tmp_path: Path, drawn: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [write_run(Path(name)) for name in ("a/same", "b/same", "other", "$x$_{")]
    assert plot_runs([*runs, Path("a/../other")]) == Path("comparison.png")
    assert Path("comparison.png").is_file()
    assert [text.split(":")[0] for text in legend(drawn[0])] == ["a/same", "b/same", "other", r"\$x\$_{"]
    lines = panels(drawn[0])["validation"].lines
    assert len({line.get_color() for line in lines}) == len(lines) == 4


def test_more_runs_than_the_usual_colours(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_runs([write_run(tmp_path / str(i), epochs=1) for i in range(12)], out=tmp_path / "all.svg")
    lines = panels(drawn[0])["validation"].lines
    assert len({tuple(line.get_color()) for line in lines}) == 12


def test_a_run_before_its_first_evaluation(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_runs([write_run(tmp_path / "new", epochs=0, steps=1), write_run(tmp_path / "old")], out=tmp_path / "x.pdf")
    assert legend(drawn[0])[0] == "new: not evaluated yet"


def test_rows_of_older_runs_and_lost_losses(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_runs([write_run(tmp_path / "old", timed=False, loss=None)])
    shown = panels(drawn[0])
    assert "time" not in shown  # nothing is known of waiting
    assert np.isnan(shown["loss"].lines[0].get_ydata()).all()


@pytest.mark.parametrize(("x", "expected"), [("epoch", [1 / 6, 2.5]), ("step", [10, 150]), ("minutes", [1 / 6, 2.5])])
def test_what_is_drawn_over(x: str, expected: list[float], tmp_path: Path, drawn: list[Figure]) -> None:
    # half an epoch beyond the last time: it goes on at the mean speed
    plot_runs([write_run(tmp_path / "run", steps=3)], x=x)
    places = panels(drawn[0])["loss"].lines[0].get_xdata()
    np.testing.assert_allclose([places[0], places[-1]], expected)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    run, old = write_run(tmp_path / "run"), write_run(tmp_path / "old", timed=False)
    empty = write_run(tmp_path / "empty", epochs=0)
    for arguments, message in (
        (dict(paths=[tmp_path]), "not a run folder"),
        (dict(paths=[run, tmp_path / "none"]), "not a run folder"),
        (dict(paths=[run, empty]), f"nothing is logged in {empty} yet"),
        (dict(paths=[run, old], x="minutes"), "^old holds no training times.*--x epoch"),
        (dict(paths=[run], out=tmp_path / "curves.txt"), "must end in .png, .svg, .pdf"),
        (dict(paths=[run], out=tmp_path / "none" / "curves.png"), "No such file or directory.*--out"),
    ):
        with pytest.raises(UserError, match=message) as error:
            plot_runs(**arguments)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "curves.png"
    assert run_command(monkeypatch, "plot", run, "--out", out, "--x", "minutes") == 0
    assert capsys.readouterr().out == f"learning curves are in {out}\n"
    assert out.is_file()
