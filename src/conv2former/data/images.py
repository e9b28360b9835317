"""Which files of a folder are images; and the names of ``conv2former_runtime.images``, which decodes them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from conv2former.data import folders
from conv2former.errors import UserError, printable, say_once
from conv2former_runtime.images import FORMATS as FORMATS
from conv2former_runtime.images import HEIC as HEIC
from conv2former_runtime.images import MAX_FILE_BYTES as MAX_FILE_BYTES
from conv2former_runtime.images import MAX_PIXELS as MAX_PIXELS
from conv2former_runtime.images import BadImage as BadImage
from conv2former_runtime.images import decode as decode
from conv2former_runtime.images import shown as shown
from conv2former_runtime.images import shown_size as shown_size
from conv2former_runtime.images import turned as turned

IGNORED = 255  # in a mask: of no class
# which files of a folder are images; `find_images` takes them in any case
IMAGE_EXTENSIONS: tuple[str, ...] = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".jpx", ".avif"),
)
IMAGE_EXTENSIONS += (".heic", ".heif", ".hif") * HEIC


def find_images(paths: Sequence[str | Path], *, others: Counter[str] | None = None) -> list[Path]:
    """Lists the image files that the given paths stand for.

    A file is taken as it is, whatever its extension. A folder is searched through all its depths for the extensions in
    `IMAGE_EXTENSIONS`, in natural order (`img2` before `img10`); hidden files and folders in it are skipped, as
    are thumbnails, run folders and what `predict` has drawn; links are followed, no folder is entered twice. What does
    not exist, and a folder that may not be listed, is returned as it is: the caller, who reports each file's `BadImage`
    anyway, then reports this one with its reason. The files that are passed over are counted in `others`.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]  # a string is a sequence of strings, too
    others = Counter() if others is None else others
    return [file for path in paths for file in (_walk(path, others) if os.path.isdir(path) else [Path(path)])]


def given_images(paths: Sequence[str | Path]) -> list[Path]:
    """``find_images``, with a line about the files that are passed over; raises UserError where there is none."""
    others: Counter[str] = Counter()
    files = find_images(paths, others=others)
    where, rest = ", ".join(map(str, paths)), folders.passed_over(others)
    if urls := [path for path in map(str, paths) if re.match("https?:/", path)]:
        raise UserError(f"{urls[0]}: images are not fetched from addresses: download them, and give the files")
    if not files:
        raise UserError(f"no images in {where}" + (f": {rest}" if rest else ""))
    if rest:
        say_once(f"{printable(where)}: not read: {rest}")
    return files


def _walk(folder: str | Path, others: Counter[str]) -> list[Path]:
    found: list[Path] = []
    entered = folders.above(folder)
    waiting = [(str(folder), True)]  # the next one last
    while waiting:
        path, is_folder = waiting.pop()
        if not is_folder:
            found.append(Path(path))
            continue
        try:
            if (key := folders.identity(path)) in entered:
                continue
            entered.add(key)
            with os.scandir(path) as entries:
                inside = [(entry.name, entry.path, folders.is_folder(entry)) for entry in entries]
        except OSError:
            found.append(Path(path))
            continue
        if path != str(folder) and folders.result({name for name, _, _ in inside}):
            continue
        inside.sort(key=lambda item: _natural(item[0]), reverse=True)
        for name, path, is_folder in inside:
            if is_folder:
                waiting += [(path, True)] * (not folders.is_junk(name))
            elif folders.ends_in(name, IMAGE_EXTENSIONS):
                waiting.append((path, False))
            else:
                folders.count_other(name, others)
    return found


def _natural(name: str) -> tuple[list[str | int], str]:
    """A sort key by which the numbers in names count as numbers; the name itself decides between equals."""
    parts = re.split("([0-9]+)", name.casefold())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name
