"""Files that survive a crash: written whole or not at all, and lines that are read in spite of a torn one."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any


def replace_text(path: Path, text: str) -> None:
    """Writes a file under another name, then renames it: a reader never sees half of it."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cause(error: BaseException) -> OSError | None:
    """What the system has refused, be it behind an error of PyTorch, which hides a full disk in a RuntimeError."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    return seen


def remedy(error: BaseException) -> str:
    """What to do where a file cannot be written."""
    found = cause(error)
    if found is None or found.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "make room"
    if found.errno in (errno.EACCES, errno.EPERM):
        return "give yourself the permission to write there"
    if found.errno == errno.EROFS:
        return "mount the disk for writing"
    return "see to it that its folder is there and can be written"


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Appends a line of JSON, on a new line even if a crash cut the last one short."""
    with path.open("ab+") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + json.dumps(row).encode() + b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of JSON in a file, but for those that a crash cut short; none where there is no file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def free_name(stem: str, ending: str, taken: set[str]) -> str:
    """A name for a file that is made from an image file; adds it to ``taken``.

    The ending differs from the image's, because the file may go to the same folder. The name gets a number where two
    folders hold images of one name.
    """
    name, number = f"{stem}{ending}", 2
    while name in taken:
        name, number = f"{stem}-{number}{ending}", number + 1
    taken.add(name)
    return name
