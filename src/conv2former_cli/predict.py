"""``conv2former predict``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from conv2former_cli.common import CheckpointArgument, DeviceOption, app


@app.command()
def predict(
    checkpoint: CheckpointArgument,
    inputs: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    out: Annotated[Path | None, typer.Option(help="Folder for an annotated picture each.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Classes that a classifier names (default: 5).")] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Least score of a detected object (default: 0.3).")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures that a classifier sees at once (default: 16).")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    device: DeviceOption = "auto",
) -> None:
    """Say what is on pictures, classes, objects or regions: one JSON line per file on standard output.

    Example: conv2former predict runs/cifar photo.jpg holiday/ --out annotated
    """
    from conv2former.engine.predict import run_predict

    options = dict(top_k=top_k, threshold=threshold)
    sys.exit(run_predict(checkpoint, inputs, out=out, batch_size=batch_size, workers=workers, device=device, **options))
