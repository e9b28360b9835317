"""A run that was stopped anywhere goes on as if nothing had happened."""

from __future__ import annotations

import functools
import json
import os
import pty
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conv2former.engine import trainer as engine
from conv2former.engine.checkpointing import CheckpointManager
from conv2former.engine.run_dir import RunDir
from conv2former.engine.signals import RESUME_ME, stops
from conv2former.engine.train import train
from conv2former.errors import UserError
from digits import tiny_recipe, write_digits
from runs import (
    EVERYTHING,
    assert_same_run,
    command,
    signal_all,
    start,
    state,
    stopped_run,
    wait_for,
)

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that is random, not interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(tiny_recipe(*EVERYTHING), data=data, out=out)
    return out


@pytest.fixture(scope="module")
def stopped(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that copies a run of the tiny recipe to a place: one that was stopped after ``step`` steps, once."""
    root = tmp_path_factory.mktemp("stopped")

    @functools.cache
    def made(step: int) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            stopped_run(tiny_recipe(), data, root / str(step), patch, step=step)
        return root / str(step)

    return lambda out, step=5: Path(shutil.copytree(made(step), out))


@pytest.mark.parametrize(("workers", "step"), [(0, 1), (0, 4), (2, 5), pytest.param(0, 6, marks=pytest.mark.slow)])
def test_a_stopped_run_continues_bit_for_bit(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, step: int
) -> None:
    recipe = tiny_recipe(*EVERYTHING, f"data.workers={workers}")
    stopped_run(recipe, data, tmp_path / "parts", monkeypatch, step=step)
    assert state(tmp_path / "parts")["position"]["step"] == step
    train(None, data=None, out=tmp_path / "parts", resume=True)
    assert_same_run(whole, tmp_path / "parts")


def test_a_stop_during_the_evaluation_loses_nothing(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the last step of the second epoch: the evaluation meets the stop first
    stopped_run(tiny_recipe(*EVERYTHING), data, tmp_path / "parts", monkeypatch, step=8)
    assert [row["epoch"] for row in RunDir(tmp_path / "parts").rows("epoch")] == [1]
    train(None, data=None, out=tmp_path / "parts", resume=True)
    assert_same_run(whole, tmp_path / "parts")


def test_accumulation_resumes(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe("optim.batch_size=8", "optim.global_batch=16", "schedule.epochs=2", *EVERYTHING)
    train(recipe, data=data, out=tmp_path / "whole")
    stopped_run(recipe, data, tmp_path / "parts", monkeypatch)
    train(None, data=None, out=tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


class Killed(BaseException):
    """Stands for SIGKILL where a test must say exactly when: nothing behind it is carried out."""


@pytest.mark.parametrize("moment", ["fsync", "before its digest", "after it"])
def test_killed_while_a_checkpoint_is_written(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The second epoch's: half a file beside the first epoch's whole one, or both whole."""
    from conv2former.engine import checkpointing as snapshots

    def die(*args: Any) -> None:
        raise Killed

    original = CheckpointManager.write

    def write(self: CheckpointManager, step: int, save: Any, *, first: bool) -> Any:
        if step == 8:
            if moment == "after it":
                original(self, step, save, first=first)
                raise Killed
            patch.setattr(snapshots, "flush" if moment == "fsync" else "replace_text", die)
        return original(self, step, save, first=first)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointManager, "write", write)
        with pytest.raises(Killed):
            train(tiny_recipe(*EVERYTHING), data=data, out=tmp_path / "parts")
    assert state(tmp_path / "parts")["position"]["step"] == (4 if moment == "fsync" else 8)
    train(None, data=None, out=tmp_path / "parts", resume=True)
    assert_same_run(whole, tmp_path / "parts")
    assert not list((tmp_path / "parts").rglob("*.partial"))


def test_killed_between_the_evaluation_and_its_checkpoint(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = engine.Trainer._evaluate

    def evaluate(self: engine.Trainer) -> None:
        original(self)
        if self.state.step == 8:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(engine.Trainer, "_evaluate", evaluate)
        with pytest.raises(Killed):
            train(tiny_recipe(*EVERYTHING), data=data, out=tmp_path / "parts")
    train(None, data=None, out=tmp_path / "parts", resume=True)
    assert_same_run(whole, tmp_path / "parts")


def test_a_killed_process_continues_bit_for_bit(data: Path, tmp_path: Path) -> None:
    """SIGKILL itself in the middle of an epoch; nothing is tidied up. ``make soak`` does it many times at random."""
    settings = ["schedule.epochs=8", "data.workers=2"]
    killed = start(command(data, tmp_path / "parts", *settings))
    wait_for(killed, tmp_path / "parts", count=2)
    signal_all(killed, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "parts" / "evaluation.json").exists()
    train(None, data=None, out=tmp_path / "parts", resume=True)
    train(tiny_recipe(settings[0]), data=data, out=tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("signum", "code"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        (signal.SIGTERM, RESUME_ME),
        pytest.param(signal.SIGUSR1, RESUME_ME, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, RESUME_ME, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_says_how_to_go_on(data: Path, tmp_path: Path, signum: signal.Signals, code: int) -> None:
    run = start(command(data, tmp_path / "run", "schedule.epochs=2000", "data.workers=2"))
    wait_for(run, tmp_path / "run")
    signal_all(run, signum)
    if signum == signal.SIGUSR1:  # which a scheduler may send again, while the state is being written
        signal_all(run, signum)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == code
    assert "Traceback" not in errors
    assert errors.rstrip().endswith(f"continue with: conv2former train --out {tmp_path / 'run'} --resume")
    assert f"stopped at step {state(tmp_path / 'run')['position']['step']}," in errors


@pytest.mark.slow
def test_a_terminal_that_closes_saves_the_run(data: Path, tmp_path: Path) -> None:
    """SIGHUP, and from then on an error for whatever is printed, of the bar too."""
    words = command(data, tmp_path / "run", "schedule.epochs=2000", "data.workers=0")
    child, terminal = pty.fork()
    if not child:
        os.execv(words[0], words)
    rows, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (rows.exists() and '"kind": "epoch"' in rows.read_text()):
        assert time.monotonic() < deadline and os.read(terminal, 65536)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == RESUME_ME
    history = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    step = state(tmp_path / "run")["position"]["step"]
    assert f"stopped at step {step}, state saved" in json.loads(history[-1])["reason"]


def test_a_run_under_nohup_and_one_in_the_background_keep_their_signals() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert stops() == [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in stops()
    finally:
        for number, handler in zip((signal.SIGHUP, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)


def test_the_last_two_checkpoints_are_kept(finished: Path) -> None:
    assert [path.name for path in CheckpointManager(finished / "checkpoints").newest_first()] == [
        "save-000003-step-00000012.ckpt",
        "save-000002-step-00000008.ckpt",
    ]
    assert len(list((finished / "checkpoints").iterdir())) == 4  # each with its digest


def test_checkpoints_come_by_the_clock_too(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    original = CheckpointManager.write

    def write(self: CheckpointManager, step: int, save: Any, *, first: bool) -> Any:
        written.append(step)
        return original(self, step, save, first=first)

    monkeypatch.setattr(CheckpointManager, "write", write)
    short = ["schedule.epochs=2", "engine.checkpoint_minutes=1e-9"]
    train(tiny_recipe(*short), data=data, out=tmp_path / "often")
    assert written == list(range(9))
    written.clear()
    # an epoch that is not evaluated is saved all the same
    train(tiny_recipe("schedule.eval_every=2"), data=data, out=tmp_path / "epochs")
    assert written == [0, 4, 8, 12]


@pytest.mark.parametrize("damage", ["cut off", "a flipped bit", pytest.param("empty", marks=pytest.mark.slow)])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture, damage: str
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    newest = CheckpointManager(tmp_path / "run" / "checkpoints").newest_first()[0]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 4
    newest.write_bytes({"cut off": content[:1000], "a flipped bit": content, "empty": b""}[damage])
    train(None, data=None, out=tmp_path / "run", resume=True)
    assert f"{newest} is damaged" in capsys.readouterr().err
    assert_same_run(finished, tmp_path / "run")
    assert newest.with_name(newest.name + ".damaged").exists()
    assert (
        len(CheckpointManager(tmp_path / "run" / "checkpoints").newest_first()) == 2
    )  # which the damaged one is none of


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run but its lock and its history, which says what was tried."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name not in (".lock", "history.jsonl")]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def cut(run: Path) -> None:
    """Cuts all checkpoints short."""
    for path in CheckpointManager(run / "checkpoints").newest_first():
        path.write_bytes(path.read_bytes()[:1000])


def rename(run: Path) -> None:
    """As after a resume that found them damaged."""
    for path in CheckpointManager(run / "checkpoints").newest_first():
        path.rename(path.with_name(path.name + ".damaged"))


def remove(run: Path) -> None:
    """Removes all checkpoints."""
    shutil.rmtree(run / "checkpoints")


def keep_weights(run: Path) -> None:
    """Leaves the weights alone."""
    remove(run)
    (run / "metrics.jsonl").unlink()


def keep_rows(run: Path) -> None:
    """Leaves the figures alone."""
    remove(run)
    shutil.rmtree(run / "best")
    shutil.rmtree(run / "last")


@pytest.mark.parametrize("loss", [cut, rename, remove, keep_weights, keep_rows])
def test_a_run_without_readable_checkpoints_is_not_trained_anew(
    data: Path, tmp_path: Path, stopped: Callable[..., Path], loss: Callable[[Path], None]
) -> None:
    run = stopped(tmp_path / "run")
    loss(run)
    before = contents(run)
    for resume in (True, "auto", "auto"):
        recipe: Any = tiny_recipe() if resume == "auto" else None
        with pytest.raises(UserError, match=r"copy one back .*--overwrite") as error:
            train(recipe, data=data, out=run, resume=resume)  # type: ignore[arg-type]
        assert "\n" not in str(error.value) and contents(run) == before
    short = tiny_recipe("schedule.epochs=1", "schedule.warmup_epochs=0")
    assert train(short, data=data, out=run, overwrite=True)


def test_half_a_run_is_not_taken_for_the_beginning_of_one(
    data: Path, tmp_path: Path, stopped: Callable[..., Path]
) -> None:
    run = stopped(tmp_path / "run")
    for path in [*run.iterdir()]:
        if path.name not in ("recipe.yaml", "checkpoints"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(run)
    with pytest.raises(UserError, match="is not a run"):
        train(tiny_recipe(), data=data, out=run, resume="auto")
    assert contents(run) == before


def test_a_finished_run_without_checkpoints_is_evaluated(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    remove(tmp_path / "run")
    result = train(None, data=None, out=tmp_path / "run", resume=True)
    assert result is not None and result.details["images"] == 16
    assert "its best weights are evaluated" in capsys.readouterr().err
    assert_same_run(finished, tmp_path / "run")
    with pytest.raises(UserError, match="no checkpoint is left"):
        train(tiny_recipe("schedule.epochs=4"), data=None, out=tmp_path / "run", resume=True, force=True)


def test_a_checkpoint_without_its_digest_is_said(
    tmp_path: Path, stopped: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    stopped(tmp_path / "run")
    newest = CheckpointManager(tmp_path / "run" / "checkpoints").newest_first()[0]
    newest.with_suffix(".sha256").unlink()
    train(None, data=None, out=tmp_path / "run", resume=True)
    assert f"{newest} has no {newest.stem}.sha256 beside it" in capsys.readouterr().err


@pytest.mark.slow
def test_resume_auto_starts_and_continues_by_the_same_command(data: Path, tmp_path: Path) -> None:
    arguments = command(data, tmp_path / "run", options=("--resume", "auto"))
    killed = start(arguments)
    wait_for(killed, tmp_path / "run")
    signal_all(killed, signal.SIGKILL)
    killed.wait()
    answers = [subprocess.run(arguments, capture_output=True, text=True) for _ in range(2)]
    assert all(answer.returncode == 0 and "top-1" in answer.stdout for answer in answers), answers[0].stderr
    events = [row["event"] for row in map(json.loads, (tmp_path / "run" / "history.jsonl").open())]
    assert events == ["started", "resumed", "finished", "resumed", "finished"]


def test_a_folder_that_was_left_before_it_was_a_run_is_started_anew(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text("name: half")
    (tmp_path / "run" / "run.json.partial").write_text("{")
    result = train(tiny_recipe("schedule.epochs=2"), data=data, out=tmp_path / "run", resume="auto")
    assert result is not None


def test_a_finished_run_resumes_to_its_report(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    result = train(None, data=None, out=tmp_path / "run", resume=True)
    assert result is not None and result.details["images"] == 16
    assert_same_run(finished, tmp_path / "run")


def test_another_recipe_is_refused_with_the_difference(finished: Path) -> None:
    with pytest.raises(UserError, match=r"optim.weight_decay: run 0.05, given 0.1.*--force"):
        train(tiny_recipe("optim.weight_decay=0.1"), data=None, out=finished, resume=True)


def test_what_moves_no_weight_may_change(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_run(tiny_recipe(*EVERYTHING), data, tmp_path / "run", monkeypatch)
    changed = tiny_recipe(*EVERYTHING, "data.workers=1", "data.on_bad_image=skip", "engine.checkpoint_minutes=1")
    train(changed, data=None, out=tmp_path / "run", resume=True)
    assert_same_run(whole, tmp_path / "run")


def test_forced_to_go_on_with_another_recipe(tmp_path: Path, stopped: Callable[..., Path]) -> None:
    stopped(tmp_path / "run")
    longer = tiny_recipe("optim.base_lr=5e-4", "schedule.epochs=4")
    train(longer, data=None, out=tmp_path / "run", resume=True, force=True)
    run = RunDir(tmp_path / "run")
    assert run.recipe() == longer and run.facts()["recipe_hash"] == longer.digest()
    assert [row["epoch"] for row in run.rows("epoch")] == [1, 2, 3, 4]
    assert "epochs: 3" in (tmp_path / "run" / "recipes" / "recipe.1.yaml").read_text()
    assert "schedule.epochs: run 3, given 4" in (tmp_path / "run" / "history.jsonl").read_text()


def test_killed_between_the_two_files_of_a_change(
    finished: Path, tmp_path: Path, stopped: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is what it was before; what was forced can be forced again."""
    run = RunDir(stopped(tmp_path / "run", 6))
    changed: Any = dict(recipe=tiny_recipe("optim.batch_size=8"), data=None, resume=True, force=True)

    class Killed(BaseException): ...

    def kill(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunDir, "write_json", kill)
        train(out=run.path, **changed)
    assert "batch_size: 8" in (run.path / "recipe.yaml").read_text() and run.recipe() == tiny_recipe()
    shutil.copytree(run.path, tmp_path / "again")
    train(None, data=None, out=run.path, resume=True)
    assert_same_run(finished, run.path)
    train(out=tmp_path / "again", **changed)
    assert [row["step"] for row in RunDir(tmp_path / "again").rows("epoch")] == [8, 16, 24]
    assert RunDir(tmp_path / "again").recipe() == changed["recipe"]


@pytest.mark.parametrize("batch", [8, 32])
def test_forced_to_another_batch_the_run_goes_on_where_it_was_in_the_data(
    tmp_path: Path, stopped: Callable[..., Path], batch: int
) -> None:
    stopped(tmp_path / "run", 6)  # in the middle of the second epoch
    train(tiny_recipe(f"optim.batch_size={batch}"), data=None, out=tmp_path / "run", resume=True, force=True)
    rows, steps = RunDir(tmp_path / "run").rows("epoch"), 64 // batch
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, steps), (2, 2 * steps), (3, 3 * steps)]
    # the newest checkpoint is the last one written, whatever number its step has
    assert state(tmp_path / "run")["position"]["step"] == 3 * steps


def test_forced_settings_reach_the_optimizer(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(finished, tmp_path / "run")
    recipe = tiny_recipe("optim.weight_decay=0.5", "optim.betas=[0.8,0.9]", "schedule.epochs=4")
    train(recipe, data=None, out=tmp_path / "run", resume=True, force=True)
    groups = state(tmp_path / "run")["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}
    assert all(tuple(group["betas"]) == (0.8, 0.9) for group in groups)


def test_forced_to_fewer_epochs_than_are_done(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(UserError, match=r"has done 3 epochs and the recipe ends after 2 epochs: raise schedule.epochs"):
        train(tiny_recipe("schedule.epochs=2"), data=None, out=tmp_path / "run", resume=True, force=True)
    train(None, data=None, out=tmp_path / "run", resume=True)  # the run's own recipe is as it was
    assert_same_run(finished, tmp_path / "run")


def test_an_evaluation_that_is_done_twice_leaves_one_row(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the evaluation, continued, killed between its row and its checkpoint."""
    stopped_run(tiny_recipe(*EVERYTHING), data, tmp_path / "parts", monkeypatch, step=8)
    original = engine.Trainer._evaluate

    def evaluate(self: engine.Trainer) -> None:
        original(self)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(engine.Trainer, "_evaluate", evaluate)
        with pytest.raises(Killed):
            train(None, data=None, out=tmp_path / "parts", resume=True)
    train(None, data=None, out=tmp_path / "parts", resume=True)
    assert_same_run(whole, tmp_path / "parts")


@pytest.mark.slow
def test_two_processes_do_not_train_in_one_folder(data: Path, tmp_path: Path) -> None:
    first = start(command(data, tmp_path / "run", "schedule.epochs=2000"))
    wait_for(first, tmp_path / "run")
    for options in (dict(resume=True), dict(overwrite=True)):
        with pytest.raises(UserError, match="another process is training in"):
            train(tiny_recipe("schedule.epochs=2000"), data=data, out=tmp_path / "run", **options)
    assert first.poll() is None
    signal_all(first, signal.SIGKILL)
    first.wait()
    train(tiny_recipe("schedule.epochs=2"), data=data, out=tmp_path / "run", overwrite=True)


@pytest.mark.parametrize(
    "setting",
    [
        *("model.args.depths=[1,1,3,1]", "optim.name=sgd", "optim.ema_decay=0.9", "optim.layer_decay=0.8"),
        "optim.weight_decay=0",
    ],
)
def test_not_even_forced_to_another_network(finished: Path, setting: str) -> None:
    with pytest.raises(UserError, match=r"cannot change in a run"):
        train(tiny_recipe(setting), data=None, out=finished, resume=True, force=True)


def test_a_resumed_run_needs_its_first_weights_no_more(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished / "best", tmp_path / "weights")
    recipe = tiny_recipe(f"model.weights={tmp_path / 'weights'}", "model.args={}")
    stopped_run(recipe, data, tmp_path / "run", monkeypatch)
    shutil.rmtree(tmp_path / "weights")
    result = train(None, data=None, out=tmp_path / "run", resume=True)
    assert result is not None and result.details["images"] == 16


def test_other_images_are_refused_unless_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_digits(tmp_path / "data")
    stopped_run(tiny_recipe(), data, tmp_path / "run", monkeypatch)
    victim = next((data / "train" / "digit-1").iterdir())
    content = victim.read_bytes()
    victim.unlink()
    with pytest.raises(UserError, match=r"started with images .*'train': 64.*now they are .*'train': 63.*--force"):
        train(None, data=None, out=tmp_path / "run", resume=True)
    victim.with_name("other.png").write_bytes(content)
    with pytest.raises(UserError, match="started with other files"):
        train(None, data=None, out=tmp_path / "run", resume=True)
    train(None, data=None, out=tmp_path / "run", resume=True, force=True)
    shutil.rmtree(data / "train" / "digit-3")
    shutil.rmtree(data / "val" / "digit-3")
    with pytest.raises(UserError, match="started with classes"):
        train(None, data=None, out=tmp_path / "run", resume=True, force=True)
