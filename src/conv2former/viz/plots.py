"""Images of a run: learning curves, confusion matrix, a sheet of predictions, the schedule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from conv2former.errors import UserError, printable

warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)  # of names in other alphabets: boxes will do
X_AXES = {"epoch": "epoch", "step": "optimizer step", "minutes": "training time, minutes"}
MAX_LABELLED_CLASSES = 60  # above this a label per row is not readable
SPELLED = {"miou": "mIoU", "ap": "AP", "ap50": "AP50", "ap75": "AP75", "top1": "top-1", "top5": "top-5"}
GOOD, BAD = "#1b7f4b", "#b3261e"
MOST_DRAWN = 48  # characters of a line
CELL, CAPTION, GAP = (190, 230), 44, 8  # of a sheet of predictions, pixels: an image with its caption, between two


def draw_curves(runs: dict[str, list[dict[str, Any]]], path: Path, x: str) -> None:
    """Losses, metrics, learning rate and speed of runs by name, over one of ``X_AXES``."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (loss, accuracy), (lr, speed) = figure.subplots(2, 2, sharex=True)
    waiting = speed.twinx()
    alone = len(runs) == 1
    legend: dict[str, Any] = {}
    titles: set[str] = set()
    colours: list[Any] = [f"C{index}" for index in range(10)]
    if len(runs) > 10:
        colours = list(colormaps["turbo"](np.linspace(0.05, 0.95, len(runs))))
    for (name, rows), colour in zip(runs.items(), colours, strict=False):
        position = _positions(name, rows, x)
        steps = [row for row in rows if row["kind"] == "step"]
        epochs = [row for row in rows if row["kind"] == "epoch"]
        at_steps, at_epochs = position(steps), position(epochs)
        dots: dict[str, Any] = dict(color=colour, marker=".", markersize=2)  # a lone value has no line to be seen by
        loss.plot(at_steps, _column(steps, "loss"), **dots, linewidth=1, alpha=0.5, label="training")
        validation: dict[str, Any] = dict(color="C1" if alone else colour, marker=".")
        if any("val_loss" in row for row in epochs):
            loss.plot(at_epochs, _column(epochs, "val_loss"), **validation, label="validation")
        (key, title), *others = _metrics(epochs)
        titles.add(title)
        (line,) = accuracy.plot(at_epochs, _column(epochs, key), color=colour, marker=".", label=title)
        for number, (other, other_title) in enumerate(others if alone else [], 1):
            column = _column(epochs, other)
            if (column < 100).any():  # else it is the top five of at most five classes
                accuracy.plot(at_epochs, column, color=f"C{number}", marker=".", alpha=0.5, label=other_title)
        lr.plot(at_steps, _column(steps, "lr"), **dots)
        speed.plot(at_epochs, _column(epochs, "images_per_second"), color=colour, marker=".")
        waiting.plot(at_epochs, 100 * _column(epochs, "data_wait"), **dots, linestyle="--", alpha=0.7)
        legend[drawable(_best(epochs) if alone else f"{name}: {_best(epochs)}")] = line
    if alone:
        loss.legend()
        accuracy.legend()
    loss.set_title("loss" if alone else "loss (thin: training, dots: validation)")
    accuracy.set_title("validation metrics, %" if alone else f"validation {' or '.join(sorted(titles))}")
    figure.suptitle(drawable(next(iter(runs))) if alone else "Learning curves", fontweight="bold")
    lr.set_title("learning rate")
    speed.set_title("training speed, images/s")
    if any(np.isfinite(line.get_ydata()).any() for line in waiting.lines):
        waiting.set(ylabel="time spent waiting for data, % (dashed)", ylim=(0, 100))
    else:
        waiting.remove()
    speed.set_ylim(bottom=0)
    for axes in (loss, accuracy, lr, speed):
        axes.set_xlabel(X_AXES[x])
        axes.tick_params(labelbottom=True)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=x != "minutes"))
    figure.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=1 if len(runs) < 7 else 2)
    figure.savefig(path, dpi=110)


def drawable(text: str) -> str:
    """A text as matplotlib takes it: a dollar would begin a formula, and bytes that are no text end in an error.

    Lines that would take the place of the figure keep their two ends.
    """
    lines = [line if len(line) <= MOST_DRAWN else f"{line[:30]}...{line[-15:]}" for line in text.split("\n")]
    return "\n".join(map(printable, lines)).replace("$", r"\$")


def _positions(name: str, rows: list[dict[str, Any]], x: str) -> Callable[[list[dict[str, Any]]], np.ndarray]:
    """A function that gives rows of a run their positions on the x axis."""
    if x != "minutes":
        return lambda some_rows: _column(some_rows, x)
    timed = [row for row in rows if "seconds" in row]
    if not timed or any("seconds" not in row for row in rows if row["kind"] == "epoch"):
        raise UserError(
            f"{name} holds no training times, or not from its start (no evaluation yet, or an older version made it): "
            "use --x epoch or --x step"
        )
    done, minutes = np.array([(row["step"], row["seconds"] / 60) for row in timed], float).T
    # the losses between two evaluations lie evenly between their times; those after the last go on at the mean speed
    done, minutes = np.r_[0, done, 2 * done[-1]], np.r_[0, minutes, 2 * minutes[-1]]
    return lambda some_rows: np.interp(_column(some_rows, "step"), done, minutes)


def _column(rows: list[dict[str, Any]], key: str) -> np.ndarray:
    """A value of each row, (rows,), NaN where it is null or missing: matplotlib leaves a gap there."""
    return np.array([row.get(key) for row in rows], float)


def _best(epochs: list[dict[str, Any]]) -> str:
    key, title = _metrics(epochs)[0]
    evaluated = [row for row in epochs if row.get(key) is not None]
    if not evaluated:
        return "not evaluated yet"
    best = max(evaluated, key=lambda row: row[key])
    return f"best {title} {best[key]:.2f} at epoch {best['epoch']:g}"


def _metrics(epochs: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The columns of a run's metrics, the monitored one first, with their titles."""
    keys = dict.fromkeys(key for row in epochs for key in row if key.startswith("val_") and key != "val_loss")
    words = {key: key.removeprefix("val_").split("_") for key in keys}
    return [(key, " ".join(SPELLED.get(word, word) for word in own)) for key, own in words.items()] or [("", "")]


def confusion_matrix(matrix: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Counts (K, K) as an image: rows are true classes, columns predicted ones; colours are fractions of the row.

    Counts too long for a cell, of pixels, are written in percent of the row.
    """
    count = len(classes)
    labelled = count <= MAX_LABELLED_CLASSES
    side = min(max(4.5, 0.45 * count + 2), 24) if labelled else 12
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    fractions = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    title, long = f"{int(np.trace(matrix)):,} of {int(matrix.sum()):,} correct", matrix.max() >= 10_000
    axes.set(xlabel="predicted", ylabel="true", title=f"{title} (cells: % of the true class)" if long else title)
    if labelled:
        names = [drawable(name) for name in classes]
        axes.set_xticks(range(count), names, rotation=90)
        axes.set_yticks(range(count), names)
    if count <= 25:
        for (i, j), number in np.ndenumerate(matrix):
            colour = "white" if fractions[i, j] > 0.5 else "black" if number else "lightgrey"
            text = f"{100 * fractions[i, j]:.1f}" if long else str(int(number))
            axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, label="fraction of the true class", shrink=0.8)
    figure.savefig(path, dpi=110)


def prediction_sheet(
    mistakes: list[tuple[Image.Image, str, bool]], samples: list[tuple[Image.Image, str, bool]], path: Path
) -> None:
    """Two blocks of images, as (image, caption, correct): the worst mistakes, then some of all others."""
    columns = 8
    titles = {"worst mistakes": mistakes, "some of all others": samples}
    blocks = [(title, items) for title, items in titles.items() if items]
    heights = [-(-len(items) // columns) for _, items in blocks]
    figure = Figure(figsize=(1.75 * columns, 2.15 * sum(heights) + 0.5 * len(blocks)), layout="constrained")
    grids = figure.subplots(len(blocks), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, rows, (title, items) in zip(grids, heights, blocks, strict=True):
        # one image for a block: a pair of axes for each image would take most of the time
        sheet = Image.new("RGB", (columns * CELL[0], rows * CELL[1]), "white")
        for number, (image, caption, correct) in enumerate(items):
            row, column = divmod(number, columns)
            middle, small = (2 * column + 1) * CELL[0] // 2, _fitted(image)
            top = (row + 1) * CELL[1] - (CELL[1] - CAPTION + small.height) // 2
            sheet.paste(small, (middle - small.width // 2, top))
            style: Any = dict(fontsize=8, color=GOOD if correct else BAD, ha="center", va="bottom", in_layout=False)
            axes.text(middle, top - GAP // 2, drawable(caption), **style)
        axes.imshow(sheet)
        axes.set_axis_off()
        axes.set_title(title, loc="left", fontweight="bold")
    figure.savefig(path, dpi=110)


def _fitted(image: Image.Image) -> Image.Image:
    """An image at the size of a cell; small ones with their pixels visible."""
    scale = min((CELL[0] - GAP) / image.width, (CELL[1] - CAPTION - GAP) / image.height)
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    filter_ = Image.Resampling.NEAREST if max(image.size) <= 64 else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, filter_)


def schedule(
    epochs: Sequence[float],
    rates: dict[str, Sequence[float]],
    decay: Sequence[float],
    path: Path,
    *,
    steps_per_epoch: int | None = None,
) -> None:
    """Learning rate and weight decay over a training that has not begun.

    ``rates`` are named curves of learning rates, at ``epochs``; ``steps_per_epoch`` makes a second axis in optimizer
    steps. The learning rates' axis is linear, which shows warm-up and cosine as they are, unless the curves' peaks lie
    so far apart (layer-wise decay) that the lower ones would be flat.
    """
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    lr, weight = figure.subplots(1, 2)
    for name, values in rates.items():
        lr.plot(epochs, values, label=name)
    peaks = [max(values) for values in rates.values()]
    lr.set(title="learning rate", yscale="log" if max(peaks) > 20 * min(peaks) else "linear")
    if len(rates) > 1:
        lr.legend()
    weight.plot(epochs, decay)
    weight.set(title="weight decay (of the tensors that are decayed)", ylim=(0, max(decay) * 1.3 or 1))
    for axes in (lr, weight):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if steps_per_epoch:
            steps = axes.secondary_xaxis(
                -0.22, functions=(lambda epoch: epoch * steps_per_epoch, lambda step: step / steps_per_epoch)
            )
            steps.set_xlabel("optimizer step")
            steps.ticklabel_format(axis="x", style="plain")
            steps.locator_params(axis="x", nbins=5)
    figure.savefig(path, dpi=110)
