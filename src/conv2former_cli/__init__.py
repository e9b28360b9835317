"""The command line. It parses, imports lazily and calls one function.

It stands beside the package and not in it, because importing the package registers models and therefore imports torch
and timm, which takes seconds: ``conv2former --help`` must not wait for that.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import sys

# before torch is imported: its warning of a connection that broke is a stack of C++, beside our line
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.pop("MPLBACKEND", None)  # figures are drawn without a window, whatever the shell asks for

# isort: off
# each adds its command to the program; --help lists them in this order
from conv2former_cli import (
    train, plot, evaluate, predict, explain, demo, reproduce, export, push, models, recipes, convert, samples,
    benchmark, doctor,
)  # fmt: skip

# isort: on
from conv2former_cli.common import app, say

__all__ = ["app", "main"]


ADVICE = {
    errno.ENOSPC: "the disk is full: make room, or write to another one",
    errno.EDQUOT: "your quota of disk space is used up: make room, or write to another disk",
    errno.EMFILE: "too many open files: raise the limit with `ulimit -n 65536`, or lower the number of workers",
    errno.EROFS: "the file system is read-only: write to another one",
}


def _of_the_system(error: OSError) -> str:
    """What the system refuses, in one line with what to do."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOENT and not error.filename:
        return "the working folder is gone: go to another one"
    return where + (ADVICE.get(error.errno or 0) or error.strerror or " ".join(str(error).split()))


def _print_error(line: str) -> None:
    say(f"error: {line}")


def _at_home(word: str) -> str:
    """A word with the user's folder for a ``~/`` at its beginning or behind a ``=``, where shells leave it."""
    key, tilde, rest = word.partition("~/")
    return key + os.path.expanduser(f"~/{rest}") if tilde and (not key or key.endswith("=")) else word


def _open_closed_streams() -> None:
    """Gives standard streams that are closed (``>&-``) to the system's bin: Python has None in their place."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w"))


def main() -> None:
    """Entry point: a user's mistake ends in one line and status 1, ours in a traceback."""
    _open_closed_streams()
    sys.argv[1:] = map(_at_home, sys.argv[1:])
    try:
        os.getcwd()  # a folder that is gone ends MKL, and this process with it
        try:
            app()
        finally:
            sys.stdout.flush()  # here, where an error can be met, and not while the interpreter ends
    except OSError as error:
        # keep the interpreter from complaining at exit about what could not be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # else whoever reads our output has gone (`| head`)
            _print_error(_of_the_system(error))
        sys.exit(1)
    except ModuleNotFoundError as error:
        package = (error.name or "conv2former").partition(".")[0]
        if package == "conv2former" or importlib.util.find_spec(package):  # ours, or an old release of a package
            raise
        name = {"yaml": "pyyaml", "PIL": "pillow"}.get(package, package.replace("_", "-"))
        _print_error(f"{name} is not installed, and conv2former needs it: pip install {name}")
        sys.exit(1)
    except (ValueError, RuntimeError) as error:
        from conv2former.errors import UserError

        if "DataLoader worker (pid" in str(error):
            from conv2former.data.loading import killed_reader

            error = killed_reader(error) or error
        if type(error).__name__ == "OutOfMemoryError":
            error = UserError("out of GPU memory: lower --batch-size (of a classifier), or use --device cpu")
        if not isinstance(error, UserError):
            raise
        _print_error(str(error))
        sys.exit(1)
