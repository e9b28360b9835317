"""The paper's tables, trained row by row and laid beside the printed numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from conv2former.errors import UserError
from conv2former.tools.reproduce import jobs, report
from conv2former.tools.reproduce.jobs import Images, Outcome, Request, Stopped, table_jobs
from conv2former.tools.reproduce.tables import TABLES, paper_table

__all__ = ["TABLES", "Outcome", "Request", "Stopped", "paper_table", "reproduce"]


def reproduce(request: Request) -> tuple[Outcome, list[Path]]:
    """Trains the rows of a table that have not been measured with the same settings and images, and renders it.

    The table is written after every row, so that a stop loses nothing; the same request goes on where it stopped.
    Returns what was trained, and the files of the table.

    Raises:
        UserError: Anything wrong with what was given.
        Stopped: By a signal.
    """
    table, images = paper_table(request.table), Images()
    found = table_jobs(request, table, images)
    if not found:
        raise UserError(f"{request.table} has no row that can be trained at scale {request.scale}")

    def render() -> list[Path]:
        # all that is known, not only what this call trains
        seeds = max(request.seeds, *(int(row.get("seed", 0)) + 1 for row in jobs.measured_rows(request)), 1)
        known = replace(request, data=None, pretraining_data=None, only=(), seeds=seeds)
        shown = table_jobs(known, table, images)
        return report.write(request, table, shown, jobs.measured(request, shown))

    files = render()
    if request.data is None:
        return Outcome(), files
    outcome = jobs.run(request, found, images, render)
    return outcome, render()
