"""``conv2former train``."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from typer import Option
from typer.core import TyperCommand

from conv2former_cli.common import BadImages, DataOption, app, result_line

Resume = StrEnum("Resume", ["yes", "auto"])  # what to do with a run that is there


class TrainCommand(TyperCommand):
    """Takes ``--resume`` alone for ``--resume yes``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts the value in where it was left out."""
        pairs = zip(args, [*args[1:], ""], strict=True)
        full = [f"{word}=yes" if word == "--resume" and value not in list(Resume) else word for word, value in pairs]
        return super().parse_args(ctx, full)


@app.command(cls=TrainCommand)
def train(
    recipe: Annotated[str | None, Option(help="Recipe name, or a .yaml file of your own.")] = None,
    data: DataOption = None,
    out: Annotated[Path | None, Option(help="Run folder to make.")] = None,
    model: Annotated[str | None, Option(help="Another timm model under the same recipe.")] = None,
    set_: Annotated[
        list[str] | None, Option("--set", metavar="SECTION.KEY=VALUE", help="Change the recipe; repeatable.")
    ] = None,
    resume: Annotated[
        Resume | None, Option(metavar="[auto]", help="Continue the run in --out; 'auto' starts it where there is none.")
    ] = None,
    force: Annotated[bool, Option("--force", help="With --resume: allow other settings or images.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the run in --out.")] = False,
    on_bad_image: Annotated[BadImages | None, Option(help="Same as --set data.on_bad_image=...")] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print what would be done; --out is then a plot (.png) or its folder.")
    ] = False,
) -> None:
    """Train a recipe on a folder of images: class folders, COCO's layout or images with masks, as it says.

    Exit status: 0 when done, 75 when stopped by SIGTERM or SIGUSR1 with the state saved (run again with --resume),
    130 after Ctrl-C likewise, 1 on an error.

    Example: conv2former train --recipe cifar --data cifar10 --out runs/cifar --set schedule.epochs=10
    """
    from conv2former.errors import UserError
    from conv2former.recipes.load import load_recipe

    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    # another model does not take the arguments that the recipe's own model needs; --set may give it some
    overrides = [*([f"model.name={model}", "model.args={}"] if model else []), *(set_ or [])]
    overrides += [f"data.on_bad_image={on_bad_image.value}"] if on_bad_image else []
    own = out / "recipe.yaml" if resume and out else None
    if overrides and recipe is None and own and own.exists():
        recipe = str(own)
    if overrides and recipe is None:
        raise UserError("--set and --model change a recipe: name it with --recipe")
    if force and not resume:
        raise UserError("--force requires --resume: it goes on with a run")
    loaded = load_recipe(recipe, overrides=overrides) if recipe else None
    if dry_run:
        from conv2former.engine.dry_run import dry_run as describe

        if loaded is None or resume or overwrite:
            raise UserError("--dry-run plans a recipe: name it with --recipe, leave --resume and --overwrite out")
        print(describe(loaded, data=data, out=out))
        return
    if out is None:
        raise UserError("no run folder given: name one with --out DIR")

    from conv2former.engine.train import Interrupted
    from conv2former.engine.train import train as run_train

    try:
        going_on: Any = "auto" if resume == Resume.auto else bool(resume)
        evaluation = run_train(loaded, data=data, out=out, resume=going_on, overwrite=overwrite, force=force)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.code)
    if evaluation:
        print(result_line(evaluation, "weights, metrics and plots", out))
