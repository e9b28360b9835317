"""Pictures of a run: learning curves, confusion matrix, a sheet of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

MAX_LABELLED_CLASSES = 60  # above this a label per row is not readable
GOOD, BAD = "#1b7f4b", "#b3261e"


def learning_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss, accuracy and learning rate over epochs, from the rows of ``metrics.jsonl``."""
    steps = [row for row in rows if row["kind"] == "step"]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    loss.plot([r["epoch"] for r in steps], [r["loss"] for r in steps], label="training", alpha=0.7)
    loss.plot([r["epoch"] for r in epochs], [r["val_loss"] for r in epochs], label="validation", marker=".")
    loss.set(title="loss", xlabel="epoch")
    loss.legend()
    accuracy.plot([r["epoch"] for r in epochs], [r["val_top1"] for r in epochs], label="top-1", marker=".")
    accuracy.plot([r["epoch"] for r in epochs], [r["val_top5"] for r in epochs], label="top-5", marker=".", alpha=0.5)
    if epochs:
        best = max(epochs, key=lambda r: r["val_top1"])
        accuracy.annotate(
            f"{best['val_top1']:.2f}%", (best["epoch"], best["val_top1"]), textcoords="offset points", xytext=(0, -14)
        )
    accuracy.set(title="validation accuracy, %", xlabel="epoch")
    accuracy.legend()
    rate.plot([r["epoch"] for r in steps], [r["lr"] for r in steps])
    rate.set(title="learning rate", xlabel="epoch")
    for axes in (loss, accuracy, rate):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def confusion_matrix(matrix: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Rows are true classes, columns predicted ones; colours are shares of the row, numbers are counts.

    Args:
        matrix: Counts (K, K).
        classes: K names.
        path: PNG to write.
    """
    count = len(classes)
    labelled = count <= MAX_LABELLED_CLASSES
    side = min(max(4.5, 0.45 * count + 2), 24) if labelled else 12
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", title=f"{int(np.trace(matrix))} of {int(matrix.sum())} correct")
    if labelled:
        axes.set_xticks(range(count), classes, rotation=90)
        axes.set_yticks(range(count), classes)
    if count <= 25:
        for i, j in zip(*np.nonzero(matrix), strict=True):
            colour = "white" if share[i, j] > 0.5 else "black"
            axes.text(j, i, str(int(matrix[i, j])), ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    figure.savefig(path, dpi=110)


def prediction_sheet(
    mistakes: list[tuple[Image.Image, str, bool]], samples: list[tuple[Image.Image, str, bool]], path: Path
) -> None:
    """Two blocks of pictures with captions: the worst mistakes, then some others.

    Args:
        mistakes: (picture, caption, correct), worst first.
        samples: The same for pictures chosen without regard to the outcome.
        path: PNG to write.
    """
    columns = 8
    blocks = [(title, items) for title, items in (("worst mistakes", mistakes), ("others", samples)) if items]
    heights = [-(-len(items) // columns) for _, items in blocks]
    figure = Figure(figsize=(1.75 * columns, 2.15 * sum(heights) + 0.5 * len(blocks)), layout="constrained")
    parts = figure.subfigures(len(blocks), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, (title, items) in zip(parts, blocks, strict=True):
        part.suptitle(title, x=0.01, ha="left", fontweight="bold")
        for axes in (grid := part.subplots(-(-len(items) // columns), columns, squeeze=False).ravel()):
            axes.set_axis_off()
        for axes, (picture, caption, correct) in zip(grid, items, strict=False):
            axes.imshow(picture, interpolation="nearest" if max(picture.size) <= 64 else "antialiased")
            axes.set_title(caption, fontsize=8, color=GOOD if correct else BAD)
    figure.savefig(path, dpi=110)
