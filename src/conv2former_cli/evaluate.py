"""``conv2former evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from conv2former_cli.common import (
    BadImages,
    CheckpointArgument,
    DataOption,
    DeviceOption,
    FuseOption,
    JsonOption,
    app,
    print_table,
    result_line,
    tell,
)

MOST_ROWS = 60  # of a table; what is between is left out


@app.command()
def evaluate(
    checkpoint: CheckpointArgument,
    folder: Annotated[Path | None, Argument(metavar="[DIR]", help="The same as --data.", show_default=False)] = None,
    data: DataOption = None,
    out: Annotated[Path | None, Option(help="Folder for the report (default: the run).")] = None,
    batch_size: Annotated[int | None, Option(min=1, help="Images a classifier sees at once (default: 64).")] = None,
    workers: Annotated[int, Option(min=0, max=256, help="Processes that read images.")] = 2,
    device: DeviceOption = "auto",
    fuse: FuseOption = True,
    source: Annotated[
        str | None, Option(help="Layout of a classifier's --data: class folders (the default), tar files, ...")
    ] = None,
    split: Annotated[
        Literal["train", "val", "test"] | None,
        Option(help="Part of --data, or of what the run was trained on: train, val or test."),
    ] = None,
    on_bad_image: Annotated[BadImages, Option(help="'skip' leaves out what cannot be read.")] = "error",
    multi_scale: Annotated[bool, Option("--multi-scale", help="Segmentation: six scales, also mirrored.")] = False,
    set_: Annotated[
        list[str] | None,
        Option("--set", metavar="data.KEY=VALUE", help="Detection, segmentation: how --data lies; repeatable."),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Count what a trained model gets right: accuracies of a classifier, COCO's 12 numbers, mIoU; draw plots.

    Example: conv2former evaluate runs/cifar --data cifar10
    """
    from conv2former.engine.evaluate import evaluate as run_evaluate
    from conv2former.errors import UserError, is_first

    if folder is not None and data is not None and folder != data:
        raise UserError(f"{folder} and --data {data} are two folders: give one of them")
    evaluation, report = run_evaluate(
        checkpoint,
        data=data or folder,
        out=out,
        batch_size=batch_size,
        workers=workers,
        device=device,
        fuse=fuse,
        source=source,
        split=split,
        on_bad_image=on_bad_image,
        multi_scale=multi_scale,
        settings=tuple(set_ or []),
    )
    if not is_first():  # of several processes one reports
        return
    if not json_ and evaluation.table:
        columns, *rows = evaluation.table
        if len(rows) > MOST_ROWS:
            left_out = len(rows) - MOST_ROWS
            gap = [f"({left_out} more classes: see --json)", *[""] * (len(columns) - 1)]
            rows = [*rows[: MOST_ROWS - 1], gap, rows[-1]]
        print_table(columns, rows, right=range(1, len(columns)))
    if json_:
        print(json.dumps(evaluation.details))
    else:
        tell(result_line(evaluation, "metrics and plots", report))
