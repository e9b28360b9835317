"""A table for people: Markdown, CSV and a picture with the paper's numbers and ours."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conv2former.errors import UserError, one_line
from conv2former.files import replace_text
from conv2former.tasks import task_class
from conv2former.tools.reproduce.jobs import Job, Request, changes
from conv2former.tools.reproduce.scales import in_words
from conv2former.tools.reproduce.tables import PaperRow, PaperTable

COLUMNS = ["row", "parameters", "paper", "ours", "std", "seeds", "ours - paper", "paper, to last", "ours, to last"]


@dataclass(frozen=True)
class Line:
    """A row with what was measured.

    Attributes:
        row: Of the paper.
        values: One of each seed.
        parameters: Of the trained network.
        note: Why there are no values.
    """

    row: PaperRow
    values: tuple[float, ...] = ()
    parameters: int | None = None
    note: str = ""

    @property
    def mean(self) -> float | None:
        """Over the seeds."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds, of the sample; None for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def lines(table: PaperTable, found: Sequence[Job], done: dict[str, dict[str, Any]]) -> list[Line]:
    """A line for each row of the table."""
    result = []
    for row in table.rows:
        own = [job for job in found if job.row == row]
        rows = [done[job.key] for job in own if job.key in done]
        note = "not run"
        if row.recipe is None:
            note = "no recipe"
        elif not own:
            note = "no small form"
        if rows:
            result.append(Line(row, tuple(r["value"] for r in rows), rows[0]["parameters"]))
        else:
            result.append(Line(row, note=note))
    return result


def cells(line: Line, last: Line) -> list[str]:
    """A row of the table; ``last`` is the last of its group."""
    paper, ours = line.row.paper, line.mean
    return [
        line.row.label,
        "" if line.parameters is None else f"{line.parameters / 1e6:.2f}M",
        "" if paper is None else f"{paper:.1f}",
        line.note if ours is None else f"{ours:.2f}",
        "" if line.spread is None else f"{line.spread:.2f}",
        str(len(line.values) or ""),
        _difference(ours, paper, 2),
        "" if line is last else _difference(paper, last.row.paper, 1),
        "" if line is last else _difference(ours, last.mean, 2),
    ]


def _difference(value: float | None, other: float | None, digits: int) -> str:
    return "" if value is None or other is None else f"{value - other:+.{digits}f}"


def all_cells(found: Sequence[Line]) -> list[list[str]]:
    """The rows of the table."""
    last = {line.row.group: line for line in found}
    return [cells(line, last[line.row.group]) for line in found]


def head(request: Request, table: PaperTable, done: dict[str, dict[str, Any]]) -> str:
    """What all numbers of a table share, in one paragraph."""
    title = task_class(table.task).reported[0].title
    parts = [f"**{table.title}**, {title}. Scale {request.scale}: {in_words(table.task, request.scale)}."]
    if changed := changes(request, table):
        parts.append(f"Changed in all rows: `{' '.join(changed)}`.")
    if done:
        rows = list(done.values())
        one = rows[-1]
        images = one["images"]
        machines = {", ".join(row["machine"]["gpus"]) or f"{row['machine']['cpus']} CPU cores" for row in rows}
        commits = dict.fromkeys(str(row["commit"]) for row in rows)
        parts.append(
            f"Data: {one['data']}, {images['train']:,} training and {images['val']:,} validation images. Machine: "
            f"{' and '.join(sorted(machines))}; commit {', '.join(commits)}."
        )
        last = "the last row" if len({row.group for row in table.rows}) == 1 else "the last row of the group"
        parts.append(f"Std: of the sample over seeds. To last: difference to {last}.")
    return " ".join(parts)


def to_markdown(request: Request, table: PaperTable, found: Sequence[Line], done: dict[str, dict[str, Any]]) -> str:
    """The table for a document, its head above it."""
    marks = ["---", *["---:"] * (len(COLUMNS) - 1)]
    rows = [f"| {' | '.join(row)} |" for row in (COLUMNS, marks, *all_cells(found))]
    return "\n".join([head(request, table, done), "", *rows, ""])


def to_csv(found: Sequence[Line]) -> str:
    """The table with a column for the values of all seeds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, "values"])
    for line, row in zip(found, all_cells(found), strict=True):
        writer.writerow([*row, " ".join(f"{value:.4f}" for value in line.values)])
    return text.getvalue()


def write(request: Request, table: PaperTable, found: Sequence[Job], done: dict[str, dict[str, Any]]) -> list[Path]:
    """Writes ``TABLE.SCALE.md``, ``.csv`` and, where anything has been measured, ``.png`` into the folder.

    Raises:
        UserError: It cannot be written.
    """
    from conv2former.tools.reproduce.picture import draw  # matplotlib is needed here alone

    shown = lines(table, found, done)
    files = [request.out / f"{request.table}.{request.scale}{suffix}" for suffix in (".md", ".csv", ".png")]
    try:
        request.out.mkdir(parents=True, exist_ok=True)
        replace_text(files[0], to_markdown(request, table, shown, done))
        replace_text(files[1], to_csv(shown))
        if not done:
            files[2].unlink(missing_ok=True)  # of other settings
            return files[:2]
        draw(table, shown, files[2])
    except OSError as error:
        raise UserError(f"cannot write to {request.out}: {one_line(error)}") from None
    return files
