"""A file of JSON lines, one for each image, that can be continued after an interruption and that processes share."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from conv2former.errors import UserError, one_line
from conv2former.files import replace_bytes

# How torchrun and srun tell a process which one it is, and of how many. A batch script of SLURM, which is one process,
# has SLURM_NTASKS too: only srun sets the number of tasks of a step.
PLACES = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
START = b'{"file": '  # of every row


def place() -> tuple[int, int, int]:
    """This process's number, that of all processes, and its number on this machine."""
    for names in PLACES:
        if all(os.environ.get(name, "").isdecimal() for name in names):
            rank, world, local = (int(os.environ[name]) for name in names)
            return rank, world, local
    return 0, 1, 0


class Rows:
    """The rows of some files, in ``path`` once all are there.

    Process ``rank`` of ``world`` has every ``world``-th file and writes the rows of those that no earlier call has
    written. The process that sees all rows puts them into ``path``, in the order of the files.

    Args:
        path: The file.
        names: What the rows call the files, ``row["file"]``.

    Raises:
        UserError: The file holds something else, another command writes it, or it cannot be written.
    """

    def __init__(self, path: Path, names: Sequence[str], *, rank: int = 0, world: int = 1) -> None:
        self.path, self.names = path, [*map(_key, names)]
        self.own = path if world == 1 else path.with_name(f"{path.name}.part-{rank}-of-{world}")
        self.lock = FileLock(self.own.with_name(f"{self.own.name}.lock"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
            known = self._known()
            if others := known.keys() - set(self.names):
                raise UserError(f"{path} has rows of {len(others)} other images: give another --out-file")
            self.left = [i for i, name in enumerate(self.names) if i % world == rank and name not in known]
            self.file = self.own.open("a+b")
            self._cut_off_half_a_line()
        except Timeout:
            raise UserError(f"another command writes {self.own}: wait for its end") from None
        except OSError as error:
            raise UserError(f"cannot write {self.own}: {one_line(error)}") from None

    def add(self, row: dict[str, Any]) -> None:
        """Writes a row; raises UserError."""
        try:
            self.file.write(_line(row) + b"\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.own}: {one_line(error)}; the same command goes on there") from None

    def finish(self) -> list[dict[str, Any]] | None:
        """Puts all rows into ``path`` if they are there; the rows, or None. Raises UserError."""
        self.file.close()
        try:
            with FileLock(self.path.with_name(f"{self.path.name}.merge.lock")):
                known = self._known()
                done = all(name in known for name in self.names)
                if done:
                    replace_bytes(self.path, b"".join(known[name] + b"\n" for name in self.names))
                    for part in self._parts():
                        part.unlink(missing_ok=True)
            self.lock.release()
            for file in self.path.parent.glob(f"{glob.escape(self.path.name)}*.lock") if done else ():
                file.unlink(missing_ok=True)
            return [_read(known[name]) for name in self.names] if done else None
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {one_line(error)}") from None

    def _parts(self) -> list[Path]:
        found = self.path.parent.glob(f"{glob.escape(self.path.name)}.part-*-of-*")
        return sorted(part for part in found if part.suffix != ".lock")

    def _known(self) -> dict[bytes, bytes]:
        """The rows that are written, by the names of their files."""
        return {name: line for file in (self.path, *self._parts()) for name, line in _rows(file)}

    def _cut_off_half_a_line(self) -> None:
        """A process that was killed may have left half a line, which would spoil the next. Raises UserError."""
        content = self.own.read_bytes()
        half = content[content.rfind(b"\n") + 1 :]
        if half and not (half.startswith(START) or START.startswith(half)):
            raise _foreign(self.own)
        if half:
            self.file.truncate(len(content) - len(half))


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogateescape")


def _read(line: bytes) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(line.decode("utf-8", "surrogateescape"))
    return row


def _key(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _rows(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Names and lines of a file; half a line at its end is left out. Raises UserError."""
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for line in lines:
        try:
            yield _key(_read(line)["file"]), line
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _foreign(path) from None


def _foreign(path: Path) -> UserError:
    return UserError(f"{path} holds no rows of predictions: give another --out-file")
