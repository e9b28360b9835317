"""``conv2former convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from conv2former_cli.common import app, tell


@app.command()
def convert(
    src: Annotated[Path, Argument(help="Checkpoint of the authors or timm's train.py (.pth.tar, .pth, .safetensors).")],
    dst: Annotated[Path, Argument(help="Folder to make.")],
    model: Annotated[str, Option(help="What it is, conv2former_t for example.")],
    normalisation: Annotated[
        Literal["imagenet", "half"] | None,
        Option(
            help="Mean and std that the weights expect: ImageNet's, or 0.5 (default: the file's own, or ImageNet's)."
        ),
    ] = None,
    ema: Annotated[bool, Option(help="Prefer averaged weights where the file has both.")] = True,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace DST.")] = False,
) -> None:
    """Turn the authors' checkpoint into a folder for timm's local-dir: without running code that is in it.

    Example: conv2former convert conv2former_t.pth.tar weights/t --model conv2former_t
    """
    from conv2former.checkpoints import convert as run_convert

    tell(*str(run_convert(src, dst, model=model, mean_std=normalisation, ema=ema, overwrite=overwrite)).split("\n"))
    tell(f"load it with timm.create_model('local-dir:{dst}', pretrained=True)")
