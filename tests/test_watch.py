"""Nothing hangs: whoever does not get on is named, all processes end, and the run goes on from where it was."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conv2former.data import activity
from conv2former.engine import checkpointing, watchdog
from conv2former.engine.checkpointing import CheckpointManager
from runs import command, family, hooked, start, stat, state, training, wait_for

PATIENCE = 4  # seconds
LONG = ["schedule.epochs=2000", f"engine.stall_seconds={PATIENCE}", "optim.global_batch=16", "optim.batch_size=4"]
TWO = ["engine.devices=2"]


class Run:
    """A run in progress that has been evaluated once."""

    def __init__(self, data: Path, out: Path, *settings: str, **hooks: str) -> None:
        self.out, self.process = out, start(hooked(command(data, out, *LONG, *settings)), env=os.environ | hooks)
        wait_for(self.process, out)
        self.members = family(self.process.pid)
        self.ranks = training(self.process.pid)

    def end(self, seconds: float = 30) -> str:
        """Its last words; nothing of it is left, and its newest checkpoint can be read."""
        began = time.monotonic()
        _, errors = self.process.communicate(timeout=60)
        assert time.monotonic() - began < seconds
        deadline = time.monotonic() + 10
        while left := [pid for pid in self.members if stat(pid) and stat(pid)[0] != "Z"]:
            assert time.monotonic() < deadline, [(pid, stat(pid)[0]) for pid in left]
            time.sleep(0.1)
        assert self.process.returncode != 0 and "Traceback" not in errors and "frame #" not in errors, errors
        lines = [line for line in errors.splitlines() if "error" in line]
        assert len(lines) == 1 and lines[0].startswith("error: ") and "--resume" in lines[0], errors
        self.saved = state(self.out)["position"]["step"]
        return lines[0]


VICTIM = "digit-2/0002.png"


def hanging(tmp_path: Path, data: Path, *settings: str) -> Run:
    """A run in which the next look at an image takes for ever."""
    marker = tmp_path / "hang"
    run = Run(data, tmp_path / "run", *settings, HOOK_HANG=str(marker))
    (tmp_path / "name").write_text(VICTIM)
    (tmp_path / "name").rename(marker)
    return run


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("readers", "processes"),
    [pytest.param(0, 1, marks=SLOW), (2, 1), pytest.param(0, 2, marks=SLOW), pytest.param(2, 2, marks=SLOW)],
)
def test_an_image_that_takes_for_ever_is_named(data: Path, tmp_path: Path, readers: int, processes: int) -> None:
    run = hanging(tmp_path, data, f"data.workers={readers}", f"engine.devices={processes}")
    who = r"process \d" if processes > 1 else "the training"
    assert re.search(rf"{who} has been reading {VICTIM} for \d+ s; .*--resume", run.end())
    assert run.saved >= 4 or not readers, "a process that only waits for images still saves"


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_stopped_is_named(data: Path, tmp_path: Path, victim: int) -> None:
    run = Run(data, tmp_path / "run", *TWO)
    os.kill(run.ranks[victim], signal.SIGSTOP)
    assert f"process {victim} has been stopped by a signal for {PATIENCE} s" in run.end()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_machine_that_is_gone_is_noticed(data: Path, tmp_path: Path, victim: int) -> None:
    """A process stopped with all that it has started, its watchdog too, sends no heartbeat."""
    run = Run(data, tmp_path / "run", *TWO)
    others = family(run.ranks[1])
    for pid in others if victim else set(run.members) - {*others}:
        os.kill(pid, signal.SIGSTOP)
    assert f"process {victim} has sent no heartbeat for {PATIENCE} s" in run.end()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_is_named(data: Path, tmp_path: Path, victim: int) -> None:
    run = Run(data, tmp_path / "run", *TWO, "data.workers=1")
    os.kill(run.ranks[victim], signal.SIGKILL)
    assert f"process {victim} was killed" in run.end(seconds=15)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_lock_that_is_never_given_back(data: Path, tmp_path: Path, processes: int) -> None:
    arguments = hooked(command(data, tmp_path / "run", *LONG, f"engine.devices={processes}"))
    process = start(arguments, env=os.environ | dict(HOOK_HOLD="30"))
    began, (_, errors) = time.monotonic(), process.communicate(timeout=100)
    assert process.returncode and time.monotonic() - began < 60
    lines = [line for line in errors.splitlines() if "error" in line]
    assert len(lines) == 1 and "has been writing metrics for" in lines[0], errors
    assert state(tmp_path / "run")["position"]["step"] >= 28


@pytest.mark.slow
def test_a_second_interrupt_ends_a_process_that_hangs(data: Path, tmp_path: Path) -> None:
    run = hanging(tmp_path, data, "data.workers=0", "engine.stall_seconds=1000")
    time.sleep(2)
    os.kill(run.process.pid, signal.SIGINT)
    time.sleep(1.5)
    os.kill(run.process.pid, signal.SIGINT)
    assert "was interrupted twice" in run.end(seconds=10)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_met_while_images_are_waited_for(data: Path, tmp_path: Path, signum: int) -> None:
    run = hanging(tmp_path, data, "data.workers=1", "engine.stall_seconds=1000")
    time.sleep(2)
    os.kill(run.process.pid, signum)
    _, errors = run.process.communicate(timeout=30)
    assert run.process.returncode in (75, 130) and "state saved" in errors.splitlines()[-1], errors


def can_mount() -> bool:
    """Whether this process may make a file system of its own."""
    return (
        subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not sys.platform.startswith("linux") or not can_mount(), reason="needs user namespaces")
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=SLOW)])
def test_shared_memory_that_is_too_small_is_one_line(data: Path, tmp_path: Path, processes: int) -> None:
    settings = ["data.workers=2", "data.input_size=160", "optim.batch_size=16", f"engine.devices={processes}"]
    words = command(data, tmp_path / "run", *LONG[:2], *settings)
    script = 'mount -t tmpfs -o size=2m tmpfs /dev/shm && exec "$@"'
    answer = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *words], capture_output=True, text=True, timeout=120
    )
    assert answer.returncode == 1 and "Traceback" not in answer.stderr, answer.stderr
    assert re.search(r"^error: (/dev/shm|.*of /dev/shm).*--shm-size", answer.stderr.splitlines()[-1]), answer.stderr


# ------------------------------------------------------------------------------------------------- the watchdog alone

KILLED = """
import os, socket, subprocess, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import activity
board, sleep = activity.Board(), ["sleep", "60"]
members = [subprocess.Popen(sleep, start_new_session=True), subprocess.Popen(sleep)]
for slot, member in enumerate(members, 1):
    activity.HEAD.pack_into(board.memory, slot * activity.SIZE, member.pid, 1, 0.0, 0.0, 0)
control, signals = socket.socketpair(), socket.socketpair()
handles = (board.handle, control[1].fileno(), signals[1].fileno())
subprocess.Popen([sys.executable, "-IS", sys.argv[2], *map(str, (*handles, os.getpid()))], pass_fds=handles)
print(*(member.pid for member in members), flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at /proc")
def test_readers_that_are_left_are_ended_and_nobody_else() -> None:
    """A stranger that has got the number of a reader has the same parent as a reader that is left."""
    words = [sys.executable, "-c", KILLED, activity.__file__, watchdog.__file__]
    with start(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        stranger, reader = map(int, process.stdout.readline().split())
        try:
            deadline = time.monotonic() + 20
            while stat(reader) and stat(reader)[0] != "Z":
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert stat(stranger) and stat(stranger)[0] != "Z"
        finally:
            os.kill(stranger, signal.SIGKILL)


@pytest.fixture
def watching() -> watchdog.Watchdog:
    """A watchdog in this process, of the process that has started it."""
    pairs = [socket.socketpair(), socket.socketpair()]
    return watchdog.Watchdog(activity.Board().handle, *(pair[1].detach() for pair in pairs), os.getppid())


def test_whoever_seems_to_hang_is_looked_at_again(watching: watchdog.Watchdog) -> None:
    now, board = time.monotonic(), watching.board
    board.write(0, "in step 1", 10)
    watching._look(now)
    watching._look(now + 11)
    board.write(0, "in step 2", 10)
    for seconds in (12, 13, 23):
        watching._look(now + seconds)
        assert watching.deadline is None
    watching._look(now + 24)
    assert watching.deadline is not None and "has been in step 2 for" in watching.why


def test_time_without_a_processor_is_no_hang(watching: watchdog.Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
    now, waited = time.monotonic(), {7: 100.0, 8: 0.0}
    monkeypatch.setattr(watchdog, "_waited_for_a_processor", lambda pid: dict(waited))
    watching.board.write(0, "in step 1", 10)
    for second in range(60):  # one thread has a hundredth of a processor
        watching._look(now + second)
        waited[8] += 0.99
    assert watching.deadline is None
    for second in range(60, 72):
        watching._look(now + second)
    assert watching.deadline is not None and "has been in step 1 for" in watching.why


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="looks at /proc")
def test_waiting_for_a_processor_is_seen() -> None:
    """Two processes that share a processor: each waits while the other runs."""
    spins = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0))), sys.executable, "-c", "while True: pass"]
    both = [subprocess.Popen(spins) for _ in range(2)]
    try:
        deadline = time.monotonic() + 60
        while not all(sum(watchdog._waited_for_a_processor(process.pid).values()) > 0.2 for process in both):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        for process in both:
            process.kill()
            process.wait()


def test_a_process_that_never_joins_is_named(watching: watchdog.Watchdog) -> None:
    watching.world, bound = 3, 2 * watchdog.SILENCE
    watching.peers[1] = watchdog.Line(socket.socketpair()[0])
    watching.peers[1].heard = watching.began + bound
    watching._look(watching.began + bound - 1)
    assert watching.deadline is None
    watching._look(watching.began + bound + 1)
    assert watching.why == "process 2 has not joined the others within 61 s"


def test_a_second_interrupt_ends_the_run(watching: watchdog.Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    for seconds, ends in ((0, False), (0.5, False), (2, True)):  # the second is the first, passed on by a launcher
        monkeypatch.setattr(time, "monotonic", lambda at=watching.began + seconds: at)
        ours.send(bytes([signal.SIGINT]))
        watching._signalled(theirs)
        assert (watching.deadline is not None) == ends
    assert watching.why == "the training was interrupted twice"


def test_a_process_that_stands_still_is_named(watching: watchdog.Watchdog) -> None:
    watching.world, watching.peers[1] = 2, watchdog.Line(socket.socketpair()[0])
    with subprocess.Popen(["sleep", "60"]) as process:
        watching.pid = process.pid
        os.kill(process.pid, signal.SIGSTOP)
        while stat(process.pid)[0] != "T":
            time.sleep(0.01)
        for seconds in (1, 2 + watchdog.SILENCE):
            watching.peers[1].heard = watching.began + seconds
            watching._look(watching.began + seconds)
        process.kill()
    assert watching.why == "process 0 has been stopped by a signal for 30 s"


def test_a_process_that_is_silent_is_named(watching: watchdog.Watchdog) -> None:
    watching.world, watching.peers[1] = 2, watchdog.Line(socket.socketpair()[0])
    watching._look(watching.began + watchdog.SILENCE + 1)
    assert watching.why == "process 1 has sent no heartbeat for 30 s"


def test_a_large_checkpoint_gets_more_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board, allowed = activity.Board(), []
    monkeypatch.setattr(checkpointing, "SLOWEST", 10)
    monkeypatch.setattr(checkpointing, "flush", lambda path: allowed.append(board.read(0).allowed))
    try:
        activity.announce(board, patience=2)
        CheckpointManager(tmp_path).write(1, lambda path: path.write_bytes(bytes(500)), first=True)
    finally:
        activity.announce(None)
    assert allowed[0] == 5 * 2 + 50
