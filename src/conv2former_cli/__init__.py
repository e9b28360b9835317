"""The command line. It parses, imports lazily and calls one function.

It stands beside the package and not in it, because importing the package registers models and therefore imports torch
and timm, which takes seconds: ``conv2former --help`` must not wait for that.
"""

from __future__ import annotations

import importlib.util
import os
import sys

# isort: off
# each adds its command to the program; --help lists them in this order
from conv2former_cli import (
    train, plot, evaluate, predict, explain, demo, reproduce, export, push, models, recipes, convert, benchmark, doctor
)  # fmt: skip

# isort: on
from conv2former_cli.common import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point: a user's mistake ends in one line and status 1, ours in a traceback."""
    try:
        app()
    except BrokenPipeError:
        # whoever reads our output has gone (`| head`); keep the interpreter from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ModuleNotFoundError as error:
        package = (error.name or "conv2former").partition(".")[0]
        if package == "conv2former" or importlib.util.find_spec(package):  # ours, or an old release of a package
            raise
        name = {"yaml": "pyyaml", "PIL": "pillow"}.get(package, package.replace("_", "-"))
        print(f"error: {name} is not installed, and conv2former needs it: pip install {name}", file=sys.stderr)
        sys.exit(1)
    except (ValueError, RuntimeError) as error:
        # the class is imported only where something went wrong, so that --help stays quick
        from conv2former.errors import UserError

        if "DataLoader worker (pid" in str(error):
            from conv2former.data.loading import killed_reader

            error = killed_reader(error) or error
        if type(error).__name__ == "OutOfMemoryError":
            error = UserError("out of GPU memory: lower --batch-size (of a classifier), or use --device cpu")
        if not isinstance(error, UserError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
