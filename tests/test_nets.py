"""Nothing changes unnoticed: results, checkpoints, commands, and the runs of an earlier release (``nets.py``)."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

import nets
from conv2former.engine.evaluate import evaluate
from conv2former.engine.predict import predict
from conv2former.engine.train import train
from conv2former.tools.explain.maps import run_maps
from conv2former.tools.export import ExportOptions, export

SLOW = pytest.mark.slow


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW if name == "quickstart" else ()) for name in nets.recipes()]
)
def test_the_same_losses_and_weights_as_before(name: str, tmp_path: Path) -> None:
    """To the last bit on the machine that stored them, and to 1e-4 elsewhere (44 steps with AVX2 end 3e-5 apart)."""
    stored = nets.stored("losses")
    run = nets.trained(name, tmp_path)
    before, now = stored["runs"][name], nets.outcome(run)
    if stored["machine"] == nets.machine():
        assert now == before
    for row, earlier in zip(now["rows"], before["rows"], strict=True):
        assert row.keys() == earlier.keys()
        for key, value in row.items():
            loss = key in ("loss", "train_loss", "val_loss", "lr")
            assert value == (pytest.approx(earlier[key], rel=1e-4) if loss else earlier[key]), key
    if name != "quickstart":
        assert nets.checkpoint_keys(run) == nets.stored("checkpoints")[name]


def test_the_same_commands_options_and_defaults() -> None:
    assert nets.command_line() == nets.stored("command_line")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The stopped runs of an earlier release, and their images."""
    root = tmp_path_factory.mktemp("earlier")
    with tarfile.open(nets.ASSETS / "runs.tar.xz") as archive:
        archive.extractall(root, filter="data")
    return root, nets.write_data(root / "data")


def first_picture(folder: Path) -> Path:
    return next(path for path in sorted(folder.rglob("*.png")) if "masks" not in path.parts)


@pytest.mark.parametrize(  # the others load as they do for the test below
    "task", ["classification", *(pytest.param(task, marks=SLOW) for task in ("detection", "segmentation"))]
)
def test_a_run_of_an_earlier_release_is_exported(task: str, earlier: Any, tmp_path: Path) -> None:
    root, data = earlier
    kind = "runtime" if task == "classification" else "torch"  # the quickest that the task has
    options = ExportOptions((kind,), [first_picture(data[task])], size=(64, 64))
    (exported,) = export(str(root / task), tmp_path / "exported", options)
    assert exported.ok


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_a_run_of_an_earlier_release_works(
    task: str, earlier: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if task != "classification":  # whose figures those of the others are
        request.getfixturevalue("quick")
    root, data = earlier
    run, folder = root / task, data[task]
    picture = first_picture(folder)
    (found,) = predict(run, [picture])
    assert found["ok"]
    evaluation, _ = evaluate(run, data=folder, workers=0)
    assert evaluation.details["images"] > 0
    assert run_maps(run, [picture], out=tmp_path / "maps") == 0
    before = torch.load(next((run / "checkpoints").glob("*.ckpt")), weights_only=True)["position"]
    assert train(None, data=folder, out=run, resume=True) is not None
    after = torch.load(max((run / "checkpoints").glob("*.ckpt")), weights_only=True)["position"]
    assert after["step"] > before["step"] and after["steps_per_epoch"] == before["steps_per_epoch"]
    assert (run / "evaluation.json").is_file() and (run / "best" / "README.md").is_file()
