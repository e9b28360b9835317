"""The checkpoints that a run resumes from: the last two, each whole or not there."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conv2former.errors import UserError, one_line
from conv2former.run import replace_text

KEEP = 2
_NAME = re.compile(r"step-(\d+)\.ckpt")


class Snapshots:
    """Files ``step-00001234.ckpt`` in a folder.

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
        found = [path for path in self.folder.glob("step-*.ckpt") if _NAME.fullmatch(path.name)]
        return sorted(found, reverse=True)

    def write(self, step: int, save: Callable[[Path], Any], *, first: bool) -> Path:
        """Makes one and removes those that are older than the last two.

        Args:
            step: Optimizer steps done.
            save: Writes to a path; called on all processes.
            first: Whether this is the process that moves and removes files.

        Raises:
            UserError: The folder is gone or the disk is full; the files before are kept.
        """
        path = self.folder / f"step-{step:08d}.ckpt"
        partial = path.with_name(path.name + ".partial")
        try:
            if not self.folder.is_dir():
                raise FileNotFoundError("its folder is gone")
            save(partial)
            if first:
                _flush(partial)
                digest = _digest(partial)
                # in this order, so that no moment sees a file beside the digest of another
                _digest_file(path).unlink(missing_ok=True)
                partial.replace(path)
                _flush(self.folder)
                replace_text(_digest_file(path), digest + "\n")
        except (OSError, RuntimeError) as error:  # PyTorch reports a full disk as a RuntimeError
            partial.unlink(missing_ok=True)
            raise UserError(
                f"cannot write {path} ({one_line(error)}): make room and continue with --resume; the checkpoints "
                "before are kept"
            ) from None
        if first:
            kept = self.newest_first()
            leftovers = [file for file in self.folder.glob("step-*.ckpt.partial") if file != partial]
            for file in [*kept[KEEP:], *leftovers]:
                file.unlink(missing_ok=True)
                _digest_file(file).unlink(missing_ok=True)
        return path

    def read(self, load: Callable[[Path], Any], *, say: Callable[[str], None]) -> Path | None:
        """Loads the newest one that is whole; None where there is none at all.

        Args:
            load: Reads a path; raises whatever it likes on a damaged file, before it has changed anything.
            say: Takes a line about a file that was passed over.

        Raises:
            UserError: All of them are damaged.
        """
        files = self.newest_first()
        for path in files:
            try:
                recorded = _digest_file(path)
                if recorded.exists() and recorded.read_text().strip() != _digest(path):
                    raise ValueError("its content is not what was written")
                load(path)
                return path
            except Exception as error:  # whatever a damaged file makes PyTorch say
                say(f"{path} is damaged ({one_line(error)[:200]}): taking the one before")
        if files:
            raise UserError(
                f"every checkpoint in {self.folder} is damaged: copy one back, or start again with --overwrite"
            )
        return None


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Has the disk write a file, or a folder's names, before what follows."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
