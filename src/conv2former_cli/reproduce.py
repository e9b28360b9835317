"""``conv2former reproduce``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from conv2former_cli.common import app, say, tell, wrote


@app.command()
def reproduce(
    table: Annotated[str, Argument(help="table2 to table9, fig4a, fig4b.")],
    data: Annotated[Path | None, Option(help="Folder of images; without it the table is drawn alone.")] = None,
    pretraining_data: Annotated[Path | None, Option(help="Pre-training images for tables 4, 8, 9, full scale.")] = None,
    scale: Annotated[Literal["small", "full"], Option(help="The paper's, or what one machine can train.")] = "small",
    seeds: Annotated[int, Option(min=1, help="Trainings of each row.")] = 1,
    out: Annotated[Path, Option(help="Folder for runs, rows.jsonl and tables.")] = Path("reproduction"),
    row: Annotated[list[str] | None, Option(help="Train this row alone, by its recipe; repeatable.")] = None,
    set_: Annotated[
        list[str] | None,
        Option("--set", metavar="SECTION.KEY=VALUE", help="Change the recipe of every row; repeatable."),
    ] = None,
) -> None:
    """Train the rows of one of the paper's tables and lay them beside the printed numbers.

    Rows that were measured with the same settings on the same images are not trained again; after a stop the same
    command goes on. Exit status: as of train; 1 also where a row could not be trained.

    Example: conv2former reproduce table6 --data cifar10 --seeds 3
    """
    from conv2former.tools.reproduce import Request, Stopped, paper_table
    from conv2former.tools.reproduce import reproduce as run_reproduce

    request = Request(
        table,
        data=data,
        pretraining_data=pretraining_data,
        scale=scale,
        seeds=seeds,
        out=out,
        only=tuple(row or ()),
        settings=tuple(set_ or ()),
    )
    try:
        outcome, files = run_reproduce(request)
    except Stopped as stop:
        say(str(stop))
        sys.exit(stop.code)
    tell(*files[0].read_text(encoding="utf-8").split("\n"))
    tell(f"{outcome.trained} trained, {outcome.skipped} measured before; {wrote(files, out)}")
    if data is None:
        names = [one.name for one in paper_table(table).rows if one.recipe]
        tell(f"to train rows: --data FOLDER, and --row NAME of {', '.join(names)}")
    for line in outcome.failed.values():
        say(f"error: {line}")
    sys.exit(1 if outcome.failed else 0)
