"""``predict`` and ``evaluate`` on many images: they go on where they were stopped, and processes share files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conv2former.engine.predict import predict
from conv2former.engine.rows import Rows
from conv2former.errors import UserError


def _names(count: int) -> list[str]:
    return [f"image{number}.png" for number in range(count)]


def _write(rows: Rows, *, until: int | None = None) -> None:
    for index in rows.left[:until]:
        rows.add(dict(file=rows.names[index], ok=True, number=index))


def _killed(rows: Rows) -> None:
    rows.file.close()
    rows.lock.release()


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (3, 1), (3, 2)])
def test_every_file_once_whatever_the_number_of_processes(before: int, after: int, tmp_path: Path) -> None:
    """Stopped in the middle of a line, gone on with by others; in the order of the files."""
    path, names = tmp_path / "rows.jsonl", _names(20)
    for rank in range(before):
        rows = Rows(path, names, weights="a", rank=rank, world=before)
        _write(rows, until=4)
        rows.file.write(b'{"file": "image')
        _killed(rows)
    all_rows = [Rows(path, names, weights="a", rank=rank, world=after) for rank in range(after)]
    for rows in all_rows:
        _write(rows)
        assert (rows.finish() is not None) == (rows is all_rows[-1])
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["file"] for row in found] == names and [row["number"] for row in found] == [*range(20)]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
    assert Rows(path, names, weights="a").left == []


def test_a_file_of_something_else_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "configuration"}')
    with pytest.raises(UserError, match="no rows of predictions"):
        Rows(path, _names(3), weights="a")
    assert path.read_text() == '{"a": "configuration"}'
    path.write_text("a letter\nthat somebody wrote\n")
    with pytest.raises(UserError, match="no rows of predictions"):
        Rows(path, _names(3), weights="a")
    assert path.read_text().startswith("a letter")
    with pytest.raises(UserError, match="cannot write"):
        Rows(tmp_path / "rows.jsonl" / "deeper", _names(3), weights="a")


def test_rows_of_others_and_odd_names_are_kept(tmp_path: Path) -> None:
    """Separators of lines in a name, bytes that are no text, wildcards in the file's own name."""
    names = ["a\u2028b.png", "c\x85.png", os.fsdecode(b"\xff.png")]
    path = tmp_path / "rows[1]*.jsonl"
    for rank in range(2):
        rows = Rows(path, names, weights="a", rank=rank, world=2)
        _write(rows)
        found = rows.finish()
    assert found is not None and [row["file"] for row in found] == names
    assert [json.loads(line)["file"] for line in path.read_text(encoding="utf-8").splitlines()] == names
    other = Rows(tmp_path / f"{path.name}0", names, weights="a")  # whose lock has a name that begins alike
    assert Rows(path, names, weights="a").finish() == found and Path(other.lock.lock_file).exists()
    other.finish()
    with pytest.raises(UserError, match="other weights"):
        Rows(path, names, weights="b")
    with pytest.raises(UserError, match="rows of 3 other images"):
        Rows(path, _names(2), weights="a")
    rows = Rows(path, names, weights="a")
    with pytest.raises(UserError, match="another command writes"):
        Rows(path, names, weights="a")
    assert rows.finish() is not None


def _command(words: list[Any], *, processes: int = 1) -> list[str]:
    program = [sys.executable, "-m"]
    if processes > 1:
        program += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [*program, "conv2former_cli", *map(str, words)]


@pytest.mark.slow  # the tests above do the same without processes
def test_a_command_that_was_killed_goes_on(finished: Path, data: Path, tmp_path: Path) -> None:
    rows, images = tmp_path / "rows.jsonl", data / "val"
    words = ["predict", finished, images, "--batch-size=1", "--out-file", rows, "--out", tmp_path / "drawn"]
    begun = subprocess.Popen(_command(words), stderr=subprocess.DEVNULL)
    while not rows.exists() or rows.read_bytes().count(b"\n") < 3:
        assert begun.poll() is None
        time.sleep(0.01)
    os.kill(begun.pid, signal.SIGKILL)
    begun.wait()
    left = rows.read_bytes().count(b"\n")
    done = subprocess.run(_command(words), capture_output=True, text=True)
    wanted = list(predict(finished, [images]))
    assert done.returncode == 0 and f"{len(wanted)} rows are in {rows}" in done.stderr and not done.stdout
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["file"] for row in found] == [row["file"] for row in wanted] and left < len(wanted)
    assert [row["top"][0]["label"] for row in found] == [row["top"][0]["label"] for row in wanted]
    assert len(list((tmp_path / "drawn").iterdir())) == len(wanted)


@pytest.mark.slow
def test_processes_share_the_images(finished: Path, data: Path, tmp_path: Path) -> None:
    """As torchrun starts them: the rows of one process, and the figures of one."""
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    rows = tmp_path / "rows.jsonl"
    words = ["predict", finished, data / "val", "--out-file", rows]
    subprocess.run(_command(words, processes=2), check=True, env=environment, capture_output=True)
    wanted = list(predict(finished, [data / "val"]))
    assert [json.loads(line)["file"] for line in rows.read_text().splitlines()] == [row["file"] for row in wanted]
    words = ["evaluate", finished, "--data", data / "val", "--workers=0", "--json", "--out"]
    figures = []
    for count in (1, 2):
        command = _command([*words, tmp_path / str(count)], processes=count)
        done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
        figures.append(json.loads(done.stdout))
    assert figures[0].pop("loss") == pytest.approx(figures[1].pop("loss"))
    assert figures[0] == figures[1] and (tmp_path / "2" / "evaluation.json").exists()
    words = ["predict", finished, data / "val"]
    without = subprocess.run(_command(words, processes=2), env=environment, capture_output=True, text=True)
    assert without.returncode != 0 and "say with --out-file where their rows go" in without.stderr
