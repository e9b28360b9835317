"""The wording of messages, and lines that one process prints. ``UserError`` is a user's mistake."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import reprlib
import shlex
from collections.abc import Iterable, Iterator, Sequence

from conv2former_runtime.errors import UserError, printable, say

RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")  # of torchrun, SLURM, and Lightning's own launcher


def nearest(word: str, known: Sequence[str]) -> str:
    """``; did you mean 'X'?`` for the closest known word, or nothing."""
    match = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def nearest_or_all(word: str, known: Sequence[str]) -> str:
    """``nearest``, or ``; there are: `` and all of them where none is close."""
    return nearest(word, known) or f"; there are: {', '.join(known)}"


def resume_command(run: object) -> str:
    """What to paste to go on with the run in a folder."""
    return f"conv2former train --out {shlex.quote(str(run))} --resume"


def some(items: Sequence[str], limit: int = 5) -> str:
    """The first few of a list, and how many more there are."""
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def visible(name: str) -> str:
    """A name, in quotes where spaces around it would not be seen."""
    return name if name == name.strip() and name else repr(name)


def plural(number: int, thing: str, things: str | None = None) -> str:
    """``1 step``, ``2 steps``."""
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"


def percent(value: float | None) -> str:
    """A cell of a table; empty where a number is not defined."""
    return "" if value is None else f"{value:.1f}"


def one_line(error: BaseException) -> str:
    """An exception's text without line breaks; its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def shortened(value: object) -> str:
    """The beginning of a value as Python writes it; a value from a file may be long, wide and deep."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def in_markdown(text: object) -> str:
    """A text, whoever has written it, as Markdown that shows it as it is, on one line and also in a table."""
    shown = printable(str(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    shown = shown.replace("://", "&#58;//").replace("www.", "www&#46;")  # no links either
    return re.sub(r"([\\`*\[\]|!~$])|(?<![^\W_])_|_(?![^\W_])", lambda mark: "\\" + mark[0], shown)


def markdown_row(cells: Iterable[object]) -> str:
    """A line of a table in Markdown."""
    return f"| {' | '.join(map(in_markdown, cells))} |"


def is_first() -> bool:
    """Whether this is the first process of a run, even before the processes are connected."""
    return next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0"


def say_once(line: str) -> None:
    """Prints a line to stderr, on the first process alone."""
    if is_first():
        say(line)


@contextlib.contextmanager
def attempt(what: str, advice: str = "") -> Iterator[None]:
    """Raises ``UserError`` in the place of what the disk refuses: ``cannot {what}: reason``."""
    try:
        yield
    except OSError as error:
        file = f" ({error.filename})" if error.filename and str(error.filename) not in what else ""
        raise UserError(f"cannot {what}: {error.strerror or one_line(error)}{file}{advice}") from None


@contextlib.contextmanager
def failing(what: str) -> Iterator[None]:
    """Raises ``UserError`` in the place of whatever other software raises: ``{what}: reason``."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {one_line(error)[:300]}") from error


@contextlib.contextmanager
def or_left_out(what: str) -> Iterator[None]:
    """Says in a line that something cannot be drawn or written: the numbers are there, and a training is at its end.

    What the disk refuses is raised.
    """
    try:
        yield
    except (OSError, KeyboardInterrupt):
        raise
    except Exception as error:  # PIL, matplotlib and a task of somebody's raise nearly anything
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        say_once(f"left out: {what}: {kind}{one_line(error)[:200]}")
