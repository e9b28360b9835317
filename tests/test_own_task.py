"""A task from outside of the package, ``examples/depth_task.py``: every command knows it, and no file of ours does."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from command import run_command
from conv2former.data.activity import Pace
from conv2former.data.loading import Normalizer
from conv2former.engine.evaluate import evaluation_loop
from conv2former.engine.state import TrainState
from conv2former.errors import UserError
from conv2former.recipes import load_recipe
from conv2former.tasks import register, task_names
from conv2former.tasks.base import Evaluation
from conv2former.tasks.dense import DenseTask
from runs import assert_same_run, stopped_run
from scenes import scene
from shown import shown_commands

EXAMPLES = Path(__file__).parents[1] / "examples"
PAGE = "docs/add_a_task.md"
RECIPE: dict[str, Any] = dict(
    name="depth",
    task="depth",
    model=dict(name="conv2former_test", args=dict(ls_init_value=0.1)),
    data=dict(crop_size=64, short_side=64, workers=0),
    decoder=dict(channels=16, aux_weight=0),
    optim=dict(batch_size=2, base_batch=2, base_lr=1e-3),
    schedule=dict(epochs=2),
    engine=dict(accelerator="cpu"),
)


def start(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """A command in a process of its own, in the folder of the module."""
    words = [sys.executable, "-m", "conv2former_cli", *map(str, arguments)]
    return subprocess.run(words, cwd=EXAMPLES, env=os.environ | environment, capture_output=True, text=True)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command prints, in this process."""
    monkeypatch.chdir(EXAMPLES)

    def command(*arguments: object, status: int = 0) -> str:
        found = run_command(monkeypatch, "--import", "depth_task", *arguments)
        out, errors = capsys.readouterr()
        assert found == status, errors
        return errors if status else out

    return command


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose lower rows are nearer."""
    root = tmp_path_factory.mktemp("rooms")
    for folder in ("images", "depth"):
        (root / folder).mkdir()
    for number in range(7):
        image = scene(number)[0]
        image.save(root / "images" / f"{number}.png")
        rows = np.linspace(4, 1, image.height, dtype=np.float32)
        np.save(root / "depth" / f"{number}.npy", np.repeat(rows[:, None], image.width, axis=1))
    (root / "depth.yaml").write_text(yaml.safe_dump(RECIPE))
    return root


@pytest.fixture(scope="module")
def trained(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "depth"
    words = ["--import", "depth_task", "train", "--recipe", rooms / "depth.yaml", "--data", rooms, "--out", out]
    printed, said = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(said):
        patch.chdir(EXAMPLES)
        assert run_command(patch, *words) == 0, said.getvalue()
    assert "delta-1" in printed.getvalue() and "depth: depth with conv2former_test" in said.getvalue()
    return out


def test_a_run_has_its_report_and_card(trained: Path) -> None:
    found = json.loads((trained / "evaluation.json").read_text())
    assert found["images"] == 1 and 0 < found["abs_rel"] < 10
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["val_delta1"] for row in rows if row["kind"] == "epoch"]
    card = (trained / "best" / "README.md").read_text()
    assert "pipeline_tag: depth-estimation" in card and "to say how far away each pixel" in card
    assert "conv2former --import depth_task predict FOLDER" in card and "Its classes" not in card
    files = [trained / "recipe.yaml", trained / "run.json", trained / "best" / "config.json"]
    assert not any("depth_task" in path.read_text() for path in files if path.name != "run.json")


@pytest.mark.usefixtures("quick")
def test_it_resumes_bit_for_bit(
    trained: Path, rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., str]
) -> None:
    run("recipes")  # imports the module
    stopped_run(load_recipe(rooms / "depth.yaml"), rooms, tmp_path / "run", monkeypatch, step=2)
    run("train", "--out", tmp_path / "run", "--resume")
    assert_same_run(trained, tmp_path / "run")


@pytest.mark.slow
def test_two_processes_know_it(rooms: Path, tmp_path: Path) -> None:
    options = ["--recipe", rooms / "depth.yaml", "--data", rooms, "--out", tmp_path / "run"]
    options += [f"--set={x}" for x in ("engine.devices=2", "optim.global_batch=4", "schedule.epochs=1")]
    done = start("--import", "depth_task", "train", *options)
    assert done.returncode == 0 and json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2, done


@pytest.mark.slow
def test_all_other_commands_take_it(trained: Path, rooms: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    image = rooms / "images" / "0.png"
    assert "delta-1" in run("evaluate", trained, "--data", rooms, "--out", tmp_path / "report")
    assert Image.open(tmp_path / "report" / "predictions.png").size == (128, 96)
    row = json.loads(run("predict", trained, image, "--out", tmp_path / "drawn"))
    assert row["nearest"] <= row["median"] <= row["farthest"] and (tmp_path / "drawn" / "0.predicted.png").is_file()
    planned = run("train", "--recipe", rooms / "depth.yaml", "--dry-run", "--verbose", "--out", tmp_path / "plan.png")
    assert "decoder" in planned and "activations" in planned and "alone" not in planned
    exported = run("export", trained, "--format", "torch", "--images", image, "--out", tmp_path / "exported")
    assert "model.pt2" in exported and "depth-estimation" in (tmp_path / "exported" / "README.md").read_text()
    run("explain", "maps", trained, image, "--out", tmp_path / "maps")
    refused = run("evaluate", trained, "--data", rooms, "--multi-scale", status=1)
    assert refused == "error: --multi-scale is for segmentation, this is a depth model: leave it out\n"
    assert run("--import", "nowhere", "recipes", status=1).startswith(
        "error: --import nowhere: ModuleNotFoundError: No module named 'nowhere'; it must lie in "
    )


def test_class_activation_and_the_demo_take_it(
    trained: Path, rooms: Path, tmp_path: Path, run: Callable[..., str]
) -> None:
    run("recipes")
    image = rooms / "images" / "0.png"
    pytest.importorskip("pytorch_grad_cam")
    from conv2former.tools.explain.cams import run_cams

    assert run_cams(trained, [image], out=tmp_path / "cam") == 0
    pytest.importorskip("gradio")
    from conv2former.tools.demo import results
    from conv2former.tools.demo.models import Models
    from conv2former.tools.demo.options import Options

    model = Models([str(trained)], device="cpu").get("depth")
    look = model.look(Image.open(image), Options(maps=True, cam=True))
    page = results.answer("depth", model.about, look, "a.png")
    assert "From near, dark, to far, bright." in page and "Modulation weights A" in page
    assert "whatever the class" in page and "delta-1 " in results.title([("depth", model.about)], [])


@pytest.mark.slow
def test_without_its_module_the_line_says_what_to_do(trained: Path, rooms: Path) -> None:
    line = start("predict", trained, rooms / "images").stderr
    assert line.startswith("error: unknown task 'depth'") and "conv2former --import MODULE" in line


@pytest.mark.slow
def test_an_entry_point_registers_it(rooms: Path, tmp_path: Path) -> None:
    """As an installed package would: its metadata beside its module on the path."""
    (tmp_path / "depth_task.py").write_text((EXAMPLES / "depth_task.py").read_text().replace("@register\n", ""))
    metadata = tmp_path / "depth_task-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: depth-task\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[conv2former.tasks]\ndepth = depth_task:DepthTask\n")
    options = ["--recipe", rooms / "depth.yaml", "--dry-run", "--out", tmp_path / "plan.png"]
    done = start("train", *options, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and "Dry run of depth" in done.stdout, done.stderr


def test_what_a_task_lacks_is_said_when_it_is_registered() -> None:
    class Half(DenseTask):
        name = "half"

    with pytest.raises(UserError, match=r"the task test_own_task:\S+Half lacks config_class, monitor, .*training_step"):
        register(Half)
    with pytest.raises(UserError, match="is no task: a class on"):
        register(TrainState)  # type: ignore[type-var]
    assert "half" not in task_names()


def test_a_metric_may_be_negative_or_undefined_at_first() -> None:
    state = TrainState()
    values = [math.nan, None, None, -0.3, None, -0.5, -0.1, math.nan]
    assert [state.improves(value) for value in values] == [False, True, True, True, False, False, True, False]
    assert state.best == -0.1


def test_a_metric_gives_an_evaluation_of_numbers() -> None:
    task: Any = SimpleNamespace(name="depth", monitor="delta1", normalizer=Normalizer((0.5,) * 3, (0.5,) * 3))

    def evaluated(result: Any) -> Evaluation:
        metric: Any = SimpleNamespace(to=lambda device: None, result=lambda: result)
        return evaluation_loop(task, [], metric, count=0, pace=Pace())

    with pytest.raises(UserError, match="the evaluation of depth is a dict"):
        evaluated(dict(delta1=1.0))
    with pytest.raises(UserError, match="the evaluation of depth lacks 'delta1'; it has abs_rel"):
        evaluated(Evaluation(dict(abs_rel=1.0), "", dict(images=1)))
    with pytest.raises(UserError, match="delta1 is a Tensor, a number or None is needed"):
        evaluated(Evaluation(dict(delta1=torch.ones(())), "", dict(images=1)))  # type: ignore[dict-item]
    assert evaluated(Evaluation(dict(delta1=None), "", dict(images=1))).metrics == dict(delta1=None)


def test_a_module_that_exits_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    assert run_command(monkeypatch, "--import", "leaves", "recipes") == 1


def test_the_page_shows_what_the_file_holds() -> None:
    """Each piece of a block, between empty lines and dots, as it is or as part of a class."""
    page, file = (EXAMPLES.parent / PAGE).read_text(), (EXAMPLES / "depth_task.py").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    pieces = [piece.strip("\n") for block in blocks for piece in re.split(r"\n\s*\.\.\.\n|\n\n", block)]
    assert len(blocks) >= 8 and len(pieces) >= len(blocks)
    for piece in pieces:
        indents = [textwrap.indent(piece, " " * width) + "\n" for width in (0, 4, 8)]
        assert any(f"\n{text}" in file for text in indents), piece


@pytest.mark.slow
def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    """As a reader types them, with a smaller network and one epoch."""
    folder = tmp_path / "examples"
    folder.mkdir()
    shutil.copy(EXAMPLES / "depth_task.py", folder)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", (EXAMPLES.parent / PAGE).read_text(), re.S)
    (folder / "depth.yaml").write_text(recipe)
    short = "--model conv2former_test --set decoder.channels=16 --set schedule.epochs=1 --set schedule.warmup_epochs=0"
    commands = [command.text for command in shown_commands() if command.document == PAGE]
    assert commands[:2] == ["cd examples", "python depth_task.py rooms"] and len(commands) >= 5
    script = "\n".join(f"{text} {short}" if " train " in text else text for text in commands)
    path = f"{sysconfig.get_path('scripts')}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, env=os.environ | dict(PATH=path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "painted" / "00.predicted.png").is_file() and (folder / "exported" / "model.onnx").is_file()
