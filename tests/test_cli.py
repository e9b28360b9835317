"""The command line: lazy, with examples, and one clear line for every mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from command import run_command as run
from digits import TINY, one_picture

COMMANDS = [
    "train",
    "evaluate",
    "predict",
    "explain",
    "demo",
    "convert",
    "plot",
    "models",
    "recipes",
    "benchmark",
    "reproduce",
    "export",
    "push",
]


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys, conv2former_cli\n"
        "sys.argv = ['conv2former', '--help']\n"
        "try: conv2former_cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'lightning', 'matplotlib', 'sklearn', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert all(command in answer.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, command, "--help") == 0
    assert f"Example: conv2former {command}" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_train_evaluate_predict(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options = [part for override in TINY for part in ("--set", override)]
    assert run(monkeypatch, "train", "--recipe", "quickstart", "--data", data, "--out", out, *options) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("top-1 ") and last.endswith(f"are in {out}")
    assert run(monkeypatch, "evaluate", out, "--data", data, "--json") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 16
    assert run(monkeypatch, "predict", out, data / "val", "--top-k", 1, "--out", tmp_path / "drawn") == 0
    assert len(capsys.readouterr().out.splitlines()) == len(list((tmp_path / "drawn").rglob("*.png"))) == 16
    assert run(monkeypatch, "train", "--out", out, "--resume") == 0


@pytest.mark.slow  # tests/test_train.py has it without the command line, which sets --model as any other setting
def test_the_same_recipe_with_another_model(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [part for override in [*TINY, "schedule.epochs=2", "data.input_size=32"] for part in ("--set", override)]
    arguments = ["train", "--recipe", "quickstart", "--data", data, "--out", tmp_path / "run", *options]
    assert run(monkeypatch, *arguments, "--model", "test_vit") == 0
    assert json.loads((tmp_path / "run" / "best" / "config.json").read_text())["architecture"] == "test_vit"


OVER = ["train", "--recipe", "quickstart", "--out", "{run}", "--overwrite", "--set"]
QUICK = ["train", "--recipe", "quickstart", "--out", "{new}"]
BAD = [
    (["train", "--recipe", "quikstart", "--out", "{new}"], "did you mean 'quickstart'"),
    ([*QUICK, "--set", "optim.lr=1"], "unknown key 'optim.lr'"),
    ([*QUICK, "--model", "conv2former_tt"], "did you mean 'conv2former_t"),
    (["train", "--recipe", "cifar", "--out", "{new}"], "name the folder of images with --data DIR"),
    (["train", "--recipe", "cifar", "--out", "{new}", "--data", "{new}"], "no such folder"),
    (["train", "--recipe", "cifar", "--out", "{new}", "--data", "{file}"], "not a folder"),
    (["train", "--recipe", "quickstart", "--out", "{run}"], "already holds a run: continue it with --resume"),
    ([*QUICK, "--data", "{empty}"], "leave --data out"),
    ([*OVER, "optim.name=adamz"], "adamz"),
    ([*OVER, "augment.auto_augment=x"], "augment"),
    ([*OVER, "data.input_size=8"], "smaller than"),
    ([*OVER, "model.args.x=1"], "model.args"),
    ([*QUICK, "--set", "engine.accelerator=cuda"], "engine.accelerator=cuda with"),
    ([*QUICK, "--set", "engine.precision=16"], "use bf16 on a CPU"),
    (["train", "--out", "{new}"], "no recipe is named: `conv2former recipes` lists them. For your own"),
    (["train", "--out", "{new}", "--resume"], "{new} is not a run folder: it does not exist"),
    (["train", "--out", "{run}", "--resume", "--overwrite"], "exclude each other"),
    (["train", "--out", "{run}", "--resume", "--recipe", "cifar"], "made with other settings"),
    (["train", "--out", "{run}", "--model", "conv2former_t"], "holds a run: continue it with --resume"),
    (["train", "--out", "{run}", "--resume", "auto", "--overwrite"], "exclude each other"),
    ([*QUICK, "--force"], "--force can only be used together with --resume"),
    ([*QUICK, "--dry-run", "--overwrite"], "leave --resume and --overwrite out"),
    (["train", "--dry-run"], "--dry-run plans a recipe: name it with --recipe"),
    (["plot", "{empty}"], "is not a run folder"),
    (["plot", "{run}", "--out", "{new}"], "must end in .png"),
    (["evaluate", "{new}"], "does not exist"),
    (["evaluate", "{run}", "--data", "{new}"], "no such folder"),
    (["evaluate", "{run}", "--device", "cuda:99"], "use --device cpu"),
    (["predict", "{new}", "{file}"], "does not exist"),
    (["predict", "{run}", "{empty}"], "no images in"),
    (["predict", "{file}", "{file}"], "{file}"),
    (["convert", "{new}", "{new}2", "--model", "conv2former_t"], "does not exist"),
    (["convert", "{file}", "{new}", "--model", "conv2former_t"], "{file}"),
    (["convert", "{file}", "{new}", "--model", "resnet50"], "resnet50"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_a_mistake_is_one_line_and_a_status(
    arguments: list[str],
    message: str,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"new": tmp_path / "new", "file": tmp_path / "file", "empty": tmp_path / "empty", "run": finished}
    places["file"].write_text("hello")
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    status = run(monkeypatch, *(argument.format(**places) for argument in arguments))
    output = capsys.readouterr()
    assert status == 1 and output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert message.format(**places) in output.err
    assert not places["new"].exists()
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before, "something was lost"


def test_an_unknown_option_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "train", "--recipie", "quickstart") == 2
    assert "--recipe" in capsys.readouterr().err


def test_predict_reports_bad_files_and_status(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    assert run(monkeypatch, "predict", finished, tmp_path / "bad.png", one_picture(tmp_path / "good.png")) == 1
    output = capsys.readouterr()
    assert [json.loads(line)["ok"] for line in output.out.splitlines()] == [False, True]
    assert output.err.splitlines()[-1] == "1 of 2 files could not be read"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_without_permission(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o500)
    assert run(monkeypatch, "train", "--recipe", "quickstart", "--out", tmp_path / "run") == 1
    assert "cannot write the output folder" in capsys.readouterr().err


def test_lists_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "models", "--json") == 0
    rows = {row["name"]: row for row in reversed(json.loads(capsys.readouterr().out))}  # the first of a name counts
    assert rows["conv2former_t"]["params"] == 26_697_204 and rows["conv2former_t"]["paper_top1"] == 83.2
    assert run(monkeypatch, "recipes", "--json") == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)]
    assert names == sorted(names) and "quickstart" in names
    assert run(monkeypatch, "recipes") == 0
    assert "not run" in capsys.readouterr().out


def test_a_reader_that_leaves_early_is_no_error(finished: Path, data: Path) -> None:
    command = f"{sys.executable} -m conv2former_cli predict {finished} {data} | head -1"
    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert json.loads(answer.stdout)["ok"] and "Traceback" not in answer.stderr
