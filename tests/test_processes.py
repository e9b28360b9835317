"""Several processes: the arithmetic of one, exact counts, and nobody waits for the dead."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conv2former.engine.batch import plan_batch, recorded_batch
from conv2former.engine.launch import make_fabric
from conv2former.engine.resuming import resumed_batch
from conv2former.engine.run_dir import RunDir
from conv2former.engine.signals import RESUME_ME
from conv2former.engine.train import train
from conv2former.errors import UserError
from digits import tiny_recipe, write_digits
from runs import EVERYTHING, TIMING, command, family, signal_all, start, state, stopped_run, wait_for, weights
from scenes import write_coco

pytestmark = pytest.mark.usefixtures("quick")

# the same sixteen images per step, however they are dealt out
PLAIN = ["optim.batch_size=16", "optim.global_batch=16", "model.drop_path_rate=0"]
TWO = [*PLAIN, "engine.devices=2", "engine.sync_batchnorm=true"]
# The same numbers are added in another order, so the last bits of float32 (6e-8) differ and grow a little with each of
# the twelve steps: 4e-8 was found after eighteen.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 validation images less one: two processes cannot share them evenly."""
    data = write_digits(tmp_path_factory.mktemp("uneven"), val=5)
    next((data / "val" / "digit-3").iterdir()).unlink()
    return data


@pytest.fixture(scope="module")
def one(uneven: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "one"
    train(tiny_recipe(*PLAIN), data=uneven, out=out)
    return out


def run(arguments: list[str]) -> str:
    answer = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0 and len(re.findall("top-1|box AP", answer.stdout)) == 1, answer.stderr
    return answer.stderr


def assert_same_figures(mine: Path, theirs: Path) -> None:
    for row, other in zip(RunDir(mine).rows(), RunDir(theirs).rows(), strict=True):
        assert row.keys() == other.keys()
        for key in row.keys() - TIMING - {"kind"}:
            assert row[key] == pytest.approx(other[key], rel=TOLERANCE), key
    for name, tensor in weights(mine).items():
        torch.testing.assert_close(tensor, weights(theirs)[name], rtol=1e-3, atol=1e-5)


def assert_all_are_counted(errors: str, out: Path) -> None:
    """Every validation image once, in the loop and in the report."""
    assert "of 19 images)" in errors and json.loads((out / "evaluation.json").read_text())["images"] == 19


@pytest.mark.slow
def test_two_processes_are_one(one: Path, uneven: Path, tmp_path: Path) -> None:
    errors = run(command(uneven, tmp_path / "two", *TWO))
    assert "batch 8 x 2 processes x 1 accumulated = 16" in errors
    assert_same_figures(one, tmp_path / "two")
    assert_all_are_counted(errors, tmp_path / "two")


@pytest.mark.slow
def test_sharded_weights_are_the_same_weights(one: Path, uneven: Path, tmp_path: Path) -> None:
    run(command(uneven, tmp_path / "sharded", *TWO, "engine.strategy=fsdp"))
    assert_same_figures(one, tmp_path / "sharded")


@pytest.mark.slow
def test_a_sharded_detector_learns_the_same(tmp_path: Path) -> None:
    """Its heads are not called as modules: FSDP shards the blocks of its backbone."""
    coco = write_coco(tmp_path / "coco", train=9)
    for name, settings in (("whole", []), ("sharded", ["--set=engine.strategy=fsdp"])):
        words = [sys.executable, "-m", "conv2former_cli", "train", "--recipe=smoke_detection", f"--data={coco}"]
        words += [f"--out={tmp_path / name}", "--set=engine.devices=2", "--set=engine.accelerator=cpu", *settings]
        run(words)
    assert_same_figures(tmp_path / "whole", tmp_path / "sharded")


@pytest.mark.parametrize(
    "settings",
    [["model.name=test_convnext", "model.args={}", "data.input_size=32"], pytest.param([], marks=pytest.mark.slow)],
)
def test_accumulation_is_the_large_batch(uneven: Path, tmp_path: Path, settings: list[str]) -> None:
    """To rounding without batch norm; with it (Conv2Former's stem) each part is normalised by its own statistics."""
    whole, parts = tiny_recipe(*PLAIN, *settings), tiny_recipe(*PLAIN, *settings, "optim.batch_size=4")
    train(whole, data=uneven, out=tmp_path / "whole")
    train(parts, data=uneven, out=tmp_path / "parts")
    losses = [[row["loss"] for row in RunDir(tmp_path / name).rows("step")] for name in ("whole", "parts")]
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE if settings else 0.05)
    assert losses[0] != losses[1] or settings


ELASTIC = [*EVERYTHING, "optim.batch_size=4", "optim.global_batch=16", "optim.clip_grad=1", "engine.precision=64"]


def assert_equal_in_double(mine: Path, theirs: Path) -> None:
    """To 1e-9: the same images, augmentation, MixUp, drop path and running statistics; sums have another order."""
    for row, other in zip(RunDir(mine).rows(), RunDir(theirs).rows(), strict=True):
        for key in row.keys() - TIMING - {"kind"}:
            assert row[key] == pytest.approx(other[key], rel=1e-9), key
    for name, tensor in weights(mine).items():
        torch.testing.assert_close(tensor, weights(theirs)[name], rtol=1e-9, atol=1e-9)


def go_on(out: Path, processes: int, *settings: str) -> list[str]:
    program = [sys.executable, "-m", "conv2former_cli", "train", f"--out={out}", "--resume"]
    return [*program, f"--set=engine.devices={processes}", *(f"--set={setting}" for setting in settings)]


def test_a_run_goes_on_with_another_number_of_processes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_recipe(*ELASTIC), data=data, out=tmp_path / "whole")
    stopped_run(tiny_recipe(*ELASTIC), data, tmp_path / "parts", monkeypatch)
    run(go_on(tmp_path / "parts", 2))
    assert_equal_in_double(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("readers", [0, 2])
def test_a_run_goes_on_with_four_two_and_one_process(data: Path, tmp_path: Path, readers: int) -> None:
    settings = [*ELASTIC, "schedule.epochs=25", f"data.workers={readers}"]
    run(command(data, tmp_path / "whole", *settings))
    process = start(command(data, tmp_path / "parts", *settings, "engine.devices=4"))
    for count, processes in ((2, 1), (7, 2), (13, 4), (19, 2)):
        wait_for(process, tmp_path / "parts", count=count)
        signal_all(process, signal.SIGTERM)
        assert process.communicate(timeout=60)[0] is None and process.returncode == RESUME_ME
        process = start(go_on(tmp_path / "parts", processes))
    assert not process.wait(timeout=120)
    assert len(RunDir(tmp_path / "whole").rows("epoch")) == 25
    assert_equal_in_double(tmp_path / "whole", tmp_path / "parts")


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    run_dir, recipe = RunDir(tmp_path), tiny_recipe(*ELASTIC)
    now = recorded_batch(plan_batch(recipe, world=2))
    share = functools.partial(resumed_batch, run_dir, own=recipe, recipe=recipe, force=False)
    assert [share(dict(processes=2, batch=now), world=n).accumulate for n in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(UserError, match=r"with 3: an optimizer step has 4 micro-batches; resume it on 1, 2, 4, or"):
        share(dict(processes=2, batch=now), world=3)
    synchronised = tiny_recipe(*ELASTIC, "engine.sync_batchnorm=true")
    with pytest.raises(UserError, match=r"engine.sync_batchnorm normalises over .*; resume it on 2, or"):
        share(dict(processes=2, batch=now), world=1, own=synchronised, recipe=synchronised)
    # runs of versions before: the random choices of one process are the same, those of several are the processes' own
    assert share(dict(processes=1), world=4).key(0, 3) == (3, 0)
    assert share(dict(processes=2), world=2).key(1, 1) == (1, 1)
    with pytest.raises(UserError, match=r"version of the package .*; resume it on 2, or"):
        share(dict(processes=2), world=1)


@pytest.mark.slow
def test_two_processes_stop_together_and_torchrun_continues_them(data: Path, tmp_path: Path) -> None:
    settings = [*TWO, *EVERYTHING, "model.drop_path_rate=0.3", "schedule.epochs=8", "data.workers=1"]
    run(command(data, tmp_path / "whole", *settings))
    stopped = start(command(data, tmp_path / "run", *settings))
    wait_for(stopped, tmp_path / "run")
    signal_all(stopped, signal.SIGTERM)
    _, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == RESUME_ME and "Traceback" not in errors and errors.count("state saved") == 1
    assert 4 <= state(tmp_path / "run")["position"]["step"] < 32
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29731"]
    run([*torchrun, "-m", "conv2former_cli", "train", f"--out={tmp_path / 'run'}", "--resume"])
    mine, theirs = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def agent(arguments: list[str], port: int) -> subprocess.Popen:
    """One of the machines that torchrun may use; here all of them are this one."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:4", "--nproc-per-node=1", "--max-restarts=9"]
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-conf=last_call_timeout=3"]
    return start([*torchrun, *rendezvous, *arguments[1:]])


@pytest.mark.slow
def test_torchrun_goes_on_when_a_machine_is_lost(data: Path, tmp_path: Path) -> None:
    """It starts the run again on the two that are left."""
    settings = [*ELASTIC, "schedule.epochs=50", "engine.devices=auto", "optim.global_batch=24"]
    arguments = command(data, tmp_path / "run", *settings, options=("--resume", "auto"))
    agents = [agent(arguments, 29767) for _ in range(3)]
    wait_for(agents[0], tmp_path / "run", count=3)
    for pid in family(agents[2].pid):
        os.kill(pid, signal.SIGKILL)
    assert [process.wait(timeout=200) for process in agents] == [0, 0, -signal.SIGKILL]
    assert '"processes: 3, now 2"' in (tmp_path / "run" / "history.jsonl").read_text()
    train(tiny_recipe(*settings), data=data, out=tmp_path / "whole")
    assert_equal_in_double(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_slurm_starts_the_processes(one: Path, uneven: Path, tmp_path: Path) -> None:
    """Two processes with the variables that srun gives to two tasks on one machine."""
    slurm = dict(
        SLURM_JOB_ID="7", SLURM_JOB_NAME="train", SLURM_NODELIST="localhost", SLURM_NNODES="1", SLURM_NODEID="0"
    )
    tasks = dict(SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="2", SLURM_STEP_NUM_TASKS="2")
    tasks |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29741")
    arguments = command(uneven, tmp_path / "run", *PLAIN, "engine.sync_batchnorm=true", "engine.devices=auto")
    processes = [
        start(arguments, env=os.environ | slurm | tasks | dict(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)))
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert "batch 8 x 2 processes" in errors[0] and not errors[1].strip()
    assert_same_figures(one, tmp_path / "run")
    assert_all_are_counted(errors[0], tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["first", "second"])
def test_when_one_is_killed_the_other_stops_with_a_line(data: Path, tmp_path: Path, victim: str) -> None:
    process = start(command(data, tmp_path / "run", *TWO, "schedule.epochs=2000"))
    wait_for(process, tmp_path / "run", count=2)
    children = (Path("/proc") / str(process.pid) / "task" / str(process.pid) / "children").read_text().split()
    second = next(int(pid) for pid in children if b"conv2former_cli" in (Path("/proc") / pid / "cmdline").read_bytes())
    os.kill(process.pid if victim == "first" else second, signal.SIGKILL)
    started = time.monotonic()
    _, errors = process.communicate(timeout=60)  # until both have closed their end
    assert time.monotonic() - started < 60 and process.returncode != 0
    last = errors.rstrip().splitlines()[-1]
    assert last.startswith("error: ") and "--resume" in last and "Traceback" not in errors, errors
    assert state(tmp_path / "run")["position"]["step"] >= 4


@pytest.mark.slow
def test_an_image_that_one_process_cannot_read_ends_both_in_one_line(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "data")
    (data / "train" / "digit-2" / "broken.png").write_bytes(b"")
    answer = subprocess.run(command(data, tmp_path / "run", *TWO), capture_output=True, text=True, timeout=120)
    assert answer.returncode == 1 and "Traceback" not in answer.stderr
    assert [line.split(":")[0] for line in answer.stderr.splitlines()].count("error") == 1
    assert "broken.png" in answer.stderr.splitlines()[-1]
    assert state(tmp_path / "run")["position"]["step"] < 4


@pytest.mark.slow
def test_what_the_first_alone_meets_ends_all(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    answer = subprocess.run(command(data, tmp_path / "run", *TWO), capture_output=True, text=True, timeout=120)
    assert answer.returncode == 1 and "Traceback" not in answer.stderr
    assert "exists and is not a run" in answer.stderr


def test_a_port_that_is_none_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "abc")
    with pytest.raises(UserError, match="MASTER_PORT=abc in the environment is no port"):
        make_fabric(tiny_recipe("engine.devices=2", "engine.accelerator=cpu"))
