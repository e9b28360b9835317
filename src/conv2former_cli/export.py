"""``conv2former export``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from conv2former_cli.common import JsonOption, app, print_table, say

FORMATS = "onnx, openvino, openvino-bf16, openvino-int8, torch, aotinductor, runtime, runtime-bf16"


@app.command()
def export(
    checkpoint: Annotated[str, Argument(help="Run folder, saved model, or timm model (NAME:key=value,...).")],
    out: Annotated[Path, Option(help="Folder for the files.")],
    format_: Annotated[
        list[str] | None, Option("--format", help=f"{FORMATS}; one or more, with commas (default: onnx).")
    ] = None,
    images: Annotated[
        list[Path] | None,
        Option("--images", "--pictures", help="Images or folders to compare on (default: the run's); repeatable."),
    ] = None,
    count: Annotated[int, Option(min=1, help="How many of them.")] = 16,
    data: Annotated[Path | None, Option(help="Class folders to count top-1 on, before and after.")] = None,
    calibration: Annotated[Path | None, Option(help="Images to calibrate int8 (default: those compared on).")] = None,
    size: Annotated[
        tuple[int, int] | None, Option(min=1, metavar="H W", help="Of the images (default: the model's own).")
    ] = None,
    dynamic_size: Annotated[bool, Option("--dynamic-size", help="Take other sizes, too (not detectors).")] = False,
    fuse: Annotated[bool, Option("--fuse/--no-fuse", help="Re-parameterize for inference.")] = True,
    tolerance: Annotated[
        float | None, Option("--tolerance", "--limit", min=0, help="As a fraction of the largest output.")
    ] = None,
    agreement: Annotated[
        float | None,
        Option(min=0, max=1, help="Least fraction of images with the same top class, or of objects."),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Write a trained model for another runtime, and compare what that runtime computes with PyTorch.

    A file that differs by more than the tolerances is an error (status 1), and is not kept.

    Example: conv2former export runs/cifar --format onnx --format openvino --out exported
    """
    from conv2former.tools.export import ExportOptions
    from conv2former.tools.export import export as run_export

    options = ExportOptions(
        formats=[name.strip() for names in format_ or ["onnx"] for name in names.split(",")],
        images=images or (),
        count=count,
        data=data,
        calibration=calibration,
        size=size,
        dynamic_size=dynamic_size,
        fuse=fuse,
        tolerance=tolerance,
        agreement=agreement,
    )
    found = run_export(checkpoint, out, options, say=say)
    if json_:
        print(json.dumps([one.to_json() for one in found], indent=2))
    else:
        columns = ["format", "file", "MB", "ms an image", "difference", "tolerance", "images", "same answers"]
        columns += ["top-1 in PyTorch", "top-1"] if data else []
        cells = [
            [
                one.format,
                one.files[0].name,
                f"{one.size / 1e6:.1f}",
                f"{1e3 * one.seconds:.1f}",
                f"{one.comparison.difference:.1e}",
                f"{one.tolerance:g}",
                str(one.comparison.pictures),
                "" if one.comparison.agreement is None else f"{100 * one.comparison.agreement:.2f}%",
                *(f"{percent:.2f}%" for percent in (one.top1 or ())[:2]),
            ]
            for one in found
        ]
        print_table(columns, cells, right=range(2, len(columns)))
    if done := [one.files[0] for one in found if one.ok and one.files[0].suffix != ".pt2"]:  # which may run code
        say(f"next: conv2former predict {shlex.quote(str(done[0]))} IMAGES")
    failed = [one for one in found if not one.ok]
    for one in failed:
        say(f"error: {one.wrong}")
    sys.exit(1 if failed else 0)
