"""The rows for people: a table, a file of JSON lines, profiles as text, plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conv2former.errors import attempt, in_markdown, markdown_row
from conv2former.files import append_line, replace_text
from conv2former.tools.benchmark.measure import Row

COLUMNS = ["model", "mode", "dtype", "batch", "px", "ms", "quartiles", "images/s"]
LAST_COLUMNS = ["memory MB", "parameters M", "MACs G", "GMAC/s", "% of peak", "note"]
RIGHT = range(3, 14)  # columns of numbers


def columns(rows: Sequence[Row]) -> list[str]:
    """The table's head; the ratio's column names the model that all are compared with."""
    return [*COLUMNS, f"x of {rows[0].model}", *LAST_COLUMNS]


def cells(row: Row) -> list[str]:
    """A row of the table."""

    def number(value: float | None, factor: float, digits: int) -> str:
        return "" if value is None else f"{value * factor:.{digits}f}"

    return [
        row.model,
        row.mode,
        row.dtype,
        str(row.batch_size),
        str(row.image_size),
        number(row.seconds, 1e3, 2),
        "-".join(number(quartile, 1e3, 2) for quartile in row.quartiles or ()),
        number(row.images_per_second, 1, 1),
        number(row.ratio, 1, 2),
        number(row.memory, 1e-6, 0),
        number(row.params, 1e-6, 1),
        number(row.macs, 1e-9, 2),
        number(row.macs_per_second, 1e-9, 1),
        number(row.peak_share, 100, 1),
        row.error or "",
    ]


def conditions(rows: Sequence[Row]) -> str:
    """A line of what all rows share."""
    r = next(row for row in rows if row.error is None)
    peaks = {row.dtype: f"{row.peak / 1e9:.0f} GMAC/s in {row.dtype}" for row in rows if row.peak}
    parts = [
        f"{r.task}, medians of {r.rounds} rounds",
        f"{r.device}, threads: {r.threads}",
        f"operations by {', '.join(dict.fromkeys(row.ops for row in rows))}",
        *(["fused"] if r.fused else []),
        f"peak {', '.join(peaks.values()) or 'not measured'}",
        f"PyTorch {r.versions.get('torch')}",
        *([f"commit {r.commit}"] if r.commit else []),
        r.date,
    ]
    return "; ".join(parts)


def to_markdown(rows: Sequence[Row]) -> str:
    """The table for a document, with its conditions above it."""
    head = columns(rows)
    marks = ["---:" if index in RIGHT else "---" for index in range(len(head))]
    lines = [markdown_row(line) for line in (head, marks, *map(cells, rows))]
    return "\n".join([in_markdown(conditions(rows)), "", *lines, ""])


def profiles(rows: Sequence[Row]) -> str:
    """A table of operations for each profiled row; empty where no profile was asked for."""
    tables = []
    for r in rows:
        if r.profile:
            lines = [f"{r.model}, {r.mode}, {r.dtype}, batch size {r.batch_size}, {r.image_size} px"]
            lines += ["      ms  fraction   calls  operation"]
            lines += [f"{o.seconds * 1e3:8.2f}  {o.share:8.1%}  {o.calls:6}  {o.name[:100]}" for o in r.profile]
            tables.append("\n".join(lines))
    return "\n\n".join(tables)


def append_rows(rows: Sequence[Row], path: Path) -> None:
    for row in rows:
        append_line(path, row.to_json())


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes the files of ``--out`` into a folder that exists, and returns them; raises UserError.

    The rows are appended to ``benchmark.jsonl``; all else is of them alone and replaces what is there.
    """
    from conv2former.tools.benchmark import plots  # matplotlib is needed here alone

    jsonl, table, text = (folder / name for name in ("benchmark.jsonl", "benchmark.md", "profile.txt"))
    files = [jsonl, table]
    with attempt(f"write to --out {folder}"):
        append_rows(rows, jsonl)
        replace_text(table, to_markdown(rows))
        if operations := profiles(rows):
            replace_text(text, operations + "\n")
            files.append(text)
        files += [path for draw in (plots.speed, plots.resolution) if (path := draw(rows, folder))]
    return files
