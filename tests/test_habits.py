"""The first hour on the command line: habits of other tools, what is printed when, and places that are not there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import conv2former_cli
from command import run_command
from conv2former.engine import progress, torch_settings
from conv2former.engine.dry_run import dry_run
from conv2former.engine.progress import Ticker, TrainingProgress, duration, significant
from conv2former.engine.run_dir import RunDir
from conv2former.engine.train import train
from conv2former_runtime import build
from digits import TINY, one_picture, tiny_recipe

SHORT = [*(f"--set={setting}" for setting in TINY), "--set=schedule.epochs=1", "--set=schedule.warmup_epochs=0"]


@pytest.mark.usefixtures("quick")
def test_settings_and_folders_need_no_option(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["quickstart", data, "--epochs", "2", "lr=1e-3", "-b", "8", "--schedule.warmup_epochs=1", "--seed", "3"]
    assert run_command(monkeypatch, "train", *SHORT, *words, "--out", tmp_path / "run") == 0
    said = capfd.readouterr().err
    recipe = RunDir(tmp_path / "run").recipe()
    assert (recipe.schedule.epochs, recipe.optim.base_lr, recipe.optim.batch_size) == (2, 1e-3, 8)
    assert (recipe.schedule.warmup_epochs, recipe.engine.seed) == (1, 3)
    for line in ("--recipe quickstart", f"--data {data}", "--set schedule.epochs=2", "--set optim.base_lr=1e-3"):
        assert f"taken as {line}\n" in said, "what can be typed instead"
    assert run_command(monkeypatch, "train", "quickstart", "--epoches", "2") == 2
    said = capfd.readouterr().err
    assert "No such option: --epoches" in said and "there is no option --epoches; did you mean --epochs?" in said


def test_no_arguments_and_the_version(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(monkeypatch, "train") == 1
    said = capfd.readouterr().err
    assert said.startswith("error: no recipe is named") and said.count("\n") == 1
    assert "conv2former train --recipe finetune --model convnext_nano.in12k_ft_in1k --pretrained --data DIR" in said
    assert run_command(monkeypatch, "--version") == 0
    assert re.fullmatch(r"conv2former \d+\.\d+\.\d+\n", capfd.readouterr().out)


@pytest.mark.usefixtures("quick")
def test_the_first_lines_say_what_is_done(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(tiny_recipe("schedule.epochs=1", "schedule.warmup_epochs=0"), data=data, out=tmp_path / "a run")
    said = capfd.readouterr().err
    for part in (
        r"quickstart: classification with conv2former_test, 0\.0\dM parameters, from random weights",
        r"64 training, 16 validation images, 4 classes",
        r"precision 32 on cpu, operations by \w+",
        r"learning rate 0.004 x \d+ / 64 = ",
        r"\d+ steps?: 1 epoch of \d+",
        r"writes to .*/a run; Ctrl-C stops it, and `conv2former train --out '.*/a run' --resume` goes on",
    ):
        assert re.search(part, said), part


def test_slow_bfloat16_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    half, cpu = tiny_recipe("engine.precision=bf16", "optim.name=muon"), torch.device("cpu")
    monkeypatch.setattr(torch_settings, "fast_bfloat16", lambda: True)
    assert torch_settings.slow_precision(half, cpu) is None and "slower" not in dry_run(half, data=None, out=None)
    monkeypatch.setattr(torch_settings, "fast_bfloat16", lambda: False)
    (said,) = (line for line in torch_settings.start_lines(half, half, cpu) if "bfloat16" in line)
    assert said.endswith(": add --set engine.precision=32 --set optim.name=adamw")
    assert torch_settings.slow_precision(tiny_recipe(), cpu) is None
    assert "engine.precision=bf16 and optim.name=muon many times slower" in dry_run(half, data=None, out=None)


def test_evaluate_prints_a_table(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "evaluate", finished) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split() == ["class", "precision", "recall", "F1", "images"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:5]}
    found = json.loads((finished / "evaluation.json").read_text())
    for name, (precision, recall, f1, images) in rows.items():
        scores = found["per_class"][name]
        assert float(recall) == pytest.approx(scores["top1"], abs=0.05) and int(images) == 4
        assert 2 / (1 / float(precision) + 1 / float(recall)) == pytest.approx(float(f1), abs=0.1)
    assert lines[5].startswith("macro average") and found["balanced_accuracy"] == pytest.approx(found["top1"])


def test_saved_weights_can_be_read_by_who_may_read_their_neighbours(finished: Path) -> None:
    modes = {path.name: path.stat().st_mode for path in (finished / "best").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_predictions_are_utf8(finished: Path, tmp_path: Path) -> None:
    one_picture(tmp_path / "Größe 猫.png")
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "PYTHONUTF8": "0", "HOME": str(tmp_path)}
    environment["OMP_NUM_THREADS"] = "1"
    environment["XDG_CACHE_HOME"] = str(build.cache().parent)  # with the kernels, which would be compiled anew
    program = [sys.executable, "-m", "conv2former_cli", "predict", str(finished), str(tmp_path)]
    done = subprocess.run(program, capture_output=True, env=environment, check=True)
    assert json.loads(done.stdout.decode("utf-8"))["file"].endswith("Größe 猫.png") and "猫".encode() in done.stdout
    version = [*program[:3], "--version"]  # which loads no PyTorch
    with open("/dev/full", "wb") as full:
        broken = subprocess.run(version, stdout=full, stderr=subprocess.PIPE, env=environment, text=True)
    assert broken.returncode == 1 and broken.stderr.splitlines()[-1].startswith("error: the disk is full: make room")
    assert "Traceback" not in broken.stderr


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    (gone := tmp_path / "gone").mkdir()
    code = (
        f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); import conv2former_cli; conv2former_cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "recipes"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: the working folder is gone: go to another one\n"


@pytest.mark.usefixtures("quick")
def test_training_in_a_thread_with_texts_for_paths(data: Path, tmp_path: Path) -> None:
    found: list[Any] = []
    recipe = tiny_recipe("schedule.epochs=1", "schedule.warmup_epochs=0")
    thread = threading.Thread(target=lambda: found.append(train(recipe, data=str(data), out=str(tmp_path / "run"))))
    thread.start()
    thread.join()
    assert found and found[0].details["images"] == 16


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert build.cache().is_dir()


def test_off_a_terminal_there_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also before the first step and while one goes on."""
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.2)
    shown = TrainingProgress(100, 10, global_batch=4, start=0)
    with shown:
        time.sleep(0.5)
        shown.step(1, seconds=4.0, waited=1.0, memory_gb=lambda: 1.0, loss=None, lr=0.1)
        shown.step(2, seconds=4.0, waited=1.0, memory_gb=lambda: 1.0, loss=2.5, lr=0.1)
        time.sleep(0.5)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "epoch 1/10  step 0/100  waiting for the first images"
    assert "epoch 1/10  step 1/100  lr 1.00e-01  1.0 images/s  25% waiting for data  7 min left" in lines
    assert lines[-1].startswith("epoch 1/10  step 2/100  loss 2.5000  lr 1.00e-01  1.0 images/s")
    with Ticker(lambda: "line", enabled=False):
        time.sleep(0.3)
    assert not capfd.readouterr().err


def test_numbers_and_times_in_words() -> None:
    assert [significant(value) for value in (0.432, 1.04, 8.77, 12.4, 874, 8742)] == [
        "0.43",
        "1.0",
        "8.8",
        "12",
        "870",
        "8,700",
    ]
    assert [duration(seconds) for seconds in (42, 600, 12_000)] == ["42 s", "10 min", "3 h 20 min"]


@pytest.mark.parametrize(
    "closed", [">&- 2>&-", *(pytest.param(one, marks=pytest.mark.slow) for one in (">&-", "2>&-"))]
)
def test_closed_streams(finished: Path, tmp_path: Path, closed: str) -> None:
    one_picture(tmp_path / "one.png")
    words = f"{sys.executable} -m conv2former_cli predict {finished} {tmp_path} {closed}"
    done = subprocess.run(["sh", "-c", words], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_weights_say_which_model(finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    words = ["train", "--recipe", "finetune", "--weights", str(finished), "--dry-run"]
    run_command(monkeypatch, *words)
    said = capsys.readouterr()
    assert "taken as --model conv2former_test, of which the weights are" in said.err and "conv2former_test" in said.out
    assert run_command(monkeypatch, *words, "--model", "resnet18") == 1
    assert "the recipe says resnet18: give --model conv2former_test" in capsys.readouterr().err


def test_the_users_folder_where_shells_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    words = ["~/a", "--out=~/a", "model.weights=~/a", "a~/b", "~", "--set=a=b/~/c"]
    assert [*map(conv2former_cli._at_home, words)] == [
        *("/home/me/a", "--out=/home/me/a", "model.weights=/home/me/a"),
        *words[3:],
    ]
