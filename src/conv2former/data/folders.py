"""Folders that a user gives: which part of a set lies where, what is read below, what is left out and named."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from conv2former.errors import UserError, attempt, printable, some

# what the parts of a set are called, in upper and lower case; what is first counts where there are two
SPLITS = dict(train=("train", "training"), val=("val", "validation", "valid"), test=("test", "testing"))
PIECES = {"images", "image", "img", "part", "chunk", "batch", "folder", "data"}  # what is numbered and no class
# folders that file managers, disks in a network and packers make
JUNK = {
    *("@eadir", "@__thumb", "thumbnails", "__macosx", "$recycle.bin", "#recycle", "@recycle", "#snapshot"),
    *("system volume information", "lost+found"),
}
LITTER = {"thumbs.db", "ehthumbs.db", "desktop.ini"}
RUN, REPORT = {"recipe.yaml", "run.json"}, "evaluation.json"  # files of a run folder, of a report
DRAWN = ".predicted.png"  # what ``predict --out`` adds to an image's name


def one_form(name: str) -> str:
    """A name in Unicode's composed form: macOS and Linux write an é in different ways."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def respelled(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Names written as known ones are, where they differ in their Unicode form alone."""
    spelled = {one_form(name): name for name in known}
    return [spelled.get(one_form(name), name) for name in names]


def find_splits(names: Iterable[str]) -> dict[str, str]:
    """Which of some names are those of the training, the validation and the test part."""
    by_word: dict[str, list[str]] = {}
    for name in names:
        by_word.setdefault(name.casefold(), []).append(name)
    found = {}
    for split, words in SPLITS.items():
        there = [sorted(by_word[word], reverse=True)[0] for word in words if word in by_word]  # small letters first
        if there:
            found[split] = there[0]
    return found


def like_splits(names: Iterable[str]) -> list[str]:
    """Names that look like parts of a set: one for training, others with the same words beside (``val_images``)."""
    training, known = {*SPLITS["train"]}, {word for part in SPLITS.values() for word in part} | {"dev", "eval"}
    found: dict[tuple[str, ...], dict[str, bool]] = {}
    for name in names:
        words = [word.casefold() for word in re.split(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])", name) if word]
        if part := next((word for word in words if word in known), None):
            words.remove(part)
            found.setdefault(tuple(words), {})[name] = part in training
    return [name for group in found.values() if len({*group.values()}) > 1 for name in group]


def like_pieces(names: Iterable[str]) -> bool:
    """Whether names number the pieces of one set (``images_001``, ``images_002``); ``class_1`` may well be a class."""
    ends = [re.fullmatch(r"(.*?([^\W\d_]+))[\W_]*\d+\W*", name.casefold()) for name in names]
    stems = {(end[1], end[2]) if end else ("", "") for end in ends}
    return len(ends) > 1 and len(stems) == 1 and stems.pop()[1] in PIECES


def subfolders(root: Path) -> list[str]:
    """The folders in a folder that may hold images: no hidden ones, none of ``JUNK``; raises UserError."""
    with _entries(root) as entries:
        return sorted(entry.name for entry in entries if is_folder(entry) and not is_junk(entry.name))


def unread(root: Path, names: Iterable[str], used: Iterable[str]) -> str | None:
    """The line that names what lies beside the parts that are read, if there is anything."""
    rest = [name for name in names if name not in {*used}]
    if not rest:
        return None
    way = "; evaluate a trained model on the test part with --split test" * ("test" in find_splits(rest))
    return printable(f"{root}: not read: {some(rest)}") + way


@dataclass
class Listing:
    """What lies below a folder.

    Attributes:
        files: Those that are read, by their paths below it.
        others: Numbers of the others by their endings.
        left_out: Folders that are not entered, with the reason.
        entered: Folders directly below it.
    """

    files: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, str] = field(default_factory=dict)
    entered: list[str] = field(default_factory=list)

    def lines(self, root: Path | str) -> list[str]:
        """What is said of the rest."""
        lines = []
        if self.left_out:
            names = [f"{name} ({why})" for name, why in sorted(self.left_out.items())]
            lines.append(f"{printable(str(root))}: folders left out: {printable(some(names))}")
        used = {name.partition(os.sep)[0] for name in self.files}
        if empty := sorted(f"{name}/" for name in self.entered if name not in used):
            lines.append(f"{printable(str(root))}: no images in {printable(some(empty))}")
        if self.others:
            lines.append(f"{printable(str(root))}: not read: {passed_over(self.others)}")
        return lines


def passed_over(others: Counter[str]) -> str:
    """Numbers of files by their endings, in words."""
    parts = [
        f"{count:,} file{'s' * (count > 1)} {f'ending in {ending}' if ending else 'without an ending'}"
        for ending, count in sorted(others.items(), key=lambda item: (-item[1], item[0]))
    ]
    heic = " (pip install pillow-heif reads HEIC)" if {".heic", ".heif"} & set(others) else ""
    return printable(some(parts)) + heic


def count_other(name: str, others: Counter[str]) -> None:
    """Counts a file that is not read, unless it is hidden or a file manager's."""
    if name.startswith(".") or name.casefold() in LITTER:
        return
    others[DRAWN if name.endswith(DRAWN) else os.path.splitext(name)[1].lower()] += 1


def listed(root: Path, extensions: tuple[str, ...]) -> Listing:
    """All files below a folder with some extensions, in any case; links are followed.

    Hidden folders and those of ``JUNK``, run folders and reports of this package, and links that lead back are left
    out. In each folder directly below the root, every folder is entered once.

    Raises:
        UserError: Folders that may not be read.
    """
    found = Listing()
    waiting, closed = [("", above(root))], []
    linked: list[tuple[str, set[tuple[int, int]]]] = []
    while waiting or linked:
        below, entered = waiting.pop() if waiting else linked.pop(0)  # links last: what they repeat has been entered
        place = os.path.join(root, below)
        try:
            key = identity(place)
            if below and key in entered:
                found.left_out[below.rstrip("/")] = "a link to what is read already"
                continue
            entered = entered if below.count("/") > 1 else entered | {key}
            entered.add(key)
            if not os.access(place, os.R_OK | os.X_OK):
                raise PermissionError
            with os.scandir(place) as scanned:
                entries = list(scanned)
        except OSError:
            closed.append(place.rstrip(os.sep))
            continue
        names = {entry.name for entry in entries}
        if below and (what := result(names)):
            found.left_out[below.rstrip("/")] = what
            continue
        if below.count(os.sep) == 1:
            found.entered.append(below.rstrip(os.sep))
        for entry in entries:
            path = below + entry.name
            if is_folder(entry):
                if is_junk(entry.name):
                    found.left_out[path] = "hidden" if entry.name.startswith(".") else "made by a system"
                else:
                    (linked if entry.is_symlink() else waiting).append((f"{path}/", entered))
            elif ends_in(entry.name, extensions):
                found.files.append(path)
            else:
                count_other(entry.name, found.others)
        linked.sort(key=lambda item: item[0])
    if closed:
        raise UserError(f"folders that may not be read: {some(sorted(closed))}: change their permissions")
    return found


def result(names: set[str]) -> str | None:
    """What a folder with these files is, if this package has made it."""
    return "a run" if names >= RUN else "a report" if REPORT in names else None


def above(root: str | Path) -> set[tuple[int, int]]:
    """The ``identity`` of all folders around one, to which no link in it may lead."""
    return {identity(path) for path in Path(root).resolve().parents}


def identity(path: str | Path) -> tuple[int, int]:
    """What tells a folder from others, whatever links lead to it; raises OSError."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def is_junk(name: str) -> bool:
    """Whether a folder is hidden or one of ``JUNK``."""
    return name.startswith(".") or name.casefold() in JUNK


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or leads to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def ends_in(name: str, extensions: tuple[str, ...]) -> bool:
    """Whether a file is one of those that are read: not hidden, and not drawn by ``predict``."""
    return os.path.splitext(name)[1].lower() in extensions and not name.startswith(".") and not name.endswith(DRAWN)


def _entries(root: Path) -> AbstractContextManager[Iterator[os.DirEntry[str]]]:
    with attempt(f"read the folder {root}"):
        return os.scandir(root)
