"""``conv2former doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

from conv2former_cli.common import app


@app.command()
def doctor(
    warm: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Also compile the GPU kernels of this network ahead.", show_default=False),
    ] = None,
    size: Annotated[int, typer.Option(min=32, help="Side of the images that --warm is for, pixels.")] = 224,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32, for --warm.")] = "bfloat16",
) -> None:
    """Say what is installed, what computes the operations and why.

    Example: conv2former doctor --warm conv2former_t
    """
    from conv2former.tools.doctor import report
    from conv2former.tools.doctor import warm as compile_ahead

    print("\n".join(report()))
    if warm:
        print(compile_ahead(warm, size=size, dtype=dtype))
