"""``conv2former plot``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from conv2former_cli.common import app


class XAxis(StrEnum):
    """What learning curves are drawn over."""

    epoch = "epoch"
    step = "step"
    minutes = "minutes"


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, also of runs that still go on.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Picture to write, .png, .svg or .pdf (default: learning_curves.png in the run, comparison.png here "
            "for several).",
            show_default=False,
        ),
    ] = None,
    x: Annotated[
        XAxis, typer.Option("--x", help="What to draw over; minutes are those of training alone.")
    ] = XAxis.epoch,
) -> None:
    """Draw the learning curves of a run, or of several in one picture.

    Example: conv2former plot runs/cifar runs/other --out comparison.png
    """
    from conv2former.tools.plot import plot_runs

    print(f"learning curves are in {plot_runs(runs, out=out, x=x.value)}")
