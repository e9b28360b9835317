"""The paper's tables, trained row by row and laid beside the printed numbers."""

from __future__ import annotations

from pathlib import Path

from conv2former.errors import UserError
from conv2former.reproduce import report
from conv2former.reproduce.jobs import Outcome, Request, Stopped, measured, run, table_jobs
from conv2former.reproduce.tables import TABLES, paper_table

__all__ = ["TABLES", "Outcome", "Request", "Stopped", "reproduce"]


def reproduce(request: Request) -> tuple[Outcome, list[Path]]:
    """Trains the rows of a table that have not been measured with the same settings and images, and renders it.

    The table is written after every row, so that a stop loses nothing; the same request goes on where it stopped.

    Returns:
        What was trained, and the files of the table.

    Raises:
        UserError: Anything wrong with what was given.
        Stopped: By a signal.
    """
    table = paper_table(request.table)
    found = table_jobs(request, table)
    if not found:
        raise UserError(f"{request.table} has no row that can be trained at scale {request.scale}")

    def render() -> list[Path]:
        return report.write(request, table, found, measured(request, found))

    files = render()
    if request.data is None:
        return Outcome(), files
    outcome = run(request, found, measured(request, found), render)
    return outcome, render()
