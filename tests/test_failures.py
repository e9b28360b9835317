"""What goes wrong in a run ends in one line, and nothing is lost or poisoned."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from command import run_command
from conv2former.checkpoints import load_pretrained
from conv2former.engine import trainer as engine
from conv2former.engine.checkpointing import CheckpointManager
from conv2former.engine.evaluate import evaluate
from conv2former.engine.run_dir import RunDir
from conv2former.engine.train import Interrupted, train
from conv2former.errors import UserError
from conv2former.files import append_line, read_lines
from conv2former.tasks.classification.task import ClassificationTask
from digits import tiny_recipe, write_digits
from runs import after_step, state, stop_at

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A data folder in which two training images and a validation image cannot be read."""
    data = write_digits(tmp_path / "data")
    for folder in ("train/digit-1", "train/digit-2", "val/digit-0"):
        sorted((data / folder).iterdir())[1].write_bytes(b"\x89PNG\r\n\x1a\n")
    return data


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_ends_the_run_with_its_name_and_a_checkpoint(
    damaged: Path, tmp_path: Path, workers: int
) -> None:
    advice = (
        r"repair or replace the file, then continue with `.* --resume` \(--on-bad-image skip leaves such images out\)$"
    )
    with pytest.raises(UserError, match=rf"cannot read .*digit-\d.*png.*: {advice}"):
        train(tiny_recipe(f"data.workers={workers}"), data=damaged, out=tmp_path / "run")
    assert state(tmp_path / "run")["position"]["step"] < 4


def test_broken_images_are_listed_and_passed_over(damaged: Path, tmp_path: Path) -> None:
    result = train(tiny_recipe("data.on_bad_image=skip", "data.workers=2"), data=damaged, out=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "bad_images.jsonl").open()]
    assert sorted(Path(row["file"]).parent.name for row in rows) == ["digit-0", "digit-1", "digit-2"]
    assert all(row["reason"] for row in rows)
    assert result is not None and result.details["images"] == 15  # one of sixteen does not count
    assert (tmp_path / "run" / "predictions.png").exists()


def test_a_run_that_met_a_broken_image_goes_on_when_told_to_skip(
    damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="cannot read"):
        train(tiny_recipe(), data=damaged, out=tmp_path / "run")
    words = ["train", f"--out={tmp_path / 'run'}", "--resume", "--on-bad-image=skip"]
    assert run_command(monkeypatch, *words) == 0
    assert "of 15 images" in capfd.readouterr().out


def test_too_many_broken_images_end_the_run(damaged: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("data.on_bad_image=skip", "data.max_bad_images=1")
    with pytest.raises(UserError, match=r"2 images cannot be read, more than data.max_bad_images"):
        train(recipe, data=damaged, out=tmp_path / "run")
    assert CheckpointManager(tmp_path / "run" / "checkpoints").newest_first()


def test_a_picture_beyond_the_limit_counts_as_broken(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "data")
    Image.new("L", (400, 300)).save(data / "train" / "digit-0" / "large.png")
    with pytest.raises(UserError, match=r"large.png: its 400 x 300 pixels are more than the limit of 100,000"):
        train(tiny_recipe("data.max_pixels=100000"), data=data, out=tmp_path / "run")
    train(tiny_recipe("data.max_pixels=120000", "schedule.epochs=2"), data=data, out=tmp_path / "other")


def test_an_evaluation_can_leave_out_what_cannot_be_read(finished: Path, damaged: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        evaluate(finished / "best", data=damaged, workers=0)
    result, _ = evaluate(finished / "best", data=damaged, workers=0, on_bad_image="skip")
    assert result.details["images"] == 15 and len(result.records.predicted) == 15


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The losses of some steps are not finite, and what the batch norms saw in them is not either."""
    original, number = ClassificationTask.training_step, itertools.count()

    def step(self: ClassificationTask, batch: Any) -> Tensor:
        loss = original(self, batch)
        if not isinstance(loss, FakeTensor) and next(number) in steps:  # the trial before the first step is none
            self.model.stem.norm1.running_mean.data.fill_(float("nan"))
            return loss * float("inf")
        return loss

    monkeypatch.setattr(ClassificationTask, "training_step", step)


def test_a_step_whose_loss_is_not_finite_is_skipped_and_counted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 2, 5, 6)
    result = train(tiny_recipe("engine.max_skipped_steps=3"), data=data, out=tmp_path / "run")
    run = RunDir(tmp_path / "run")
    assert [row["skipped"] for row in run.rows("epoch")] == [1, 3, 3]
    rows = [json.loads(line) for line in run.skipped_steps_jsonl.open()]
    assert [row["step"] for row in rows] == [3, 6, 7] and all(len(row["files"]) == 16 for row in rows)
    assert all((data / "train" / name).is_file() for name in rows[0]["files"])
    assert all(torch.isfinite(t).all() for t in load_pretrained(tmp_path / "run").state_dict().values())
    assert result is not None and result.details["top1"] > 50


def test_a_skipped_step_changes_nothing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 2)
    same: list[bool] = []
    original = engine.Trainer._step

    def everything(self: engine.Trainer) -> list[Tensor]:
        moments = [value for entry in self.optimizer.state.values() for value in entry.values()]
        return [tensor.clone() for tensor in [*self.task.state_dict().values(), *moments]]

    def watched(self: engine.Trainer, *args: Any) -> None:
        before = everything(self)
        original(self, *args)
        if self.state.step in (3, 4):
            same.append(all(map(torch.equal, before, everything(self))))

    monkeypatch.setattr(engine.Trainer, "_step", watched)
    train(tiny_recipe("schedule.epochs=2"), data=data, out=tmp_path / "run")
    assert same == [True, False]


def test_too_many_in_a_row_end_the_run_with_what_it_knows(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, *range(5, 12))
    with pytest.raises(UserError, match=r"in 3 steps in a row, up to step 8 \(learning rate .*digit-\d") as error:
        train(tiny_recipe("engine.max_skipped_steps=3"), data=data, out=tmp_path / "run")
    assert "--resume --force" in str(error.value)
    assert state(tmp_path / "run")["position"]["step"] == 4
    assert all(torch.isfinite(t).all() for t in load_pretrained(tmp_path / "run").state_dict().values())


def test_steps_that_are_skipped_replace_no_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their weights may be the reason. The command that is printed goes on, and has as many attempts as the first."""
    settings = ["engine.max_skipped_steps=3", "engine.checkpoint_minutes=1e-9"]
    with monkeypatch.context() as patch:
        poison(patch, *range(5, 12))
        with pytest.raises(UserError, match="in 3 steps in a row, up to step 8") as error:
            train(tiny_recipe(*settings), data=data, out=tmp_path / "run")
    assert state(tmp_path / "run")["position"]["step"] == 5
    match = re.search(r"(conv2former train .*? --set optim\.base_lr=\S+)", str(error.value))
    assert match
    poison(monkeypatch, 1, 2)
    assert run_command(monkeypatch, *shlex.split(match[1])[1:]) == 0
    rows = RunDir(tmp_path / "run").rows("epoch")
    assert rows[-1]["step"] == 12 and rows[-1]["skipped"] == 2


def test_a_stop_while_steps_are_skipped_says_what_is_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, *range(5, 12))
    stop_at(monkeypatch, 7)
    with pytest.raises(Interrupted, match="stopped at step 7, the losses since step 4 are not finite"):
        train(tiny_recipe("engine.max_skipped_steps=9"), data=data, out=tmp_path / "run")
    assert state(tmp_path / "run")["position"]["step"] == 4


@pytest.mark.parametrize("clip", [[], ["optim.clip_grad=1"]])
def test_a_rate_that_explodes_leaves_no_poisoned_checkpoint(data: Path, tmp_path: Path, clip: list[str]) -> None:
    settings = ["optim.name=sgd", "optim.base_lr=1e30", "schedule.warmup_epochs=0", *clip]
    with pytest.raises(UserError, match="not finite"):
        train(tiny_recipe(*settings), data=data, out=tmp_path / "run")
    found = CheckpointManager(tmp_path / "run" / "checkpoints").newest_first()
    assert [path.name for path in found] == ["save-000000-step-00000000.ckpt"]
    assert not (tmp_path / "run" / "best").exists()


def test_the_last_step_cannot_poison_the_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses of an epoch are finite; its last update is not."""
    original = engine.Trainer._log

    def poisoning(self: engine.Trainer, *times: float) -> None:
        if self.state.step == 8:
            self.model.head.fc.weight.data.fill_(float("nan"))
        original(self, *times)

    monkeypatch.setattr(engine.Trainer, "_log", poisoning)
    with pytest.raises(UserError, match=r"weights are not finite after step 8.*--resume --force"):
        train(tiny_recipe(), data=data, out=tmp_path / "run")
    assert state(tmp_path / "run")["position"]["step"] == 4


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands for the disk."""
    train(tiny_recipe("schedule.epochs=2"), data=data, out=tmp_path / "run")
    newest = CheckpointManager(tmp_path / "run" / "checkpoints").newest_first()[0]
    content, size = newest.read_bytes(), newest.stat().st_size
    words = ["train", f"--out={tmp_path / 'run'}", "--resume", "--force", "--set=schedule.epochs=5"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        status = run_command(monkeypatch, *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    errors = capfd.readouterr().err
    assert status == 1 and "Traceback" not in errors, errors
    assert errors.rstrip().splitlines()[-1].startswith("error: cannot write")
    assert newest.read_bytes() == content and not list((tmp_path / "run" / "checkpoints").glob("*.partial"))


def test_a_checkpoint_does_not_pass_through_the_temporary_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not exist stands for one that is full."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    train(tiny_recipe("schedule.epochs=2", "data.workers=0"), data=data, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "make room"), (errno.EACCES, "permission to write"), (errno.EROFS, "mount the disk for writing")],
)
def test_what_the_disk_refuses_is_said_with_its_remedy(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 64 vs 0") from error

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(UserError, match=rf"cannot write .*\({os.strerror(number)}\): .*{advice}"):
        train(tiny_recipe("schedule.epochs=2"), data=data, out=tmp_path / "run")


def test_a_folder_of_checkpoints_that_is_gone_is_made_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_step(monkeypatch, 6, lambda trainer: shutil.rmtree(trainer.run.checkpoints))
    train(tiny_recipe(), data=data, out=tmp_path / "run")
    assert state(tmp_path / "run")["position"]["step"] == 12


def test_a_folder_that_is_gone_is_one_line(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after_step(monkeypatch, 6, lambda trainer: shutil.rmtree(trainer.run.path))
    with pytest.raises(UserError, match=r"cannot (go on in the run folder|write) .*(No such file|folder is gone)"):
        train(tiny_recipe(), data=data, out=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_reader_that_is_killed_is_one_line(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(trainer: engine.Trainer) -> None:
        for worker in multiprocessing.active_children():
            worker.kill()

    after_step(monkeypatch, 2, kill)
    with pytest.raises(UserError, match=r"a process that reads images was killed"):
        train(tiny_recipe("data.workers=2", "schedule.epochs=50"), data=data, out=tmp_path / "run")


def test_a_gpu_that_is_too_small_is_one_line_and_the_run_goes_on_with_smaller_batches(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(trainer: engine.Trainer) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    settings: Any = dict(data=data, out=tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"out of GPU memory: lower optim\.batch_size"):
        after_step(patch, 6, refuse)
        train(tiny_recipe("optim.global_batch=16"), **settings)
    assert state(tmp_path / "run")["position"]["step"] == 4
    smaller = tiny_recipe("optim.global_batch=16", "optim.batch_size=8")
    train(smaller, **settings, resume=True, force=True)
    assert state(tmp_path / "run")["position"]["step"] == 12
    assert RunDir(tmp_path / "run").facts()["batch"]["micro_batches"] == 2


def test_a_logger_that_fails_does_not_end_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from lightning.pytorch.loggers import CSVLogger

    def fail(self: CSVLogger, *args: Any, **options: Any) -> None:
        raise ConnectionError("the service is gone")

    monkeypatch.setattr(CSVLogger, "log_metrics", fail)
    result = train(
        tiny_recipe("engine.loggers=[{name: CSVLogger}]", "schedule.epochs=2"), data=data, out=tmp_path / "run"
    )
    assert result is not None and capsys.readouterr().err.count("CSVLogger fails and is left out") == 1


def test_a_torn_line_hides_no_other(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    append_line(run.bad_images_jsonl, dict(file="a.png", reason="why"))
    with run.bad_images_jsonl.open("a") as file:
        file.write('{"file": "b.p')
    append_line(run.bad_images_jsonl, dict(file="c.png", reason="why"))
    assert [row["file"] for row in read_lines(run.bad_images_jsonl)] == ["a.png", "c.png"]


def test_other_loggers_by_recipe(data: Path, tmp_path: Path) -> None:
    logger = "engine.loggers=[{name: CSVLogger, args: {name: mine, flush_logs_every_n_steps: 1}}]"
    train(tiny_recipe(logger, "schedule.epochs=2"), data=data, out=tmp_path / "run")
    table = next((tmp_path / "run" / "loggers").rglob("metrics.csv")).read_text()
    assert "epoch/val_top1" in table.splitlines()[0] and len(table.splitlines()) >= 3


@pytest.mark.parametrize(
    ("logger", "message"),
    [
        ("{name: CsvLogger}", "unknown logger 'CsvLogger'; did you mean 'CSVLogger'"),
        ("{name: MLFlowLogger}", "MLFlowLogger needs a package|MLFlowLogger does not start"),
        ("{name: CSVLogger, args: {nme: x}}", "CSVLogger does not start: .*nme"),
    ],
)
def test_a_logger_that_cannot_be_had_is_one_line(data: Path, tmp_path: Path, logger: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(tiny_recipe(f"engine.loggers=[{logger}]"), data=data, out=tmp_path / "run")
