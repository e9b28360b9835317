"""Files that survive a crash: written whole or not at all, and lines that are read in spite of a torn one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def replace_text(path: Path, text: str) -> None:
    """Writes a file next to its place, then moves it there: a reader never sees half of it."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def flush(path: Path) -> None:
    """Has the disk write a file, or a folder's names, before what follows."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Appends a line of JSON, behind whatever a crash may have cut short."""
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        torn = False
        if size:
            file.seek(size - 1)
            torn = file.read(1) != b"\n"
        file.write(b"\n" * torn + json.dumps(row).encode() + b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of JSON in a file, those that a crash has cut short passed over; none where there is no file."""
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
    """A name for what is made of an image file, which is ``taken`` from then on.

    It has an ending of its own, because it may go to the folder of the inputs, and a number where two folders hold
    files of one name.
    """
    name, number = f"{stem}{ending}", 2
    while name in taken:
        name, number = f"{stem}-{number}{ending}", number + 1
    taken.add(name)
    return name
