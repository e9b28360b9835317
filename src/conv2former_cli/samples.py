"""``conv2former samples``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from conv2former_cli.common import app, tell

Kind = StrEnum("Kind", ["classification", "segmentation", "detection"])  # what the images are for


@app.command()
def samples(
    kind: Annotated[Kind, Argument(help="The task that the images are for.")],
    folder: Annotated[Path, Argument(help="A new folder.")],
    count: Annotated[int, Option(min=5, help="Images; for classification, images per class.")] = 60,
    seed: Annotated[int, Option(min=0, help="Another one draws other images.")] = 0,
) -> None:
    """Make a small data set to try the commands on; nothing is downloaded.

    Example: conv2former samples segmentation data/cracks
    """
    from conv2former.tools.samples import write_samples

    tell(f"{folder}: {write_samples(kind.value, folder, count=count, seed=seed)}")
