"""``conv2former export``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from conv2former_cli.common import JsonOption, app, print_table


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="Run folder, saved model, or timm model (NAME:key=value,...).")],
    out: Annotated[Path, typer.Option(help="Folder for the files.")],
    format_: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="onnx, openvino, openvino-bf16, openvino-int8, torch, aotinductor; repeatable (default: onnx).",
            show_default=False,
        ),
    ] = None,
    pictures: Annotated[
        list[Path] | None,
        typer.Option(help="Images or folders to compare on (default: the run's); repeatable.", show_default=False),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many of them.")] = 16,
    data: Annotated[
        Path | None, typer.Option(help="Class folders to count top-1 on, before and after.", show_default=False)
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Images that int8 is calibrated on (default: those compared on).")
    ] = None,
    size: Annotated[
        tuple[int, int] | None,
        typer.Option(min=1, metavar="H W", help="Of the images (default: the model's own).", show_default=False),
    ] = None,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="Also take images of other sizes (classifiers).")
    ] = False,
    fuse: Annotated[bool, typer.Option("--fuse/--no-fuse", help="Re-parameterize for inference.")] = True,
    limit: Annotated[
        float | None,
        typer.Option(min=0, help="Largest difference, as a share of the largest output.", show_default=False),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Write a trained model for another runtime, and hold what that runtime computes against PyTorch.

    A difference above the limit is an error (status 1), and the file is not kept.

    Example: conv2former export runs/cifar --format onnx --format openvino --out exported
    """
    from conv2former.tools.export import ExportOptions
    from conv2former.tools.export import export as run_export

    options = ExportOptions(
        formats=format_ or ("onnx",),
        pictures=pictures or (),
        count=count,
        data=data,
        calibration=calibration,
        size=size,
        dynamic_size=dynamic_size,
        fuse=fuse,
        limit=limit,
    )
    found = run_export(checkpoint, out, options, say=lambda line: print(line, file=sys.stderr))
    rows = [one.to_json() for one in found]
    if json_:
        print(json.dumps(rows, indent=2))
    else:
        columns = ["format", "file", "MB", "difference", "limit", "same top class", "top-1 in PyTorch", "top-1"]
        cells = [
            [
                row["format"],
                Path(row["file"]).name,
                f"{row['bytes'] / 1e6:.1f}",
                f"{one.comparison.difference:.1e}",
                f"{row['limit']:g}",
                "" if row["agreement"] is None else f"{100 * row['agreement']:.2f}%",
                f"{row['top1_pytorch']:.2f}%" if "top1" in row else "",
                f"{row['top1']:.2f}%" if "top1" in row else "",
            ]
            for one, row in zip(found, rows, strict=True)
        ]
        print_table(columns, cells, right=range(2, 8))
    failed = [one for one in found if not one.ok]
    for one in failed:
        print(
            f"error: {one.format} differs by {one.comparison.difference:.1e} of the largest output, the limit is "
            f"{one.limit:g}: the file is not kept; raise --limit where that is good enough",
            file=sys.stderr,
        )
    sys.exit(1 if failed else 0)
