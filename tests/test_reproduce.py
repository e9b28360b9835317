"""The paper's tables: complete rows, trainings that go on after a stop, figures and differences."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from command import run_command
from conv2former.engine.run_dir import RunDir
from conv2former.engine.train import train
from conv2former.errors import UserError
from conv2former.files import append_line, read_lines
from conv2former.models.meta import build_on_meta
from conv2former.recipes import load_recipe
from conv2former.tools.reproduce import TABLES, Request, Stopped, reproduce
from conv2former.tools.reproduce.jobs import Images, Job, table_jobs
from conv2former.tools.reproduce.scales import at_scale
from conv2former.tools.reproduce.tables import paper_table
from digits import write_digits

# steps of sixteen digits, on next to no network
TINY = ("model.args={stem_stride: 2, dims: [8, 8, 8, 8], depths: [1, 1, 1, 1]}",)
TINY += ("data.input_size=16", "optim.batch_size=16", "schedule.epochs=2", "schedule.eval_every=2", "data.workers=0")
ROWS = ("imagenet1k_t_sum", "imagenet1k_t")


def trainable() -> list[tuple[str, str | None]]:
    return sorted(
        {(row.recipe, row.model) for name in TABLES for row in paper_table(name).rows if row.recipe},
        key=lambda pair: (pair[0], pair[1] or ""),
    )


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_the_papers(name: str) -> None:
    table = paper_table(name)
    assert len({row.label for row in table.rows}) == len(table.rows)
    for row in table.rows:
        if row.recipe:
            assert load_recipe(row.recipe).task == table.task
        if row.recipe and not row.model:
            assert row.paper == load_recipe(row.recipe).claim.paper
    ends = {row.group: row for row in table.rows}
    assert all(row.recipe and not row.model for row in ends.values()), "ours is the last of its group"


# a row of each kind; the others are slow tests
KINDS: list[tuple[str, str | None]] = [
    *(("imagenet1k_t", model) for model in (None, "convnext_tiny", "resnet50", "swin_tiny_patch4_window7_224")),
    *(("imagenet1k_is", model) for model in (None, "deit_small_patch16_224")),
    *((f"imagenet1k_{kind}", None) for kind in ("t_sum", "t_k21", "ft224_s", "ft384_b")),
    *((f"{task}_t", None) for task in ("coco_mask_rcnn", "coco_cascade_mask_rcnn", "ade20k_upernet")),
    ("imagenet1k_s", "nfnet_f0"),
]


def test_the_kinds_are_rows() -> None:
    assert {*KINDS} <= {*trainable()}


@pytest.mark.parametrize(
    ("recipe", "model"),
    [pytest.param(*row, marks=() if row in KINDS else pytest.mark.slow) for row in trainable()],
    ids=str,
)
def test_a_small_row_can_be_built(recipe: str, model: str | None) -> None:
    full, small = at_scale(recipe, model, "full", []), at_scale(recipe, model, "small", [])
    assert full is not None and full.model.name == (model or load_recipe(recipe).model.name)
    if small is None:
        assert model in ("nfnet_f0", "regnety_160", "focalnet_base_lrf", "efficientnet_b7", "coatnet_3_rw_224")
        return
    count = lambda r: sum(p.numel() for p in build_on_meta(r.model.name, **r.model.args).parameters())  # noqa: E731
    assert small.model.weights is None and small.digest() != full.digest()
    assert 20 * count(small) < count(full)
    assert small.model.args.get("kernel_size") == full.model.args.get("kernel_size")


def test_small_rivals_are_of_equal_size() -> None:
    def parameters(*row: Any) -> int:
        recipe = at_scale(*row, "small", [])
        assert recipe is not None
        return sum(
            p.numel() for p in build_on_meta(recipe.model.name, num_classes=10, **recipe.model.args).parameters()
        )

    ours = parameters("imagenet1k_t", None)
    assert 0.95 < parameters("imagenet1k_t", "convnext_tiny") / ours < 1.05
    assert 0.9 < parameters("imagenet1k_t", "resnet50") / ours < 1.1


def in_this_process(job: Job) -> int:
    train(job.recipe, data=job.data, out=job.run, resume="auto")
    return 0


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Trains in this process; gives the list of what was trained."""
    trained: list[Job] = []

    def run(job: Job) -> int:
        trained.append(job)
        return in_this_process(job)

    monkeypatch.setattr("conv2former.tools.reproduce.jobs._train", run)
    return trained


def test_rows_are_trained_once(tmp_path: Path, quick: list[Job]) -> None:
    data = write_digits(tmp_path / "data")
    request = Request("table6", data=data, out=tmp_path / "out", only=ROWS, settings=TINY)
    outcome, (markdown, table, picture) = reproduce(request)
    assert (outcome.trained, outcome.skipped, len(quick)) == (2, 0, 2) and picture.stat().st_size > 5000
    outcome, _ = reproduce(request)
    assert (outcome.trained, outcome.skipped, len(quick)) == (0, 2, 2)
    # the row that another table shares is not trained again; a second seed is
    shared = Request("fig4a", data=data, out=tmp_path / "out", only=ROWS[1:], settings=TINY, seeds=2)
    outcome, _ = reproduce(shared)
    assert (outcome.trained, outcome.skipped) == (1, 1) and quick[-1].recipe.engine.seed == 1
    rows = read_lines(request.measured)
    assert len(rows) == 3 and all(row["images"] == dict(train=64, val=16) for row in rows)
    evaluation = json.loads((quick[0].run / "evaluation.json").read_text())
    assert rows[0]["value"] == evaluation["top1"] and f"{rows[0]['value']:.2f}" in markdown.read_text()
    model = quick[0].recipe.model
    built = build_on_meta(model.name, num_classes=4, **model.args)
    assert rows[0]["parameters"] == sum(p.numel() for p in built.parameters())
    # other settings are other rows
    other = Request("table6", data=data, out=tmp_path / "out", only=ROWS, settings=(*TINY, "optim.base_lr=1e-3"))
    reproduce(Request(**vars(other) | dict(data=None)))
    assert "not run" in markdown.read_text() and "base_lr" in markdown.read_text()
    assert "workers" not in markdown.read_text()
    with table.open() as file:
        assert len(list(csv.reader(file))) == 6


@pytest.mark.slow
def test_other_images_and_settings_are_measured_anew(tmp_path: Path, quick: list[Job]) -> None:
    request = dict(table="table6", out=tmp_path / "out", only=ROWS[1:])
    one = Request(data=write_digits(tmp_path / "one"), settings=TINY, **request)
    two = Request(data=write_digits(tmp_path / "two", train=20), settings=TINY, **request)
    other = Request(data=tmp_path / "two", settings=(*TINY, "optim.base_lr=1e-3"), **request)
    for count, asked in enumerate((one, two, other, other), 1):
        outcome, _ = reproduce(asked)
        assert (outcome.trained, outcome.skipped) == ((1, 0) if count < 4 else (0, 1))
    assert len({job.run for job in quick}) == 3
    # the first data set's row is known although the table shows the last one's
    assert reproduce(one)[0].skipped == 1


@pytest.mark.slow
def test_seeds_that_hold_other_images_out_are_one_table(tmp_path: Path, quick: list[Job]) -> None:
    shutil.move(write_digits(tmp_path / "data") / "train", tmp_path / "classes")
    settings = (*TINY, "data.val_fraction=0.25")
    request = Request(
        "table6", data=tmp_path / "classes", out=tmp_path / "out", only=ROWS[1:], settings=settings, seeds=2
    )
    outcome, (_, table, _) = reproduce(request)
    hashes = {RunDir(job.run).facts()["images_hash"] for job in quick}
    assert outcome.trained == 2 and len(hashes) == 2, "the seeds split differently"
    with table.open() as file:
        assert [row["seeds"] for row in csv.DictReader(file)][-1] == "2"
    assert reproduce(request)[0].skipped == 2


def write_rows(request: Request, values: dict[str, list[float]]) -> None:
    found = table_jobs(request, paper_table(request.table), Images())
    request.out.mkdir(parents=True, exist_ok=True)
    for job in found:
        assert job.row is not None
        seed = job.recipe.engine.seed
        if seed < len(values.get(job.row.name, [])):
            row = dict(key=job.key, row=job.row.name, seed=seed, value=values[job.row.name][seed], parameters=590_000)
            row |= dict(images=dict(train=5, val=2), images_hash="a", data="d", commit="c")
            append_line(request.measured, row | dict(machine=dict(gpus=[], cpus=2)))


def test_means_spreads_and_differences(tmp_path: Path) -> None:
    request = Request("table6", out=tmp_path, seeds=3)
    write_rows(
        request, {"imagenet1k_t": [70.0, 71.0, 72.0], "imagenet1k_t_sum": [69.0, 69.5], "imagenet1k_t_l1": [71.5]}
    )
    _, (markdown, table, _) = reproduce(request)
    with table.open() as file:
        rows = {row["row"]: row for row in csv.DictReader(file)}
    ours = rows["Hadamard product"]
    assert (ours["ours"], ours["std"], ours["seeds"]) == ("71.00", "1.00", "3")
    assert ours["values"] == "70.0000 71.0000 72.0000" and ours["ours, to last"] == ""
    total = rows["element-wise sum"]
    assert (total["ours"], total["std"], total["paper, to last"]) == ("69.25", "0.35", "-0.5")
    assert total["ours, to last"] == "-1.75"
    assert (rows["L1 normalisation after A"]["std"], rows["L1 normalisation after A"]["seeds"]) == ("", "1")
    assert rows["sigmoid after A"]["ours"] == "not run"
    text = markdown.read_text()
    assert "5 training and 2 validation images" in text and "| sigmoid after A |  | 82.3 | not run |" in text


def test_numbers_on_other_images_are_left_out(tmp_path: Path) -> None:
    request = Request("table6", out=tmp_path)
    write_rows(request, {"imagenet1k_t": [70.0], "imagenet1k_t_sum": [69.0]})
    rows = read_lines(request.measured)
    append_line(request.measured, rows[0] | dict(images_hash="b", value=50.0))
    _, (markdown, *_) = reproduce(request)
    assert "50.00" in markdown.read_text() and "70.00" not in markdown.read_text()


def test_pretraining_comes_first(tmp_path: Path) -> None:
    request = Request("table9", scale="full", out=tmp_path / "out", only=("ade20k_upernet_t",))
    (job,) = table_jobs(request, paper_table("table9"), Images())
    assert job.after is not None and job.after.recipe.digest() == load_recipe("imagenet1k_t").digest()
    assert job.recipe.model.weights == str(job.after.run)
    elsewhere = table_jobs(Request(**vars(request) | dict(out=tmp_path / "x")), paper_table("table9"), Images())[0]
    assert job.key == elsewhere.key and job.recipe.digest() != elsewhere.recipe.digest()
    assert job.key != job.recipe.digest()


@pytest.mark.slow
def test_rows_start_from_the_pretraining(tmp_path: Path, quick: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both recipes shrunk to seconds; other images of the pre-training are another row."""

    def shrunk(name: str, model: str | None, scale: str, settings: list[str]) -> Any:
        recipe = at_scale("imagenet1k_t", None, "small", [*TINY, *settings])
        weights = "runs/imagenet1k_t" if name == "imagenet1k_ft224_s" else None
        return recipe.model_copy(update=dict(model=recipe.model.model_copy(update=dict(weights=weights))))  # type: ignore

    monkeypatch.setattr("conv2former.tools.reproduce.jobs.at_scale", shrunk)
    data, first, second = (write_digits(tmp_path / name, train=n) for name, n in (("a", 16), ("b", 17), ("c", 18)))
    asked = dict(table="table4", scale="full", data=data, out=tmp_path / "out", only=("imagenet1k_ft224_s",))
    with pytest.raises(UserError, match="--pretraining-data"):
        reproduce(Request(**asked))
    for images in (first, second):
        assert reproduce(Request(**asked, pretraining_data=images))[0].trained == 1
    assert [job.data for job in quick] == [first, data, second, data]
    assert str(quick[0].run) == quick[1].recipe.model.weights and quick[1].run != quick[3].run
    assert reproduce(Request(**asked, pretraining_data=first))[0].skipped == 1


def test_a_pretraining_that_failed_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Job] = []
    monkeypatch.setattr("conv2former.tools.reproduce.jobs._train", lambda job: tried.append(job) or 1)
    data = write_digits(tmp_path / "data")
    rows = ("imagenet1k_ft224_s", "imagenet1k_ft224_b", "imagenet1k_ft384_b")  # the last two start from one
    request = Request("table4", scale="full", data=data, pretraining_data=data, out=tmp_path / "out", only=rows)
    monkeypatch.setattr(Images, "digest", lambda self, job: "0" * 16)
    outcome, _ = reproduce(request)
    assert len(tried) == 2 and len(outcome.failed) == 2 and not outcome.trained


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table66"], "did you mean 'table6'"),
        (["table4"], "has no small scale"),
        (["table6", "--row", "imagenet1k_t_sun"], "did you mean 'imagenet1k_t_sum'"),
        (["table6", "--set", "optim.lr=1"], "unknown key 'optim.lr'"),
        (["table6", "--data", "nowhere"], "no such folder"),
        (["table6", "--set", "model.weights=runs/x"], "leave it out"),
        (["table9", "--scale", "full", "--data", "data", "--row", "ade20k_upernet_t"], "--pretraining-data"),
        (["table6", "--out", "file"], "cannot"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "file").touch()
    write_digits(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert run_command(monkeypatch, "reproduce", *arguments) == 1
    assert re.search(message, capsys.readouterr().err.splitlines()[-1].lower()), message


def test_a_training_that_the_signal_kills_stops_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a scheduler asks both processes and the training has saved its state between the two signals."""
    data = write_digits(tmp_path / "data")
    start, children = subprocess.Popen, []

    def killed(*_: Any, **__: Any) -> subprocess.Popen[bytes]:
        children.append(start(["sh", "-c", f"sleep 1; kill -TERM {os.getpid()}; exec sleep 60"]))
        return children[-1]

    monkeypatch.setattr("conv2former.tools.reproduce.jobs.subprocess.Popen", killed)
    with pytest.raises(Stopped, match="the same command goes on") as stopped:
        reproduce(Request("table6", data=data, out=tmp_path / "out", settings=TINY))
    assert stopped.value.code == 75 and [child.returncode for child in children] == [-signal.SIGTERM]


@pytest.mark.slow
def test_a_stopped_table_goes_on(tmp_path: Path) -> None:
    """Killed in the middle of a row: its training ends with its state saved, and the same command finishes it."""
    data = write_digits(tmp_path / "data")
    settings = [f"--set={one}" for one in (*TINY, "schedule.epochs=30", "schedule.eval_every=30")]
    command = [sys.executable, "-m", "conv2former_cli", "reproduce", "table6", f"--data={data}", "--row=imagenet1k_t"]
    command += [f"--out={tmp_path / 'out'}", *settings]
    process = subprocess.Popen(command, env=os.environ | dict(OMP_NUM_THREADS="1"))
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out/runs/imagenet1k_t.small/seed0-*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    (run,) = tmp_path.glob("out/runs/imagenet1k_t.small/seed0-*/")
    history = read_lines(run / "history.jsonl")
    assert history[-1]["event"] == "stopped" and not (tmp_path / "out" / "rows.jsonl").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert [row["event"] for row in read_lines(run / "history.jsonl")][1:] == ["stopped", "resumed", "finished"]
    assert "1 trained, 0 measured before" in again.stdout
