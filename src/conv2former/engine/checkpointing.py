"""The checkpoints that a run resumes from: the last two, each whole or not there."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from conv2former.engine.distributed import Processes
from conv2former.errors import UserError, one_line
from conv2former.files import flush, replace_text

KEEP = 2
_NAME = re.compile(r"save-(\d+)-step-\d+\.ckpt")


class CheckpointManager:
    """Files ``save-000012-step-00001234.ckpt`` in a folder; their order is that of the saves.

    A file is written beside its place under another name, flushed to the disk and moved there, so that whoever is
    killed on the way leaves the ones before as they were. PyTorch does not notice a flipped bit when it reads a file,
    therefore each has its SHA-256 beside it.

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
        path = self.folder / f"save-{int(match[1]) + 1 if match else 1:06d}-step-{step:08d}.ckpt"
        partial = path.with_name(path.name + ".partial")
        try:
            if not self.folder.is_dir():
                raise FileNotFoundError("its folder is gone")
            save(partial)
            if first:
                flush(partial)
                digest = _digest(partial)
                partial.replace(path)
                flush(self.folder)
                replace_text(_digest_file(path), digest + "\n")
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _is_about_a_file(error):
                raise
            if first:
                partial.unlink(missing_ok=True)
            raise UserError(
                f"cannot write {path} ({one_line(error)}): make room and continue with --resume; the checkpoints "
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

        Damaged ones get another name, so that they do not count as one of the last two.

        Args:
            processes: Of this run; the first one looks.
            say: Takes a line about a file that was passed over.

        Raises:
            UserError: All of them are damaged.
        """
        found, damaged = None, 0
        if processes.rank == 0:
            for path in self.newest_first():
                if not (trouble := _trouble(path)):
                    found = path
                    break
                damaged += 1
                say(f"{path} is damaged ({trouble}): taking the one before")
                path.replace(path.with_name(path.name + ".damaged"))
        found, damaged = processes.all_gather((found, damaged))[0]
        if damaged and not found:
            raise UserError(
                f"every checkpoint in {self.folder} is damaged: copy one back from elsewhere, if there is one"
            )
        return found


def _trouble(path: Path) -> str | None:
    """Why a file cannot be what was written, if so."""
    try:
        recorded = _digest_file(path)
        if recorded.exists():
            return None if recorded.read_text().strip() == _digest(path) else "its content is not what was written"
        torch.load(path, map_location="cpu", weights_only=True)  # killed before the digest was written
    except Exception as error:  # whatever a damaged file makes PyTorch say
        return one_line(error)[:200]
    return None


def _is_about_a_file(error: RuntimeError) -> bool:
    """Whether PyTorch speaks of writing: it reports a full disk as a RuntimeError."""
    return any(words in str(error) for words in ("PytorchStream", "unexpected pos", "Parent directory", "iostream"))


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
