"""``conv2former recipes``."""

from __future__ import annotations

import json
from typing import Annotated

from typer import Option

from conv2former_cli.common import JsonOption, app, percent, print_table


@app.command()
def recipes(
    markdown: Annotated[bool, Option("--markdown", help="Print a Markdown table.")] = False,
    json_: JsonOption = False,
) -> None:
    """List the recipes that come with the package.

    Example: conv2former recipes --json
    """
    from conv2former.recipes.load import load_recipe, recipe_names

    loaded = [load_recipe(name) for name in recipe_names()]
    if json_:
        print(json.dumps([recipe.raw() for recipe in loaded], indent=2))
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
