"""``conv2former push``."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from conv2former_cli.common import SavedArgument, app, tell


@app.command()
def push(
    checkpoint: SavedArgument,
    repo: Annotated[str, Argument(help="OWNER/NAME on the hub.")],
    private: Annotated[bool, Option("--private", help="A new repository is private.")] = False,
    message: Annotated[str, Option(help="Of the commit.")] = "",
) -> None:
    """Upload a trained model to the Hugging Face hub, with its card, as timm's hf-hub: reads it.

    Example: conv2former push runs/cifar OWNER/conv2former-cifar --private
    """
    from conv2former.tools.push import push as run_push

    tell(run_push(checkpoint, repo, private=private, message=message))
