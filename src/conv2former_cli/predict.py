"""``conv2former predict``."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated

from typer import Option

from conv2former_cli.common import CheckpointArgument, DeviceOption, FuseOption, InputsArgument, app


@app.command()
def predict(
    checkpoint: CheckpointArgument,
    inputs: InputsArgument,
    out: Annotated[Path | None, Option(help="Folder for an annotated copy of each image.")] = None,
    masks: Annotated[
        Path | None, Option(help="Folder for a mask of each image, with the values of the data set's own masks (.png).")
    ] = None,
    out_file: Annotated[
        Path | None,
        Option(help="File for the lines; a command that was stopped goes on there, and torchrun's processes share it."),
    ] = None,
    top_k: Annotated[int | None, Option(min=1, help="Classes that a classifier names (default: 5).")] = None,
    threshold: Annotated[float | None, Option(min=0, max=1, help="Least score of a detection (default: 0.3).")] = None,
    batch_size: Annotated[int | None, Option(min=1, help="Images a classifier sees at once (default: 16).")] = None,
    workers: Annotated[int, Option(min=0, max=256, help="Processes that read images.")] = 0,
    device: DeviceOption = "auto",
    fuse: FuseOption = True,
) -> None:
    """Classify, detect or segment what is on images: one JSON line per file on standard output.

    Example: conv2former predict runs/cifar photo.jpg holiday/ --out annotated
    """
    from conv2former.engine.predict import run_predict

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale: JSON is UTF-8
    sys.exit(
        run_predict(
            checkpoint,
            inputs,
            out=out,
            masks=masks,
            out_file=out_file,
            batch_size=batch_size,
            workers=workers,
            device=device,
            fuse=fuse,
            top_k=top_k,
            threshold=threshold,
        )
    )
