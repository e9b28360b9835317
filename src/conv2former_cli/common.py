"""What the commands share: the program, options that several take, and printing."""

from __future__ import annotations

import importlib
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="conv2former",
    help="Conv2Former: train, evaluate, predict, convert. Example: conv2former train --recipe quickstart --out runs/q",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    import_: Annotated[
        list[str] | None,
        typer.Option("--import", metavar="MODULE", help="Import this module of yours first: it may register a task."),
    ] = None,
) -> None:
    for name in import_ or []:
        sys.path.insert(0, os.getcwd())
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            from conv2former.errors import UserError

            raise UserError(f"--import {name}: {error}") from None


DataOption = Annotated[Path | None, typer.Option(help="Folder of images.", show_default=False)]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
CheckpointArgument = Annotated[
    Path, typer.Argument(help="Run folder (its best weights), saved model folder, or its model.safetensors.")
]


class BadImages(StrEnum):
    """What to do about an image that cannot be read."""

    error = "error"
    skip = "skip"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def result_line(evaluation: Any, what: str, folder: Path | None) -> str:
    return evaluation.line + (f"; {what} are in {folder}" if folder else "")


def print_table(columns: list[str], cells: list[list[str]], *, right: Any = ()) -> None:
    # not a rich table: a pipe or a narrow terminal must not cut the names
    widths = [max(len(row[i]) for row in [columns, *cells]) for i in range(len(columns))]
    for row in [columns, *cells]:
        parts = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(parts).rstrip())
