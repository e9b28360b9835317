"""The watchdog of a training process: a process of its own, which nothing that the other does can hold up.

It reads what the training process and its readers say they are doing (``data.activity``), is told of every signal at
once, and speaks with the watchdogs of the other processes through that of the first. Whoever does not get on within the
time that it has set itself is named, and all processes end. The standard library alone; started by
``engine.distributed``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import selectors
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

BEAT = 1.0  # seconds between two looks at the training process, and between two heartbeats to the other watchdogs
SILENCE = 30.0  # seconds without a heartbeat after which a process is taken for dead
GRACE = 3.0  # seconds that a training process has to end by itself
REPEAT = 1.0  # a second Ctrl-C within this many seconds is the first, passed on by a launcher
LONGEST = 65536  # bytes of a message
HELP = "what was saved is kept: continue with --resume"


def _activity() -> Any:
    spec: Any = importlib.util.spec_from_file_location("activity", Path(__file__).parents[1] / "data" / "activity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Line:
    """A connection on which JSON objects go to and fro, one a line."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.rest, self.heard, self.rank = connection, b"", time.monotonic(), -1

    def send(self, **message: Any) -> None:
        """Sends one; silent where nobody is there any more."""
        with contextlib.suppress(OSError):
            self.connection.send(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come since; None at the end."""
        try:
            data = self.connection.recv(65536)
        except OSError:
            data = b""
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self.rest = (self.rest + data).split(b"\n")
        if len(self.rest) > LONGEST:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:  # somebody else
            return None
        return [message for message in messages if isinstance(message, dict)]


class Watchdog:
    """See the module.

    Args:
        board: File handle of what the training process and its readers do.
        control: That of a connection with the training process.
        signals: That of a connection on which the training process writes the numbers of its signals.
        pid: The training process.
    """

    def __init__(self, board: int, control: int, signals: int, pid: int) -> None:
        self.pid = pid
        self.rank, self.world, self.host, self.token = 0, 1, "", None
        self.stuck = False  # whether the training process cannot end by itself
        self.second = True  # whether it speaks where the first cannot
        self.why, self.speaks, self.silence = "", True, SILENCE
        self.activity = _activity()
        self.board = self.activity.Board(board)
        self.control = Line(socket.socket(fileno=control))
        self.signals = socket.socket(fileno=signals)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.control.connection, selectors.EVENT_READ, self._told)
        self.selector.register(self.signals, selectors.EVENT_READ, self._signalled)
        self.peers: dict[int, Line] = {}  # of the first: all others; of the others: the first
        self.identities: dict[int, dict[str, Any]] = {}
        self.done: set[int] = set()
        self.changes, self.changed, self.suspected = 0, time.monotonic(), False
        self.waited: dict[int, float] = {}  # by thread; what ``_waited_for_a_processor`` said at the last look
        self.began = time.monotonic()  # of the first: when the others could join
        self.stopped_since: float | None = None
        self.interrupted: float | None = None
        self.deadline: float | None = None  # when the training process is to be gone

    def run(self) -> None:
        """Until the training process has ended."""
        looked = time.monotonic()
        while True:
            for key, _ in self.selector.select(BEAT / 4):
                key.data(key.fileobj)
            now = time.monotonic()
            if os.getppid() != self.pid:
                return self._orphaned()
            if now - looked > 5 * BEAT:  # this process was stopped too: nobody is to blame
                self._forgive(now)
            if now - looked >= BEAT:
                looked = now
                self._look(now)
            if self.deadline is not None and self._is_saving(now):
                self.deadline = max(self.deadline, now + GRACE)
            elif self.deadline is not None and now > self.deadline:
                return self._kill()

    # ------------------------------------------------------------------ the training process

    def _told(self, connection: socket.socket) -> None:
        messages = self.control.receive()
        if messages is None:
            self.selector.unregister(connection)  # it has ended, or is about to
            return
        for message in messages:
            if "rank" in message:
                self.rank, self.world, self.host = message["rank"], message["world"], message["host"]
                self.silence, self.token = message["silence"], message["token"]
                self.second = self.rank == 1 or message["local"] == 0
                if self.rank == 0 and self.world > 1:
                    self._listen()
            elif "join" in message:
                port, self.token = message["join"]
                self.began = time.monotonic()
                if self.rank:
                    self._join(port)
            elif "failed" in message:
                self._fail(f"{self._name()} failed: {message['failed']}")
                self._linger()
            elif "done" in message or "parted" in message:
                for line in self.peers.values():
                    line.send(**message)
            elif "close" in message:
                os._exit(0)

    def _signalled(self, connection: socket.socket) -> None:
        numbers = connection.recv(4096)
        if not numbers:
            self.selector.unregister(connection)
        if signal.SIGINT not in numbers:
            return
        now = time.monotonic()
        if self.interrupted is None:
            self.interrupted = now
        elif now - self.interrupted > REPEAT and self.deadline is None:
            self._fail(f"{self._name()} was interrupted twice")

    def _look(self, now: float) -> None:
        for line in self.peers.values():
            line.send(beat=self.rank)
        if self.deadline is not None:
            return
        for rank, line in [*self.peers.items()]:
            if rank not in self.done and now - line.heard > self.silence:
                self._fail(f"process {rank} has sent no heartbeat for {self.silence:.0f} s", dead=rank)
        missing = sorted({*range(1, self.world)} - self.peers.keys()) if self.rank == 0 else []
        if missing and now - self.began > self.silence + SILENCE:  # it may try to connect for so long
            self._fail(f"process {missing[0]} has not joined the others within {now - self.began:.0f} s")
        readers = [self.board.read(slot) for slot in range(1, 1 + self.activity.READERS)]
        own = self.board.read(0)
        changes = own.changes + sum(reader.changes for reader in readers)
        if changes != self.changes:
            self.changes, self.changed = changes, now
        # on a machine with too much to do, the time without a processor is not counted
        reading = [reader.pid for reader in readers if reader.pid and _is_sibling(reader.pid)]
        self.changed = min(now, self.changed + self._starved([self.pid, *reading]))
        if self.world == 1 and self._is_stopped():  # somebody has paused it, or looks at it with a debugger
            self.changed = now
        elif self._is_stopped():
            self.stopped_since = self.stopped_since or now
            if now - self.stopped_since > self.silence:
                return self._fail(f"{self._name()} has been stopped by a signal for {self.silence:.0f} s", stuck=True)
        else:
            self.stopped_since = None
            late = own.allowed > 0 and now - self.changed > own.allowed
            # seen at two looks: the first may fall into the moment at which the process says something else
            self.suspected, again = late, late and self.suspected
            if again:
                # one whose readers hang can end by itself, and save before
                self._fail(self._complaint(own, readers, now), stuck=own.text != self.activity.WAITING)

    def _complaint(self, own: Any, readers: list[Any], now: float) -> str:
        busy = [reader for reader in readers if reader.pid and reader.text.startswith("reading ")]
        oldest = min(busy, key=lambda reader: reader.since) if busy and own.text == self.activity.WAITING else own
        return f"{self._name()} has been {oldest.text} for {now - oldest.since:.0f} s"

    def _name(self) -> str:
        return f"process {self.rank}" if self.world > 1 else "the training"

    def _starved(self, pids: list[int]) -> float:
        """Seconds since the last look for which a thread of the processes waited for a processor; the most of any."""
        before, self.waited = self.waited, {}
        for pid in pids:
            self.waited |= _waited_for_a_processor(pid)
        return max((seconds - before.get(thread, seconds) for thread, seconds in self.waited.items()), default=0.0)

    def _is_stopped(self) -> bool:
        return _stat(self.pid)[:1] in (["T"], ["t"])

    def _is_saving(self, now: float) -> bool:
        own = self.board.read(0)
        saving = self.rank == 0 and not self.stuck and own.text == self.activity.SAVING
        return saving and now - own.since < (own.allowed or 10 * SILENCE)

    def _forgive(self, now: float) -> None:
        self.changed = self.began = now
        self.stopped_since = None
        for line in self.peers.values():
            line.heard = now

    def _orphaned(self) -> None:
        """The training process ended without a word."""
        if self.deadline is None:
            self._fail(f"{self._name()} was killed or crashed, most often because the machine ran out of memory")
            if self.speaks:
                self._say()
        self._end_readers()
        self._linger()

    def _kill(self) -> None:
        if self.speaks:
            self._say()
        self.control.send(exit=True)
        time.sleep(BEAT / 2)
        self._end_readers()
        if os.getppid() == self.pid:
            _kill(self.pid)
        self._linger()

    def _linger(self) -> None:
        """Leaves the others time to hear the last message."""
        if self.peers:
            time.sleep(BEAT)
        os._exit(0)

    def _end_readers(self) -> None:
        """Kills readers that hang: nobody else would end them."""
        for slot in range(1, 1 + self.activity.READERS):
            pid = self.board.read(slot).pid
            if pid and _is_sibling(pid):
                _kill(pid)

    def _say(self) -> None:
        where = f"process {self.rank} of {self.world} stops, because " if self.world > 1 else "stopped, because "
        with contextlib.suppress(OSError):
            os.write(2, f"error: {where}{_printable(with_help(self.why))}\n".encode())

    # ------------------------------------------------------------------ the others

    def _listen(self) -> None:
        here = self.host in ("localhost", "127.0.0.1")
        both = not here and socket.has_dualstack_ipv6()
        options: Any = dict(family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)
        listener = socket.create_server(("127.0.0.1" if here else "", 0), backlog=self.world, **options)
        self.selector.register(listener, selectors.EVENT_READ, self._accept)
        self.control.send(port=listener.getsockname()[1])

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        line = Line(connection)
        connection.settimeout(BEAT)
        self.selector.register(connection, selectors.EVENT_READ, lambda _: self._heard(line))

    def _join(self, port: int) -> None:
        try:
            line = Line(socket.create_connection((self.host, port), timeout=SILENCE))
        except OSError as error:
            return self._fail(f"process {self.rank} cannot reach process 0 at {self.host}:{port} ({error})")
        line.connection.settimeout(BEAT)
        line.rank, self.peers[0] = 0, line
        self.selector.register(line.connection, selectors.EVENT_READ, lambda _: self._heard(line))
        line.send(**self._identity())

    def _identity(self) -> dict[str, Any]:
        return dict(
            token=self.token,
            rank=self.rank,
            host=socket.gethostname(),
            pids=[self.pid, os.getpid()],
            born=_born(self.pid),
        )

    def _heard(self, line: Line) -> None:
        messages = line.receive()
        if messages is None:
            self.selector.unregister(line.connection)
            if self.peers.get(line.rank) is line and line.rank not in self.done:
                self._fail(f"process {line.rank} is gone", dead=line.rank)
            return
        for message in messages:
            if line.rank < 0 and message.get("token") != self.token:
                self.selector.unregister(line.connection)
                return line.connection.close()
            if "pids" in message:
                line.rank = message["rank"]
                self.peers[line.rank], self.identities[line.rank] = line, message
                if self.rank == 0:
                    line.send(**self._identity())
            if "done" in message:
                self.done.add(line.rank)
            if "parted" in message:
                self.control.send(parted=True)
            if "failed" in message:
                self._fail(message["failed"])
            if "end" in message:
                self._end(message["end"], speaks=False)

    def _fail(self, why: str, *, stuck: bool = False, dead: int | None = None) -> None:
        """Something is wrong: all processes end.

        Args:
            why: For the user.
            stuck: Whether it is the training process of this watchdog, which cannot end by itself.
            dead: The process that nobody hears any more.
        """
        if self.deadline is not None:
            return
        if self.rank == 0:
            for rank, line in self.peers.items():
                if rank != dead:
                    line.send(end=why)
        elif 0 in self.peers and dead != 0:
            self.peers[0].send(failed=why)
        if dead is not None:
            self._kill_if_here(dead)
        self._end(why, speaks=self.rank == 0 or (self.second and (dead == 0 or 0 not in self.peers)))
        if stuck:
            self.stuck, self.deadline = True, 0.0

    def _end(self, why: str, *, speaks: bool) -> None:
        if self.deadline is None:
            self.why, self.speaks, self.deadline = why, speaks, time.monotonic() + GRACE
            self.control.send(why=why, speaks=speaks)

    def _kill_if_here(self, rank: int) -> None:
        """Ends a stopped process of this machine, which would stay for ever."""
        them = self.identities.get(rank, {})
        if them.get("host") == socket.gethostname() and _born(them["pids"][0]) == them["born"] is not None:
            for pid in them["pids"]:
                _kill(pid)


def with_help(why: str) -> str:
    """The reason, and what to do."""
    return why if "--resume" in why else f"{why}; {HELP}"


def _printable(text: str) -> str:
    """A name of a file may hold what a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _stat(pid: int) -> list[str]:
    """State, parent, process group, session and so on; empty where there is no such process, or no such files."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _waited_for_a_processor(pid: int) -> dict[int, float]:
    """Seconds for which each thread of a process was ready to run and had no processor; empty where nobody says."""
    found = {}
    for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has just ended
            found[int(file.parent.name)] = int(file.read_text().split()[1]) / 1e9
    return found


def _is_sibling(pid: int) -> bool:
    """Whether a process was started by the training process, as this one was: whoever adopts one adopts both.

    A stranger that has got the number of a reader may have the same parent, in a container above all, but belongs to
    another process group or session.
    """
    return _stat(pid)[1:4] == [str(number) for number in (os.getppid(), os.getpgrp(), os.getsid(0))]


def _born(pid: int) -> str | None:
    """When a process was started, so that another one with its number is not taken for it."""
    fields = _stat(pid)
    return fields[19] if fields else None


def _kill(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    for number in _activity().STOPS:  # they are for the training
        signal.signal(number, signal.SIG_IGN)
    Watchdog(*map(int, sys.argv[1:])).run()
