"""Faults at random moments, and runs that end as those that nobody touched: ``make soak``.

A campaign is one run that meets a fault, is started again by the same command (``--resume auto``), meets the next, and
so on to its end. Half of the campaigns keep their number of processes: their weights and figures then equal those of an
undisturbed run bit for bit. The others change it at every start. In all of them every optimizer step has the images of
the undisturbed run, in its order. Each fault must end the run, or be survived, within a minute, with one line at most
and no process and no temporary file left. Everything that is random in training is on.

Rows go to ``rows.jsonl`` of the folder as they come; called again, it goes on until there are as many faults as asked
for, and writes the summary.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conv2former.engine.checkpointing import CheckpointManager
from conv2former.recipes import load_recipe
from conv2former.tasks import task_class
from digits import TINY, write_digits
from runs import EVERYTHING, assert_same_run, family, stat, training, weights
from scenes import write_coco, write_pairs

ROOM = 30_000  # bytes: more than the log of a run, less than a checkpoint
PATIENCE, LIMIT = 6, 60  # seconds: engine.stall_seconds, and that a run may take to end
PROCESSES = (1, 1, 2, 2, 4)
# Python's own: a signal's exception (PyTorch's, that a reader is gone) in the middle of another library's thread start
RACE = re.compile(r"Exception ignored in thread started by(?:.*\n)+?KeyError: <Thread.*\n")
FOUR = ["optim.global_batch=4", "optim.batch_size=1"]  # micro-batches in an optimizer step
TASKS: dict[str, tuple[str, list[str], Callable[[Path], Path]]] = dict(
    classification=(
        "quickstart",
        [*TINY, *EVERYTHING, "optim.global_batch=16", "optim.batch_size=4", "schedule.epochs=120"],
        write_digits,
    ),
    segmentation=(
        "smoke_segmentation",
        ["optim.global_batch=8", "optim.batch_size=2", "schedule.epochs=80"],
        lambda root: write_pairs(root, count=20),
    ),
    detection=("smoke_detection", [*FOUR, "schedule.epochs=60"], lambda root: write_coco(root, train=8, val=2)),
)
COMMON = ["engine.checkpoint_minutes=0.005", "engine.accelerator=cpu", f"engine.stall_seconds={PATIENCE}"]


class Campaign:
    """One run with its faults.

    Args:
        folder: Its own.
        task: Of ``TASKS``.
        changing: Whether the number of processes changes.
        chance: Gives everything that is random.
    """

    def __init__(self, folder: Path, task: str, *, changing: bool, chance: random.Random) -> None:
        self.folder, self.task, self.changing, self.chance = folder, task, changing, chance
        self.processes, self.readers = chance.choice(PROCESSES), chance.choice((0, 1, 2))
        self.out, self.marker, self.order = folder / "run", folder / "hang", folder / "order"
        self.data = folder.parent / f"data-{task}"
        if not self.data.exists():
            TASKS[task][2](self.data)
        self.order.mkdir(parents=True)
        self.temporary = Path(tempfile.mkdtemp())  # a short name: readers make sockets there

    def command(self, out: Path) -> list[str]:
        recipe, settings, _ = TASKS[self.task]
        changes = [*settings, *COMMON, f"data.workers={self.readers}", f"engine.devices={self.processes}"]
        words = ["train", f"--recipe={recipe}", f"--data={self.data}", f"--out={out}", "--resume", "auto"]
        hooks = Path(__file__).with_name("hooked.py")
        return [sys.executable, str(hooks), *words, *(f"--set={change}" for change in changes)]

    def environment(self, order: Path) -> dict[str, str]:
        threads = dict(OMP_NUM_THREADS="1")  # several processes share few processors
        return (
            os.environ | threads | dict(HOOK_HANG=str(self.marker), HOOK_ORDER=str(order), TMPDIR=str(self.temporary))
        )

    def start(self, *, full: bool = False) -> subprocess.Popen:
        """The run goes on; ``full``: with a temporary folder that has no room."""
        words, environment = self.command(self.out), self.environment(self.order)
        if full:
            script = 'mount -t tmpfs -o size=4k tmpfs "$TMPDIR" && head -c 4096 /dev/zero > "$TMPDIR/full"; exec "$@"'
            words = ["unshare", "-rm", "sh", "-c", script, "sh", *words]
        log = (self.folder / "log").open("w")
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)
        deadline = time.monotonic() + 120
        while "writes to" not in (self.folder / "log").read_text():  # the last line before the first step
            assert process.poll() is None and time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.02)
        return process

    def undisturbed(self) -> tuple[Path, Path]:
        """A run that nobody touches, and its images; made once for all campaigns of its kind."""
        whole = self.folder.parent / f"whole-{self.task}-{self.readers}-{self.processes}"
        order = whole.with_name(whole.name + "-order")
        if not (whole / "evaluation.json").exists():
            shutil.rmtree(whole, ignore_errors=True)
            shutil.rmtree(order, ignore_errors=True)
            order.mkdir()
            subprocess.run(self.command(whole), env=self.environment(order), check=True, capture_output=True)
        return whole, order

    # ------------------------------------------------------------------ faults

    def kill_rank(self, process: subprocess.Popen) -> None:
        os.kill(self.chance.choice(training(process.pid)), signal.SIGKILL)

    def kill_all(self, process: subprocess.Popen) -> None:
        os.killpg(process.pid, signal.SIGKILL)

    def kill_reader(self, process: subprocess.Popen) -> None:
        ranks = training(process.pid)
        children = [pid for pid in family(process.pid) if stat(pid)[1:2] and int(stat(pid)[1]) in ranks]
        programs = {pid: (Path("/proc") / str(pid) / "cmdline").read_bytes() for pid in children}
        readers = [pid for pid in children if pid not in ranks and b"hooked.py" in programs[pid]]
        os.kill(self.chance.choice(readers or ranks), signal.SIGKILL)

    def stop_rank(self, process: subprocess.Popen) -> None:
        os.kill(self.chance.choice(training(process.pid)), signal.SIGSTOP)

    def hang_reading(self, process: subprocess.Popen) -> None:
        (self.folder / "name").write_text(self.chance.choice(self.names()))
        (self.folder / "name").rename(self.marker)

    def fill_disk(self, process: subprocess.Popen) -> None:
        import resource

        for pid in training(process.pid):  # a limit on the size of files stands for the disk
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))

    def lose_folder(self, process: subprocess.Popen) -> None:
        self.out.rename(self.folder / "away")

    def damage(self, process: subprocess.Popen) -> None:
        """After a kill, as the power goes: a bit of the newest checkpoint is another one, or its end is missing."""
        self.kill_all(process)
        process.wait()
        found = CheckpointManager(self.out / "checkpoints").newest_first()
        if len(found) > 1:
            content = bytearray(found[0].read_bytes())
            content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
            found[0].write_bytes(content if self.chance.random() < 0.5 else content[: len(content) // 2])

    def names(self) -> list[str]:
        """Of the training images."""
        recipe = load_recipe(TASKS[self.task][0], overrides=[x for x in TASKS[self.task][1] if x.startswith("data.")])
        train = task_class(recipe.task).open_splits(recipe, self.data).train
        return [train.name(index) for index in range(len(train))]

    # ------------------------------------------------------------------ one fault

    def meet(self, kind: str) -> dict[str, Any]:
        """Starts the run, lets it meet a fault, and sees how it ends."""
        if self.changing:  # a process that is alone may be stopped for as long as somebody likes
            self.processes = self.chance.choice([count for count in PROCESSES if count > 1 or kind != "stop_rank"])
        process = self.start(full=kind == "full_tmp")
        members = family(process.pid)
        time.sleep(self.chance.uniform(0, 2.5))
        members += family(process.pid)
        began, over = time.monotonic(), process.poll() is not None
        if not over:
            fault = self.kill_all if kind == "full_tmp" else getattr(self, kind)
            fault(process)
            process.wait(timeout=LIMIT + 60)
        took, over = time.monotonic() - began, over or process.returncode == 0
        self.after(kind, members)
        log = (self.folder / "log").read_text()
        errors = [line for line in log.splitlines() if line.startswith("error")]
        row = dict(kind=kind, task=self.task, processes=self.processes, readers=self.readers, over=over)
        row |= dict(seconds=round(took, 1), status=process.returncode, line=errors[-1][:200] if errors else "")
        assert took < LIMIT and len(errors) <= 1 and "Traceback" not in RACE.sub("", log) and "frame #" not in log, (
            f"{row}\n{log}"
        )
        return row

    def after(self, kind: str, members: list[int]) -> None:
        """Takes the fault away; nothing of the run may be left."""
        self.marker.unlink(missing_ok=True)
        if kind == "lose_folder" and (self.folder / "away").exists():
            assert not self.out.exists(), "a run folder that was lost was made again"
            (self.folder / "away").rename(self.out)
        deadline = time.monotonic() + 15
        while left := [pid for pid in members if stat(pid) and stat(pid)[0] != "Z"]:
            assert time.monotonic() < deadline, f"processes are left after {kind}: {left}"
            time.sleep(0.1)
        left = [str(path) for path in self.temporary.rglob("*") if path.is_file() and path.stat().st_size]
        assert not left, f"temporary files are left after {kind}: {left}"

    def finish(self) -> None:
        """The run goes to its end and is compared."""
        if self.changing:
            self.processes = self.chance.choice(PROCESSES)
        words = dict(env=self.environment(self.order), capture_output=True, text=True)
        answer = subprocess.run(self.command(self.out), **words)  # type: ignore[call-overload]
        assert answer.returncode == 0, answer.stderr
        whole, order = self.undisturbed()
        assert images(self.order) == images(order), "other images, or in another order"
        shutil.rmtree(self.temporary)
        if self.changing:
            mine, theirs = weights(self.out), weights(whole)
            assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 0.05
        else:
            assert_same_run(whole, self.out)


def images(order: Path) -> list[Any]:
    """The images of every step and micro-batch; those that were done again must be the same."""
    found: dict[tuple[int, int], list[int]] = {}
    for path in order.iterdir():
        for line in path.read_text().splitlines():
            if re.fullmatch(r"\[\d+, \d+, \[[\d, ]*\]\]", line):  # the last one may be cut short
                step, part, indices = json.loads(line)
                assert found.setdefault((step, part), indices) == indices, (step, part)
    return sorted(found.items())


KINDS = dict(
    kill_rank="one process gets SIGKILL",
    kill_all="all processes get SIGKILL",
    kill_reader="a process that reads images gets SIGKILL",
    stop_rank="a process is stopped (SIGSTOP)",
    hang_reading="reading an image takes for ever",
    fill_disk="the disk is full",
    lose_folder="the run folder is gone, and comes back",
    damage="SIGKILL, and the newest checkpoint has a flipped bit or is cut off",
    full_tmp="SIGKILL, with a temporary folder that has no room",
)


def soak(folder: Path, faults: int, seed: int | None, each: int) -> list[dict[str, Any]]:
    """Campaigns until there are as many faults; gives their rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, path = [], folder / "rows.jsonl"
    if path.exists():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    number = 0
    while sum("kind" in row and not row["over"] for row in rows) < faults:
        chance = random.Random(None if seed is None else seed + len(rows))
        task = list(TASKS)[len([row for row in rows if "end" in row]) % len(TASKS)]
        number += 1
        own = Path(tempfile.mkdtemp(prefix=f"{task}-", dir=folder))
        campaign = Campaign(own, task, changing=chance.random() < 0.5, chance=chance)
        met = 0
        while met < each:
            done = [row["kind"] for row in rows if "kind" in row]
            kind = min(chance.sample([*KINDS], len(KINDS)), key=done.count)
            if kind == "stop_rank" and campaign.processes == 1 and not campaign.changing:
                kind = "kill_all"
            rows.append(campaign.meet(kind))
            _append(path, rows[-1])
            met += 1
            if rows[-1]["over"]:
                break
        campaign.finish()
        equal = "same images" if campaign.changing else "same images, weights and figures bit for bit"
        rows.append(dict(end=task, changing=campaign.changing, faults=met, equal=equal))
        _append(path, rows[-1])
        shutil.rmtree(own)
    return rows


def _append(path: Path, row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def summary(rows: list[dict[str, Any]]) -> str:
    """A table by kind of fault."""
    met = [row for row in rows if "kind" in row and not row["over"]]
    ends = [row for row in rows if "end" in row]
    lines = ["| what happened | times | seconds to the end, at most | a line that it ended with |", "|---|---|---|---|"]
    for kind, words in KINDS.items():
        own = [row for row in met if row["kind"] == kind]
        if own:
            line = next((row["line"] for row in reversed(own) if row["line"]), "")
            line = re.sub(r"/\S*/", ".../", line).replace("|", "/")
            lines.append(f"| {words} | {len(own)} | {max(row['seconds'] for row in own)} | {line} |")
    same = sum(not row["changing"] for row in ends)
    on = ", ".join(f"{sum(row['processes'] == n for row in met)} on {n}" for n in sorted(set(PROCESSES)))
    faults = (
        f"{len(met)} faults ({on} processes). Each ended the run, or was survived, within a minute, with one line at "
        "most, and left no process and no temporary file."
    )
    compared = (
        f"{len(ends)} runs were taken to their end and compared with a run that nobody touched. {same} of them had the "
        f"same number of processes throughout: their weights and metrics are equal bit for bit. {len(ends) - same} had "
        "changing numbers: every optimizer step had the same images in the same order."
    )
    return "\n".join([faults, "", compared, "", *lines]) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--each", type=int, default=12, help="faults of one run")
    parser.add_argument("--folder", type=Path, default=Path("soak"))
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--summary", type=Path, help="where the table goes")
    given = parser.parse_args()
    table = summary(soak(given.folder, given.faults, given.seed, given.each))
    print(table)
    if given.summary:
        given.summary.write_text("# Faults at random moments\n\nMade by `make soak`.\n\n" + table, encoding="utf-8")


if __name__ == "__main__":
    main()
