"""Receptive fields for people: a table, a file of JSON lines, a figure on one scale."""

from __future__ import annotations

import json
import re
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from conv2former.engine.devices import pick_device
from conv2former.errors import attempt, in_markdown, markdown_row, say
from conv2former.files import replace_text
from conv2former.tools.explain.receptive_field import FRACTIONS, IMAGES, FieldRow, choose_images, measure
from conv2former.tools.explain.subjects import check_name, open_subject

DECADES = 4  # of the colour scale
LEFT = 4  # columns of words
OUTLINES = {"50": "#00e5ff", "99": "#ffffff"}  # of the squares, by percent


def by_model(rows: Sequence[FieldRow]) -> dict[str, list[FieldRow]]:
    """The rows of each model, in order of stages."""
    return {name: [row for row in rows if row.model == name] for name in dict.fromkeys(row.model for row in rows)}


def conditions(rows: Sequence[FieldRow]) -> list[str]:
    """What all rows share, and what to know of some, a line each."""
    first, models = rows[0], by_model(rows)
    lines = [
        f"Side in pixels of the central square that holds {' / '.join(f'{name}%' for name in FRACTIONS)} of the scores "
        f"and of log10(score + 1); mean of {first.images} images at {first.size} px."
    ]
    for note in dict.fromkeys(note for row in rows for note in row.notes):
        names = [name for name, own in models.items() if note in own[0].notes]
        lines.append(f"{', '.join(names) if len(names) < len(models) else 'All'}: {note}.")
    return lines


def columns(rows: Sequence[FieldRow]) -> list[str]:
    """The table's head."""
    stages = range(1, max(row.stage for row in rows) + 1)
    return ["model", "weights", "strides", "of", *(f"stage {stage}" for stage in stages)]


def cells(rows: Sequence[FieldRow]) -> list[list[str]]:
    """The table's lines, two for each model."""
    lines, width = [], len(columns(rows))
    for name, own in by_model(rows).items():
        strides = " ".join(str(row.stride) for row in own)
        for kind in ("scores", "log10"):
            sides = [" / ".join(str(side) for side in getattr(row, kind).values()) for row in own]
            line = [name, own[0].weights, strides, kind, *sides]
            lines.append(line + [""] * (width - len(line)))
    return lines


def to_markdown(rows: Sequence[FieldRow]) -> str:
    """The table for a document, with its conditions above it."""
    head = columns(rows)
    marks = ["---"] * LEFT + ["---:"] * (len(head) - LEFT)
    lines = [markdown_row(line) for line in (head, marks, *cells(rows))]
    return "\n".join([*map(in_markdown, conditions(rows)), "", *lines, ""])


def broken(name: str, width: int = 22) -> str:
    """A long name in lines, broken behind its punctuation; within a word only where it is longer than a line."""
    lines = [""]
    parts = re.findall(r"[^:,/]*[:,/]|[^:,/]+", name)
    pieces = [re.findall(r"[^_]*_|[^_]+", part) if len(part) > width else [part] for part in parts]
    for part in (piece for own in pieces for piece in own):
        if len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line for line in lines if line)


def draw(rows: Sequence[FieldRow], scores: Sequence[np.ndarray], path: Path) -> None:
    """A column for each model, a row for each stage, all on one scale: fractions of the panel's highest score.

    ``rows`` and ``scores`` (size, size) for each of them are what ``measure`` gives.
    """
    names, stages = list(by_model(rows)), max(row.stage for row in rows)
    figure = Figure(figsize=(1.45 * len(names) + 1.2, 1.5 * stages + 0.7), layout="constrained")
    grid = figure.subplots(stages, len(names), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    drawn: Any = None
    for row, own in zip(rows, scores, strict=True):
        axes = grid[row.stage - 1, names.index(row.model)]
        fractions = np.log10(np.maximum(own / own.max(), 10.0**-DECADES))  # pixels without any score, too
        drawn = axes.imshow(fractions, cmap="inferno", vmin=-DECADES, vmax=0)
        for percent, side in row.scores.items():
            corner = row.size // 2 - side // 2 - 0.5
            outline: Any = dict(fill=False, edgecolor=OUTLINES[percent], linewidth=0.8)
            axes.add_patch(Rectangle((corner, corner), side, side, **outline))
        axes.set_title(" / ".join(str(side) for side in row.scores.values()), fontsize=7, pad=2)
    place: Any = dict(xycoords="axes fraction")
    for axes, name in zip(grid[0], names, strict=True):
        axes.annotate(broken(name), (0.5, 1.16), ha="center", va="bottom", fontsize=7, **place)
    for stage, axes in enumerate(grid[:, 0], 1):
        axes.annotate(f"stage {stage}", (-0.06, 0.5), ha="right", va="center", fontsize=8, **place)
    bar = figure.colorbar(drawn, ax=grid, shrink=0.6, extend="min")
    bar.set_label("log10 of score / highest score", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    title = (
        f"effective receptive fields at {rows[0].size} px, mean of {rows[0].images} images; squares and numbers: sides "
        f"that hold {' and '.join(f'{name}%' for name in FRACTIONS)}"
    )
    above = max(broken(name).count("\n") for name in names) * "\n"  # room for the names, which the layout does not see
    figure.suptitle(textwrap.fill(title, int(13 * figure.get_figwidth())) + above, fontsize=8)
    figure.savefig(path, dpi=110)


def run_field(
    names: Sequence[str], data: Path, *, out: Path, images: int = IMAGES, size: int = 224, device: str = "auto"
) -> tuple[list[FieldRow], list[Path]]:
    """``conv2former explain field``: measures networks and writes rows, table and figure into a folder.

    A line on standard error says when a network is done; rows and table then hold it. One network at a time is in
    memory. Returns the rows, and the files ``receptive_fields.jsonl``, ``.md`` and ``.png``.

    Args:
        names: See ``open_subject``; each is taken once.
        data: Folder of images.
        out: Folder for the files.
        images: How many to average over.
        size: Side that they are brought to, pixels.
        device: 'auto', 'cpu', 'cuda', ...

    Raises:
        UserError: A name, an image or a size that cannot be used, too few images, a folder that cannot be written.
    """
    names = list(dict.fromkeys(names))
    for name in names:  # all before the first is measured, which takes a while
        check_name(name, size=size)
    chosen, torch_device = choose_images(data, images), pick_device(device)
    rows: list[FieldRow] = []
    scores: list[np.ndarray] = []
    jsonl, table, figure = (out / f"receptive_fields.{ending}" for ending in ("jsonl", "md", "png"))
    with attempt(f"write to --out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(names, 1):
            started = time.monotonic()
            own_rows, own_scores = measure(open_subject(name, size=size, device=torch_device), chosen, size)
            rows += own_rows
            scores += own_scores
            # after each, so that one that fails does not take the others with it
            replace_text(jsonl, "".join(json.dumps(asdict(row)) + "\n" for row in rows))
            replace_text(table, to_markdown(rows))
            seconds = time.monotonic() - started
            say(f"{name} measured ({number} of {len(names)}) in {seconds:.0f} s")
        draw(rows, scores, figure)
    return rows, [jsonl, table, figure]
