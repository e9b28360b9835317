"""A file of JSON lines, one for each image, that several processes write and that goes on where it was left."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from conv2former.errors import UserError, one_line
from conv2former.files import replace_text

# how torchrun and SLURM tell a process which one it is, and of how many
PLACES = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))


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
    written. Whoever finds all rows there puts them into ``path``, in the order of the files.

    Args:
        path: The file.
        names: What the rows call the files, ``row["file"]``.

    Raises:
        UserError: The file holds something else, or cannot be written.
    """

    def __init__(self, path: Path, names: Sequence[str], *, rank: int = 0, world: int = 1) -> None:
        self.path, self.names = path, list(names)
        self.own = path if world == 1 else path.with_name(f"{path.name}.part-{rank}-of-{world}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            known = self._known()
            self.left = [i for i, name in enumerate(names) if i % world == rank and name not in known]
            self.file = self.own.open("a+b")
            self._cut_off_half_a_line()
        except OSError as error:
            raise UserError(f"cannot write {self.own}: {one_line(error)}") from None

    def add(self, row: dict[str, Any]) -> None:
        """Writes a row; raises UserError."""
        try:
            self.file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n")
            self.file.flush()
        except OSError as error:
            raise UserError(
                f"cannot write {self.own}: {one_line(error)}; the same command goes on from there"
            ) from None

    def finish(self) -> bool:
        """Puts all rows into ``path`` if they are there; whether they are. Raises UserError."""
        self.file.close()
        try:
            with FileLock(self.path.with_name(f"{self.path.name}.lock")) as lock:
                known = self._known()
                if any(name not in known for name in self.names):
                    return False
                replace_text(self.path, "".join(f"{known[name]}\n" for name in self.names))
                for part in self._parts():
                    part.unlink(missing_ok=True)
            Path(lock.lock_file).unlink(missing_ok=True)
            return True
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {one_line(error)}") from None

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.name}.part-*-of-*"))

    def _known(self) -> dict[str, str]:
        """The rows that are written, by the names of their files."""
        return {name: line for file in (self.path, *self._parts()) for name, line in _rows(file)}

    def _cut_off_half_a_line(self) -> None:
        """A process that was killed may have left half a line, which would spoil the next."""
        content = self.own.read_bytes()
        if content and not content.endswith(b"\n"):
            self.file.truncate(content.rfind(b"\n") + 1)


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    """Names and lines of a file; half a line at its end is left out. Raises UserError."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    for line in content[: content.rfind(b"\n") + 1].decode("utf-8", "surrogateescape").splitlines():
        try:
            yield json.loads(line)["file"], line
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} holds no rows of predictions: give another --out-file") from None
