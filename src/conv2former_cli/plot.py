"""``conv2former plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from conv2former_cli.common import app, tell


@app.command()
def plot(
    runs: Annotated[list[Path], Argument(help="Run folders, also of runs that still go on.")],
    out: Annotated[
        Path | None,
        Option(
            help="File to write, .png, .svg or .pdf (default: learning_curves.png in the run, comparison.png here for "
            "several)."
        ),
    ] = None,
    x: Annotated[
        Literal["epoch", "step", "minutes"],
        Option("--x", help="What to draw over; minutes are those of training alone."),
    ] = "epoch",
) -> None:
    """Draw the learning curves of a run, or of several in one figure.

    Example: conv2former plot runs/cifar runs/other --out comparison.png
    """
    from conv2former.tools.plot import plot_runs

    tell(f"learning curves are in {plot_runs(runs, out=out, x=x)}")
