"""Short runs for tests: started, stopped, killed, compared."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conv2former.engine import trainer as engine
from conv2former.engine.checkpointing import CheckpointManager
from conv2former.engine.run_dir import RunDir
from conv2former.engine.train import Interrupted, train
from conv2former.recipes import Recipe
from digits import TINY

TIMING = {"images_per_second", "data_wait", "memory_gb", "seconds"}
EVERYTHING = [
    *("augment.mixup=0.8", "augment.cutmix=1.0", "augment.random_erasing=0.25", "model.drop_path_rate=0.3"),
    "optim.ema_decay=0.9",
]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """What the run has left as its last weights."""
    return load_file(run / "last" / "model.safetensors")


def state(run: Path) -> dict[str, Any]:
    """The newest checkpoint."""
    return torch.load(CheckpointManager(run / "checkpoints").newest_first()[0], weights_only=True)


def assert_same_run(run: Path, other: Path) -> None:
    """The same weights to the last bit, best and last, and the same figures."""
    for folder in ("best", "last"):
        mine, theirs = (load_file(path / folder / "model.safetensors") for path in (run, other))
        assert mine.keys() == theirs.keys()
        different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
        assert not different, f"{folder}: {len(different)} of {len(mine)} tensors differ: {different[:3]}"
    rows = [[{k: v for k, v in row.items() if k not in TIMING} for row in RunDir(r).rows()] for r in (run, other)]
    assert rows[0] == rows[1]


def after_step(monkeypatch: pytest.MonkeyPatch, step: int, happens: Callable[[engine.Trainer], None]) -> None:
    """Something happens in the run once ``step`` steps are done."""
    original = engine.Trainer._step

    def stepping(self: engine.Trainer, *args: Any) -> None:
        original(self, *args)
        if self.state.step == step:
            happens(self)

    monkeypatch.setattr(engine.Trainer, "_step", stepping)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, signum: int = signal.SIGINT) -> None:
    """The run is asked to stop as by a signal once ``step`` steps are done."""
    after_step(monkeypatch, step, lambda trainer: setattr(trainer.stop, "signum", signum))


def stopped_run(recipe: Recipe, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *, step: int = 5) -> None:
    """A run that was stopped after ``step`` steps."""
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Interrupted):
            train(recipe, data=data, out=out)


def command(data: Path, out: Path, *overrides: str, options: tuple[str, ...] = ()) -> list[str]:
    """The tiny recipe as somebody would type it."""
    settings = [f"--set={override}" for override in [*TINY, *overrides]]
    program = [sys.executable, "-m", "conv2former_cli", "train", "--recipe=quickstart"]
    return [*program, f"--data={data}", f"--out={out}", *settings, *options]


def start(arguments: list[str], **options: Any) -> subprocess.Popen:
    """A command in a process group of its own."""
    return subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True, **options)


def wait_for(
    process: subprocess.Popen, out: Path, what: str = '"kind": "epoch"', count: int = 1, file: str = "metrics.jsonl"
) -> None:
    """Until the metrics of the run, or another file of it, hold something."""
    rows, deadline = out / file, time.monotonic() + 120
    while not (rows.exists() and rows.read_text().count(what) >= count):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be met"
        time.sleep(0.02)


def signal_all(process: subprocess.Popen, signum: int) -> None:
    """As a terminal or a scheduler does: to the workers too."""
    os.killpg(process.pid, signum)


def hooked(arguments: list[str]) -> list[str]:
    """The same command with the faults of ``hooked.py``."""
    return [arguments[0], str(Path(__file__).with_name("hooked.py")), *arguments[3:]]


def stat(pid: int) -> list[str]:
    """State, parent and so on of a process; empty where there is none."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def family(pid: int) -> list[int]:
    """A process and all that it has started."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdecimal() and (fields := stat(int(path.name))):
            children.setdefault(int(fields[1]), []).append(int(path.name))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found


def training(pid: int) -> list[int]:
    """The training processes of a run, the first one first; its readers are copies of them."""
    others = {}
    for member in family(pid)[1:]:
        with contextlib.suppress(OSError):
            variables = (Path("/proc") / str(member) / "environ").read_bytes().split(b"\0")
            rank = next((word for word in variables if word.startswith(b"LOCAL_RANK=")), b"")
            program = (Path("/proc") / str(member) / "cmdline").read_bytes()
            if rank and int(stat(member)[1]) == pid and b"watchdog" not in program:
                others[rank] = member
    return [pid, *(others[rank] for rank in sorted(others))]
