"""``conv2former samples``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from conv2former_cli.common import app, tell


@app.command()
def samples(
    kind: Annotated[
        Literal["classification", "segmentation", "detection"], Argument(help="The task that the images are for.")
    ],
    folder: Annotated[Path, Argument(help="A new folder.")],
    count: Annotated[int, Option(min=5, help="Images; for classification, images per class.")] = 60,
    seed: Annotated[int, Option(min=0, help="Another one draws other images.")] = 0,
) -> None:
    """Make a small data set to try the commands on; nothing is downloaded.

    Example: conv2former samples segmentation data/cracks
    """
    from conv2former.tools.samples import write_samples

    tell(f"{folder}: {write_samples(kind, folder, count=count, seed=seed)}")
