"""A file of JSON lines, one for each image, that can be continued after an interruption and that processes share."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from conv2former.errors import UserError, attempt, one_line
from conv2former.files import replace_bytes
from conv2former_runtime.errors import json_line

START = b'{"file": '  # of every row


class Rows:
    """The rows of some files, in ``path`` once all are there.

    Process ``rank`` of ``world`` has every ``world``-th file and writes the rows of those that no earlier call has
    written. The process that sees all rows puts them into ``path``, in the order of the files.

    Args:
        path: The file.
        names: What the rows call the files, ``row["file"]``.
        weights: The ``fingerprint`` of the model, which becomes ``row["weights"]``.
        keys: What rows have that an earlier call may not have asked for.

    Raises:
        UserError: The file holds something else, or rows of other weights or without a key, another command writes it,
            or it cannot be written.

    Attributes:
        left: Numbers of the files whose rows this process is to write.
        continued: Whether an earlier call has begun to write.
    """

    def __init__(
        self, path: Path, names: Sequence[str], *, weights: str, keys: Sequence[str] = (), rank: int = 0, world: int = 1
    ) -> None:
        self.path, self.names, self.weights = path, list(names), weights
        self.own = path if world == 1 else self._named(f"part-{rank}-of-{world}")
        self.lock = FileLock(self.own.with_name(f"{self.own.name}.lock"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
            known = self._known()
            if others := known.keys() - set(self.names):
                raise UserError(f"{path} has rows of {len(others)} other images: give another --out-file")
            if any(row.get("weights", weights) != weights for row in known.values()):
                raise UserError(f"{path} has rows of a model with other weights: give another --out-file")
            if lacking := [key for key in keys if any(row.get("ok") and key not in row for row in known.values())]:
                raise UserError(f"{path} has rows without {' and '.join(lacking)}: give another --out-file")
            self.continued = self.own.exists()
            self.left = [i for i, name in enumerate(self.names) if i % world == rank and name not in known]
            self.file = self.own.open("a+b")
            self._cut_off_half_a_line()
        except Timeout:
            raise UserError(f"another command writes {self.own}: wait for its end") from None
        except OSError as error:
            raise UserError(f"cannot write {self.own}: {one_line(error)}") from None

    def abandon(self) -> None:
        """Leaves no trace of a call that was refused before it wrote a row."""
        self.file.close()
        if not self.continued:
            self.own.unlink(missing_ok=True)
        self.lock.release()

    def add(self, row: dict[str, Any]) -> None:
        """Writes a row; raises UserError."""
        with attempt(f"write {self.own}", "; the same command goes on there"):
            self.file.write(_line(row | dict(weights=self.weights)))
            self.file.flush()

    def finish(self) -> list[dict[str, Any]] | None:
        """Puts all rows into ``path`` if they are there; the rows, or None. Raises UserError."""
        self.file.close()
        with attempt(f"write {self.path}"):
            with FileLock(self._named("merge.lock")):
                known = self._known()
                rows = [known[name] for name in self.names if name in known]
                done = len(rows) == len(self.names)
                in_order = [*known] == [*dict.fromkeys(self.names)]
                if done and (self._parts() or not in_order):
                    replace_bytes(self.path, b"".join(map(_line, rows)))
                    for part in self._parts():
                        part.unlink(missing_ok=True)
            self.lock.release()
            for lock in [*self._locks()] if done else ():
                lock.unlink(missing_ok=True)
            return rows if done else None

    def _named(self, end: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{end}")

    def _locks(self) -> Iterator[Path]:
        """All files that are there for locking alone."""
        yield from (self._named("lock"), self._named("merge.lock"))
        yield from self.path.parent.glob(f"{glob.escape(self.path.name)}.part-*-of-*.lock")

    def _parts(self) -> list[Path]:
        found = self.path.parent.glob(f"{glob.escape(self.path.name)}.part-*-of-*")
        return sorted(part for part in found if part.suffix != ".lock")

    def _known(self) -> dict[str, dict[str, Any]]:
        """The rows that are written, by the names of their files."""
        return {row["file"]: row for file in (self.path, *self._parts()) for row in _rows(file)}

    def _cut_off_half_a_line(self) -> None:
        """A process that was killed may have left half a line, which would spoil the next. Raises UserError."""
        content = self.own.read_bytes()
        half = content[content.rfind(b"\n") + 1 :]
        if half and not (half.startswith(START) or START.startswith(half)):
            raise _foreign(self.own)
        if half:
            self.file.truncate(len(content) - len(half))


def _line(row: dict[str, Any]) -> bytes:
    return json_line(row).encode() + b"\n"


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; half a line at its end is left out. Raises UserError."""
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for line in lines:
        try:
            row = json.loads(line)
            known = isinstance(row["file"], str)
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise _foreign(path)
        yield row


def _foreign(path: Path) -> UserError:
    return UserError(f"{path} holds no rows of predictions: give another --out-file")
