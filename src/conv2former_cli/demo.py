"""``conv2former demo``."""

from __future__ import annotations

from typing import Annotated

import typer

from conv2former_cli.common import DeviceOption, app


@app.command()
def demo(
    checkpoints: Annotated[
        list[str],
        typer.Argument(help="Run folders, saved models, folders of these; timm's names of models with random weights."),
    ],
    host: Annotated[str, typer.Option(help="Address to listen at; by default of this computer alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any free one.")] = 7860,
    max_upload_mb: Annotated[float, typer.Option(min=0.001, max=1000, help="Largest file of a picture.")] = 20,
    max_pixels: Annotated[int, typer.Option(min=1, help="Largest picture.")] = 25_000_000,
    device: DeviceOption = "auto",
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Show the page in the browser.")] = False,
) -> None:
    """Serve a page that shows what trained models find on one's own pictures, with maps and times; Ctrl-C ends it.

    Example: conv2former demo runs/cifar runs/camvid
    """
    from conv2former.tools.demo.server import run_demo

    def say(line: str) -> None:
        print(line, flush=True)

    run_demo(
        checkpoints,
        host=host,
        port=port,
        max_upload_mb=max_upload_mb,
        max_pixels=max_pixels,
        device=device,
        open_browser=open_,
        say=say,
    )
