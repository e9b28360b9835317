"""``conv2former push``."""

from __future__ import annotations

from typing import Annotated

import typer

from conv2former_cli.common import CheckpointArgument, app


@app.command()
def push(
    checkpoint: CheckpointArgument,
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.", show_default=False)] = "",
) -> None:
    """Upload a trained model to the Hugging Face hub, with its card, as timm's hf-hub: reads it.

    Example: conv2former push runs/cifar OWNER/conv2former-cifar --private
    """
    from conv2former.tools.push import push as run_push

    print(run_push(checkpoint, repo, private=private, message=message))
