"""``conv2former recipes``."""

from __future__ import annotations

import json
from typing import Annotated

from typer import Option

from conv2former_cli.common import JsonOption, app, print_table

# the headings of the list, with how the names of their recipes begin
GROUPS = {
    "Your own images, from pretrained weights": ("finetune",),
    "To try out in minutes": ("quickstart", "smoke_", "cifar", "camvid"),
    "The paper: ImageNet-1k": ("imagenet1k",),
    "The paper: ImageNet-22k": ("imagenet22k",),
    "The paper: detection and segmentation": ("",),
}
METRICS = {"classification": "top-1", "detection": "box AP", "segmentation": "mIoU"}
CHANGED = "* with arguments of its own (`model.args` in `conv2former recipes --json`), which --model leaves out."


@app.command()
def recipes(
    markdown: Annotated[bool, Option("--markdown", help="Print a Markdown table.")] = False,
    json_: JsonOption = False,
) -> None:
    """List the recipes that come with the package.

    Example: conv2former recipes --json
    """
    from conv2former.errors import percent
    from conv2former.recipes.load import load_recipe, recipe_names

    loaded = [load_recipe(name) for name in recipe_names()]
    if json_:
        print(json.dumps([recipe.raw() for recipe in loaded], indent=2))
        return
    cells = [
        [
            recipe.name,
            recipe.model.name + "*" * bool(recipe.model.args),
            recipe.claim.source,
            METRICS[recipe.task],
            percent(recipe.claim.paper),
            recipe.claim.measured if isinstance(recipe.claim.measured, str) else percent(recipe.claim.measured),
        ]
        for recipe in loaded
    ]
    columns = ["recipe", "model", "source", "metric, %", "paper", "measured"]
    if markdown:
        for row in (columns, ["---"] * len(columns), *cells):
            print(f"| {' | '.join(row)} |")
        print(f"\n{CHANGED}")
        return
    for title, beginnings in GROUPS.items():
        rows = [row for row in cells if row[0].startswith(beginnings)]
        cells = [row for row in cells if row not in rows]
        print(title)
        print_table(columns, rows, right=(4, 5))
        print()
    print(CHANGED)
    print("Your own: a file that begins with `base: RECIPE` and changes what you like; give its path as --recipe.")
