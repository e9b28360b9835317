"""What the commands share: the program, options that several take, and printing."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from conv2former_runtime.errors import printable, say, tell

__all__ = ["say", "tell"]

app = typer.Typer(
    name="conv2former",
    help="Conv2Former: train, evaluate, predict, convert. Example: conv2former train --recipe quickstart --out runs/q",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"conv2former {version('conv2former')}")
        raise typer.Exit


@app.callback()
def options(
    import_: Annotated[
        list[str] | None,
        Option("--import", metavar="MODULE", help="Import this module of yours first: it may register a task."),
    ] = None,
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    if import_:
        sys.path.insert(0, os.getcwd())
    for name in import_ or []:
        if not all(part.isidentifier() for part in name.split(".")) or name.endswith(".py"):
            raise typer.BadParameter(f"{name!r} is no module's name: write it as after `import`, without .py")
        from conv2former.errors import UserError, one_line

        try:
            importlib.import_module(name)
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # whatever somebody's module raises
            absent = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
            where = f"; it must lie in {os.getcwd()} or be installed" if absent else ""
            raise UserError(f"--import {name}: {type(error).__name__}: {one_line(error)}{where}") from error


DataOption = Annotated[Path | None, Option(help="Folder of images.")]
DeviceOption = Annotated[str, Option(help="auto, cpu, cuda, cuda:1, ...")]
FuseOption = Annotated[bool, Option("--fuse/--no-fuse", help="Re-parameterize for inference: the same, faster.")]
JsonOption = Annotated[bool, Option("--json", help="Print JSON instead of a table.")]
SavedArgument = Annotated[Path, Argument(help="Run folder (its best weights), or saved model folder.")]
CheckpointArgument = Annotated[
    Path,
    Argument(help="Run folder (its best weights), saved model folder, or model.safetensors, model.onnx, ..."),
]
InputsArgument = Annotated[list[Path], Argument(help="Images, or folders of images.")]


BadImages = Literal["error", "skip"]  # what to do about an image that cannot be read


def result_line(evaluation: Any, what: str, folder: Path | None) -> str:
    return evaluation.line + (f"; {what} are in {folder}" if folder else "")


def wrote(files: list[Path], folder: Path) -> str:
    return f"{', '.join(path.name for path in files)} are in {folder}"


def print_table(columns: list[str], cells: list[list[str]], *, right: Any = ()) -> None:
    # not a rich table: a pipe or a narrow terminal must not cut the names
    columns, *cells = [[printable(cell) for cell in row] for row in (columns, *cells)]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for row in [columns, *cells]:
        padded = (f"{cell:{'>' if i in right else '<'}{widths[i]}}" for i, cell in enumerate(row))
        print("  ".join(padded).rstrip())
