"""``conv2former models``."""

from __future__ import annotations

import json
from typing import Annotated

from typer import Option

from conv2former_cli.common import JsonOption, app, print_table


@app.command()
def models(
    variants: Annotated[bool, Option("--variants", help="Also the paper's other kernel and image sizes.")] = False,
    markdown: Annotated[bool, Option("--markdown", help="Print a Markdown table.")] = False,
    json_: JsonOption = False,
) -> None:
    """List the models with parameters, multiply-adds and the paper's accuracy.

    Example: conv2former models --variants
    """
    from conv2former.errors import percent
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
