"""The paper's numbers and ours beside each other, a line of dots for each row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from conv2former.tasks import task_class
from conv2former.tools.reproduce.report import Line
from conv2former.tools.reproduce.tables import PaperTable

PAPER, OURS, SEED = "C7", "C3", "C0"


def draw(table: PaperTable, lines: Sequence[Line], path: Path) -> None:
    """Two panels over the same rows: the paper's figure; ours, a dot for each seed and a bar for their mean."""
    shown = [line for line in lines if line.values or line.row.paper is not None]
    figure = Figure(figsize=(11, 1.4 + 0.34 * len(shown)), layout="constrained")
    paper, ours = figure.subplots(1, 2, sharey=True)
    places = range(len(shown), 0, -1)
    for place, line in zip(places, shown, strict=True):
        if line.row.paper is not None:
            paper.plot(line.row.paper, place, marker="o", color=PAPER)
        if line.mean is not None:
            ours.plot(line.values, [place] * len(line.values), marker=".", linestyle="", color=SEED, alpha=0.7)
            ours.plot(line.mean, place, marker="|", markersize=16, markeredgewidth=2, color=OURS)
        else:
            ours.text(0.02, place, line.note, transform=ours.get_yaxis_transform(), va="center", color=PAPER)
    for upper, lower, place in zip(shown, shown[1:], list(places)[1:], strict=False):
        if upper.row.group != lower.row.group:
            for axes in (paper, ours):
                axes.axhline(place + 0.5, color="0.8", linewidth=0.8)
    paper.set_yticks(list(places), [line.row.label for line in shown])
    unit = task_class(table.task).reported[0].title
    paper.set(title="paper", xlabel=unit)
    ours.set(title="ours (dots: seeds, bar: mean)", xlabel=unit)
    for axes in (paper, ours):
        axes.grid(alpha=0.3)
        axes.set_ylim(0.3, len(shown) + 0.7)
        axes.margins(x=0.15)
    figure.suptitle(table.title)
    figure.savefig(path, dpi=110)
