"""A table for people: Markdown, CSV and a plot with the paper's numbers and ours."""

from __future__ import annotations

import csv
import functools
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conv2former.errors import UserError, attempt, in_markdown
from conv2former.files import replace_text
from conv2former.tasks import task_class
from conv2former.tools.reproduce.jobs import Job, Request
from conv2former.tools.reproduce.scales import Scale, at_scale, in_words, where
from conv2former.tools.reproduce.tables import PaperRow, PaperTable

COLUMNS = ["row", "parameters", "paper", "ours", "std", "seeds", "paper, to last", "ours, to last"]
PAPER, OURS, SEED = "C7", "C3", "C0"  # colours


@dataclass(frozen=True)
class Line:
    """A row with what was measured."""

    row: PaperRow
    values: tuple[float, ...] = ()  # one of each seed
    parameters: int | None = None  # of the trained network
    note: str = ""  # why there are no values

    @property
    def mean(self) -> float | None:
        """Over the seeds."""
        return statistics.fmean(self.values) if self.values else None


def lines(table: PaperTable, found: Sequence[Job], done: dict[str, dict[str, Any]]) -> list[Line]:
    """A line for each row of the table."""
    result = []
    for row in table.rows:
        own = [job for job in found if job.row == row]
        if rows := [done[job.key] for job in own if job.key in done]:
            result.append(Line(row, tuple(r["value"] for r in rows), rows[0]["parameters"]))
        else:
            note = "no recipe" if row.recipe is None else "not run" if own else "no small form"
            result.append(Line(row, note=note))
    return result


def cells(found: Sequence[Line]) -> list[list[str]]:
    """The rows of the table."""
    ends = {line.row.group: line for line in found}  # the last row of each group

    def difference(value: float | None, other: float | None, digits: int) -> str:
        return "" if value is None or other is None else f"{value - other:+.{digits}f}"

    def row(line: Line) -> list[str]:
        paper, ours, last = line.row.paper, line.mean, ends[line.row.group]
        return [
            line.row.label,
            "" if line.parameters is None else f"{line.parameters / 1e6:.2f}M",
            "" if paper is None else f"{paper:.1f}",
            line.note if ours is None else f"{ours:.2f}",
            f"{statistics.stdev(line.values):.2f}" if len(line.values) > 1 else "",
            str(len(line.values) or ""),
            "" if line is last else difference(paper, last.row.paper, 1),
            "" if line is last else difference(ours, last.mean, 2),
        ]

    return [row(line) for line in found]


def changes(request: Request, table: PaperTable) -> list[str]:
    """The settings that make a difference to any row; how many processes read images does not."""
    settings = list(request.settings)
    if not settings:
        return []

    def digest(row: PaperRow, settings: list[str]) -> str | None:
        return _digest(str(row.recipe), row.model, request.scale, tuple(settings))

    rows = [row for row in table.rows if row.recipe]
    whole = [digest(row, settings) for row in rows]
    return [
        one for one in settings if whole != [digest(row, [other for other in settings if other != one]) for row in rows]
    ]


@functools.cache  # a table is written anew after each training
def _digest(recipe: str, model: str | None, scale: Scale, settings: tuple[str, ...]) -> str | None:
    try:
        found = at_scale(recipe, model, scale, settings)
    except UserError:  # some can only be used together
        return None
    return found.digest() if found else None


def head(request: Request, table: PaperTable, done: dict[str, dict[str, Any]]) -> str:
    """What all numbers of a table share, in one paragraph."""
    title = task_class(table.task).reported[0].title
    parts = [f"**{table.title}**, {title}. Scale {request.scale}: {in_words(table.task, request.scale)}."]
    if changed := changes(request, table):
        parts.append(f"Changed in all rows: {in_markdown(' '.join(changed))}.")
    if done:
        rows = list(done.values())
        one = rows[-1]
        images = one["images"]
        machines = {", ".join(row["machine"]["gpus"]) or f"{row['machine']['cpus']} CPU cores" for row in rows}
        commits = dict.fromkeys(str(row["commit"]) for row in rows)
        parts.append(
            f"Data: {in_markdown(one['data'])}, {images['train']:,} training and {images['val']:,} validation images. "
            f"Machine: {in_markdown(' and '.join(sorted(machines)))}; commit {in_markdown(', '.join(commits))}."
        )
        last = "the last row" if len({row.group for row in table.rows}) == 1 else "the last row of the group"
        parts.append(f"Std: of the sample over seeds. To last: difference to {last}.")
    return " ".join(parts)


def to_markdown(request: Request, table: PaperTable, found: Sequence[Line], done: dict[str, dict[str, Any]]) -> str:
    """The table for a document, its head above it."""
    marks = ["---", *["---:"] * (len(COLUMNS) - 1)]
    rows = [f"| {' | '.join(row)} |" for row in (COLUMNS, marks, *cells(found))]
    return "\n".join([head(request, table, done), "", *rows, ""])


def to_csv(found: Sequence[Line]) -> str:
    """The table with a column for the values of all seeds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, "values"])
    for line, row in zip(found, cells(found), strict=True):
        writer.writerow([*row, " ".join(f"{value:.4f}" for value in line.values)])
    return text.getvalue()


def draw(table: PaperTable, found: Sequence[Line], path: Path, *, ours_on: str) -> None:
    """Two panels over the same rows: the paper's number; ours, a dot for each seed and a bar for their mean."""
    from matplotlib.figure import Figure  # needed here alone

    shown = [line for line in found if line.values or line.row.paper is not None]
    figure = Figure(figsize=(11, 1.4 + 0.34 * len(shown)), layout="constrained")
    paper, ours = figure.subplots(1, 2, sharey=True)
    heights = range(len(shown), 0, -1)
    for y, line in zip(heights, shown, strict=True):
        if line.row.paper is not None:
            paper.plot(line.row.paper, y, marker="o", color=PAPER)
        if line.mean is not None:
            ours.plot(line.values, [y] * len(line.values), marker=".", linestyle="", color=SEED, alpha=0.7)
            ours.plot(line.mean, y, marker="|", markersize=16, markeredgewidth=2, color=OURS)
        else:
            ours.text(0.02, y, line.note, transform=ours.get_yaxis_transform(), va="center", color=PAPER)
    paper.set_yticks(list(heights), [line.row.label for line in shown])
    ours.set_title(f"ours, {ours_on} (dots: seeds, bar: mean)")
    paper.set_title("paper")
    for axes in (paper, ours):
        for upper, lower, y in zip(shown, shown[1:], heights[1:], strict=False):
            if upper.row.group != lower.row.group:
                axes.axhline(y + 0.5, color="0.8", linewidth=0.8)
        axes.set_xlabel(task_class(table.task).reported[0].title)
        axes.grid(alpha=0.3)
        axes.set_ylim(0.3, len(shown) + 0.7)
        axes.margins(x=0.15)
    figure.suptitle(table.title)
    figure.savefig(path, dpi=110)


def write(request: Request, table: PaperTable, found: Sequence[Job], done: dict[str, dict[str, Any]]) -> list[Path]:
    """Writes ``TABLE.SCALE.md``, ``.csv`` and, where anything has been measured, ``.png``; raises UserError."""
    shown = lines(table, found, done)
    files = [request.out / f"{request.table}.{request.scale}{suffix}" for suffix in (".md", ".csv", ".png")]
    with attempt(f"write to {request.out}"):
        request.out.mkdir(parents=True, exist_ok=True)
        replace_text(files[0], to_markdown(request, table, shown, done))
        replace_text(files[1], to_csv(shown))
        if not done:
            files[2].unlink(missing_ok=True)  # of other settings
            return files[:2]
        draw(table, shown, files[2], ours_on=where(table.task, request.scale))
    return files
