"""``conv2former explain``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from conv2former_cli.common import (
    DeviceOption,
    InputsArgument,
    JsonOption,
    SavedArgument,
    app,
    print_table,
    tell,
    wrote,
)

explain = typer.Typer(
    help="Show what a network looks at: modulation weights, class activation, receptive fields, kernels. "
    "Example: conv2former explain maps runs/cifar photos/ --out explained",
    no_args_is_help=True,
    context_settings=app.info.context_settings,
)
app.add_typer(explain, name="explain")

StageOption = Annotated[list[int] | None, Option(min=1, help="From 1; repeatable (default: all).")]
BlockOption = Annotated[
    list[int] | None, Option(help="Of each stage, from 1, -1 for the last; repeatable (default: -1).")
]
SheetsOption = Annotated[Path, Option("--out", help="Folder for a sheet each.")]


@explain.command()
def maps(
    checkpoint: SavedArgument,
    inputs: InputsArgument,
    out: SheetsOption,
    stage: StageOption = None,
    block: BlockOption = None,
    channels: Annotated[int, Option(min=0, help="Channels of A that are drawn beside all together.")] = 3,
    device: DeviceOption = "auto",
) -> None:
    """Draw the modulation weights A and the product A * V over images; of any task's Conv2Former.

    Prints a JSON line per file; the exit status is 1 where one could not be read.

    Example: conv2former explain maps runs/cifar photos/ --out explained --stage 3 --stage 4
    """
    from conv2former.tools.explain.maps import run_maps

    sys.exit(run_maps(checkpoint, inputs, out=out, stages=stage, blocks=block, channels=channels, device=device))


@explain.command()
def cam(
    checkpoint: SavedArgument,
    inputs: InputsArgument,
    out: SheetsOption,
    method: Annotated[
        str | None,
        Option(
            help="gradcam, gradcam++, xgradcam, hirescam, layercam, eigencam (default: gradcam; eigencam of a "
            "detector, which has no other)."
        ),
    ] = None,
    class_: Annotated[
        str | None,
        Option("--class", metavar="NAME_OR_INDEX", help="What to look for (default: the class that the model finds)."),
    ] = None,
    stage: Annotated[int | None, Option(min=1, help="Whose map is taken, from 1 (default: the last).")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Draw class activation maps over images: the evidence for a class; of any model and task.

    Prints a JSON line per file; the exit status is 1 where one could not be read or does not show the class.

    Example: conv2former explain cam runs/cifar photos/ --out explained --class cat
    """
    from conv2former.tools.explain.cams import run_cams

    sys.exit(run_cams(checkpoint, inputs, out=out, method=method, target=class_, stage=stage, device=device))


@explain.command()
def field(
    models: Annotated[list[str], Argument(help="timm models, as in conv2former_t:kernel_size=21, and checkpoints.")],
    data: Annotated[Path, Option(help="Folder of images.")],
    out: Annotated[Path, Option(help="Folder for rows, table and figure.")],
    images: Annotated[int, Option(min=1, help="Images to average over; fewer than 50 are noted.")] = 50,
    size: Annotated[int, Option(min=32, help="Side that images are brought to, pixels.")] = 224,
    device: DeviceOption = "auto",
    json_: JsonOption = False,
) -> None:
    """Measure effective receptive fields, stage by stage, as in RepLKNet's table; one figure on one scale.

    Example: conv2former explain field conv2former_t:ls_init_value=1 runs/cifar --data photos/ --out fields
    """
    from conv2former.tools.explain import field_report

    rows, files = field_report.run_field(models, data, out=out, images=images, size=size, device=device)
    if json_:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    tell(*field_report.conditions(rows))
    columns = field_report.columns(rows)
    print_table(columns, field_report.cells(rows), right=range(field_report.LEFT, len(columns)))
    tell(wrote(files, out))


@explain.command()
def kernels(checkpoint: SavedArgument, out: SheetsOption, stage: StageOption = None, block: BlockOption = None) -> None:
    """Draw the learned depthwise kernels of the modulation, a sheet for each block.

    Example: conv2former explain kernels runs/cifar --out kernels --stage 1 --block 1 --block -1
    """
    from conv2former.tools.explain.kernels import draw_kernels

    tell(wrote(draw_kernels(checkpoint, out, stages=stage, blocks=block), out))
