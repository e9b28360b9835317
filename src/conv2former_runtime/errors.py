"""The exception for a user's mistake, and texts of files that a terminal is to see."""

import contextlib
import json
import os
import sys
from typing import Any

LONGEST = 2000  # characters of a message


class UserError(ValueError):
    """A mistake in what the user gave: a path, an image, a checkpoint, an option.

    The message is one line that says what is wrong and what to do about it. The command line prints it without a
    traceback and exits with a non-zero status; any other exception is a bug of ours and keeps its traceback. What it
    quotes of files is escaped and cut short (``printable``), so that it stays one line.
    """

    def __str__(self) -> str:
        text = printable(super().__str__())
        return text if len(text) <= LONGEST else f"{text[: LONGEST - 100]} ... {text[-90:]}"


def printable(text: str) -> str:
    """Escapes line ends, control characters and the undecodable bytes of file names: no terminal is to see them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def json_line(row: dict[str, Any]) -> str:
    """A row as JSON in one line; escaped if a name holds what no terminal is to see, or bytes that are no text."""
    text = json.dumps(row, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(row)


def tell(*lines: str) -> None:
    """Prints lines to stdout, each of them one line whatever it quotes."""
    print(*map(printable, lines), sep="\n")


def say(*lines: str) -> None:
    """Prints lines to stderr, as ``tell`` does. That nobody reads any more is no reason to end a training."""
    try:
        print(*map(printable, lines), sep="\n", file=sys.stderr, flush=True)
    except (OSError, ValueError):  # a reader, a terminal or a connection that is gone
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
