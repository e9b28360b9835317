"""``conv2former evaluate``."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from conv2former_cli.common import BadImages, CheckpointArgument, DataOption, DeviceOption, JsonOption, app, result_line


class Source(StrEnum):
    """How labelled images lie."""

    folder = "folder"
    tar = "tar"
    wds = "wds"
    hfds = "hfds"


@app.command()
def evaluate(
    checkpoint: CheckpointArgument,
    data: DataOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the report (default: the run).")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per forward pass of a classifier (default: 64).")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 2,
    device: DeviceOption = "auto",
    source: Annotated[
        Source | None, typer.Option(help="Layout of a classifier's --data: class folders (the default), tar files, ...")
    ] = None,
    on_bad_image: Annotated[BadImages, typer.Option(help="'skip' leaves out what cannot be read.")] = BadImages.error,
    multi_scale: Annotated[
        bool, typer.Option("--multi-scale", help="Segmentation: six scales of each image, also mirrored.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="data.KEY=VALUE", help="How a detector's or segmenter's --data lies; repeatable."
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Count what a trained model gets right: accuracies of a classifier, COCO's 12 numbers, mIoU; draw pictures.

    Example: conv2former evaluate runs/cifar --data cifar10
    """
    from conv2former.engine.evaluate import evaluate as run_evaluate

    evaluation, folder = run_evaluate(
        checkpoint,
        data=data,
        out=out,
        batch_size=batch_size,
        workers=workers,
        device=device,
        source=source.value if source else None,
        on_bad_image=on_bad_image.value,
        multi_scale=multi_scale,
        settings=tuple(set_ or []),
    )
    print(json.dumps(evaluation.details) if json_ else result_line(evaluation, "figures and pictures", folder))
