"""The checkpoints that a run resumes from: the last two, each whole or not there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from conv2former.data import activity
from conv2former.engine.distributed import Processes, agreed
from conv2former.errors import UserError, one_line
from conv2former.files import cause, flush, remedy, replace_text

KEEP = 2
SLOWEST = 20e6  # bytes a second of the slowest disk that is waited for
_NAME = re.compile(r"save-(\d+)-step-\d+\.ckpt")


class _Declared:
    """A file of which every write says that the process does not hang."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def write(self, data: Any) -> int:
        """As that of a file."""
        activity.doing(activity.SAVING, 5)
        return self.file.write(data)

    def flush(self) -> None:
        """As that of a file."""
        self.file.flush()


def write_file(path: Path, contents: dict[str, Any]) -> None:
    """Writes to this very place: Fabric makes a copy in memory and another in the temporary folder."""
    with path.open("wb") as file:
        torch.save(contents, _Declared(file))  # type: ignore[arg-type]


class CheckpointManager:
    """Files ``save-000012-step-00001234.ckpt`` in a folder; their order is that of the saves.

    A file is written beside its place under another name, flushed to the disk and moved there, so that whoever is
    killed on the way leaves the ones before as they were. PyTorch does not notice a flipped bit when it reads a file,
    therefore each has its SHA-256 beside it. The first is written before the first step: where none is, it was lost.

    Args:
        folder: Made by whoever makes the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def newest_first(self) -> list[Path]:
        """The files that are there."""
        return sorted((path for path in self.folder.glob("*.ckpt") if _NAME.fullmatch(path.name)), reverse=True)

    def write(self, step: int, save: Callable[[Path], Any], *, first: bool) -> Path:
        """Makes one and removes those that are older than the last two.

        Args:
            step: Optimizer steps done, for the name.
            save: Writes to a path; called on all processes.
            first: Whether this is the process that moves and removes files.

        Raises:
            UserError: The folder is gone or the disk is full; the files before are kept.
        """
        newest = next(iter(self.newest_first()), None)
        match = newest and _NAME.fullmatch(newest.name)
        number = int(match[1]) + 1 if match else min(step, 1)
        path = self.folder / f"save-{number:06d}-step-{step:08d}.ckpt"
        partial = path.with_name(path.name + ".partial")
        try:
            if first and self.folder.parent.is_dir():
                self.folder.mkdir(exist_ok=True)
            save(partial)
            if first:
                seconds = partial.stat().st_size / SLOWEST
                activity.doing(activity.SAVING, 5, more=seconds)
                flush(partial)
                activity.doing(activity.SAVING, 5, more=seconds)
                digest = _digest(partial)
                partial.replace(path)
                flush(self.folder)
                replace_text(_digest_file(path), digest + "\n")
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not cause(error) and not _is_about_a_file(error):
                raise
            if first:
                with contextlib.suppress(OSError):  # its folder may be what is gone
                    partial.unlink()
            raise UserError(
                f"cannot write {path} ({_reason(error)}): {remedy(error)} and continue with --resume; the checkpoints "
                "before are kept"
            ) from None
        if first:
            kept = self.newest_first()[:KEEP]
            names = {file.name for file in kept} | {_digest_file(file).name for file in kept}
            for file in self.folder.glob("save-*"):
                if file.name not in names and not file.name.endswith(".damaged"):
                    file.unlink(missing_ok=True)
        return path

    def latest_valid(self, processes: Processes, *, say: Callable[[str], None]) -> Path | None:
        """The newest file that is what was written, the same on all processes; None where there are no files.

        Where there is a sound one, damaged ones get another name, so that they do not count as one of the last two.

        Args:
            processes: Of this run; the first one looks.
            say: Takes a line about a file that was passed over.

        Raises:
            UserError: All of them are damaged.
        """
        found, damaged = None, []
        if processes.rank == 0:
            for path in self.newest_first():
                if not (trouble := _trouble(path)):
                    found = path
                    break
                damaged.append(path)
                say(f"{path} is damaged ({trouble}): taking the one before")
            for path in damaged if found else []:
                _digest_file(path).unlink(missing_ok=True)
                path.replace(path.with_name(path.name + ".damaged"))
            if found and not _digest_file(found).exists():
                say(
                    f"{found} has no {_digest_file(found).name} beside it: it can be read, a flipped bit is not noticed"
                )
        found, damaged = processes.all_gather((found, damaged))[0]
        if damaged and not found:
            raise agreed(
                UserError(
                    f"every checkpoint in {self.folder} is damaged: copy one back from elsewhere, or start anew with "
                    "--overwrite in the place of --resume"
                )
            )
        return found


def _trouble(path: Path) -> str | None:
    """Why a file cannot be what was written, if so."""
    try:
        recorded = _digest_file(path)
        if recorded.exists():
            return None if recorded.read_text().strip() == _digest(path) else "its content is not what was written"
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes PyTorch say
        return one_line(error)[:200]
    return None


def _reason(error: Exception) -> str:
    found = cause(error)
    return (os.strerror(found.errno) if found.errno else str(found)) if found else one_line(error)


def _is_about_a_file(error: RuntimeError) -> bool:
    """Whether PyTorch speaks of writing: it reports a full disk as a RuntimeError."""
    return any(words in str(error) for words in ("PytorchStream", "unexpected pos", "Parent directory", "iostream"))


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
