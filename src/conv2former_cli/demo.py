"""``conv2former demo``."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from typer import Argument, Option

from conv2former_cli.common import DeviceOption, app


@app.command()
def demo(
    checkpoints: Annotated[
        list[str],
        Argument(help="Run folders, saved models, folders of these; timm's names of models with random weights."),
    ],
    host: Annotated[str, Option(help="Address to listen at; by default of this computer alone.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0 for any free one.")] = 7860,
    max_upload_mb: Annotated[float, Option(min=0.001, max=1000, help="Largest file of an image.")] = 20,
    max_pixels: Annotated[int, Option(min=1, help="Largest image.")] = 25_000_000,
    device: DeviceOption = "auto",
    open_: Annotated[bool, Option("--open/--no-open", help="Show the page in the browser.")] = False,
) -> None:
    """Serve a page that shows what trained models find on one's own images, with maps and times; Ctrl-C ends it.

    Example: conv2former demo runs/cifar runs/camvid
    """
    from conv2former.tools.demo.server import run_demo

    run_demo(
        checkpoints,
        host=host,
        port=port,
        max_upload_mb=max_upload_mb,
        max_pixels=max_pixels,
        device=device,
        open_browser=open_,
        say=partial(print, flush=True),
    )
