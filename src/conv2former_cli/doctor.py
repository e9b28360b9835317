"""``conv2former doctor``."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from conv2former_cli.common import app, tell


@app.command()
def doctor(
    warm: Annotated[str | None, Option(metavar="MODEL", help="Also compile this network's GPU kernels ahead.")] = None,
    size: Annotated[int, Option(min=32, help="Side of the images that --warm is for, pixels.")] = 224,
    dtype: Annotated[str, Option(help="bfloat16, float16 or float32, for --warm.")] = "bfloat16",
) -> None:
    """Say what is installed, what computes the operations and why.

    Example: conv2former doctor --warm conv2former_t
    """
    from conv2former.tools import doctor

    tell(*doctor.report())
    if warm:
        tell(doctor.warm(warm, size=size, dtype=dtype))
