"""Commands that list what there is, and convert what others made."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from conv2former_cli.common import JsonOption, app, percent, print_table


@app.command()
def models(
    variants: Annotated[
        bool, typer.Option("--variants", help="Also the paper's other kernel and image sizes.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    json_: JsonOption = False,
) -> None:
    """List the models with parameters, multiply-adds and the paper's accuracy.

    Example: conv2former models --variants
    """
    from conv2former.models import zoo

    rows = zoo.rows(variants=variants)
    if json_:
        print(json.dumps([row.to_json() for row in rows], indent=2))
    elif markdown:
        print(zoo.to_markdown(rows))
    else:
        columns = ["model", "kernel", "image", "parameters", "MACs (G)", "paper top-1", "with 22k", "origin"]
        cells = [
            [
                row.name,
                str(row.kernel_size),
                str(row.image_size),
                f"{row.params:,}",
                f"{row.macs / 1e9:.3f}",
                percent(row.paper_top1),
                percent(row.paper_top1_22k),
                row.origin,
            ]
            for row in rows
        ]
        print_table(columns, cells, right=range(1, 7))


@app.command()
def recipes(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    json_: JsonOption = False,
) -> None:
    """List the recipes that come with the package.

    Example: conv2former recipes --json
    """
    from conv2former.recipes.load import load_recipe, recipe_names

    loaded = [load_recipe(name) for name in recipe_names()]
    if json_:
        print(json.dumps([recipe.model_dump(mode="json") for recipe in loaded], indent=2))
        return
    cells = [
        [
            recipe.name,
            recipe.model.name,
            recipe.claim.source,
            percent(recipe.claim.paper),
            recipe.claim.measured if isinstance(recipe.claim.measured, str) else percent(recipe.claim.measured),
        ]
        for recipe in loaded
    ]
    columns = ["recipe", "model", "source", "paper", "measured"]
    if markdown:
        for row in (columns, ["---"] * len(columns), *cells):
            print(f"| {' | '.join(row)} |")
    else:
        print_table(columns, cells, right=(3, 4))


class Normalisation(StrEnum):
    """Mean and standard deviation that a checkpoint expects."""

    imagenet = "imagenet"
    half = "half"


@app.command()
def convert(
    src: Annotated[
        Path, typer.Argument(help="A checkpoint of the authors or of timm's train.py (.pth.tar, .pth, .safetensors).")
    ],
    dst: Annotated[Path, typer.Argument(help="Folder to make.")],
    model: Annotated[str, typer.Option(help="What it is, conv2former_t for example.")],
    normalisation: Annotated[
        Normalisation, typer.Option(help="Mean and std that the weights expect: ImageNet's, or 0.5.")
    ] = Normalisation.imagenet,
    ema: Annotated[bool, typer.Option(help="Prefer averaged weights where the file has both.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST.")] = False,
) -> None:
    """Turn the authors' checkpoint into a folder for timm's local-dir: without running code that is in it.

    Example: conv2former convert conv2former_t.pth.tar weights/t --model conv2former_t
    """
    from conv2former.checkpoints import convert as run_convert

    report = run_convert(src, dst, model=model, mean_std=normalisation.value, ema=ema, overwrite=overwrite)
    print(report)
    print(f"load it with timm.create_model('local-dir:{dst}', pretrained=True)")
