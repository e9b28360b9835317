"""``benchmark --frontier``: our models beside what one would pick today for a CPU, with their published accuracy.

Each model is measured at the image size of its accuracy, in several runtimes, of which the fastest counts. One model
is measured at a time. ``REFERENCE`` is measured first and last at each dtype and batch size, so that you see how
steady the machine was.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import timm
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from conv2former.errors import UserError, attempt, in_markdown, markdown_row, say
from conv2former.files import replace_text
from conv2former.models.zoo import PAPER_TOP1
from conv2former.tools.benchmark.measure import Row, benchmark
from conv2former.tools.benchmark.options import BenchmarkOptions
from conv2former.tools.benchmark.plots import DPI, best_modes
from conv2former.tools.benchmark.report import append_rows, conditions

REFERENCE = "conv2former_t"
MODES = ("eager", "openvino", "openvino-int8")  # fused and in our kernels, where a model has them; OpenVINO


class Published(NamedTuple):
    """A model's accuracy as its authors or timm print it."""

    size: int  # side of the image, pixels
    top1: float | None  # ImageNet-1k, percent; None where none is published
    data: str = "1k"  # what it was trained with


DISTILLED = "1k, distilled"
MODELS = {
    "conv2former_atto": Published(224, None),
    "conv2former_femto": Published(224, None),
    "conv2former_pico": Published(224, None),
    **{f"conv2former_{size}": Published(224, PAPER_TOP1[f"conv2former_{size}"]) for size in "nts"},
    "convnext_tiny": Published(224, 82.1),  # arXiv 2201.03545
    "convnextv2_nano": Published(224, 81.9),  # arXiv 2301.00808, and the next
    "convnextv2_tiny": Published(224, 83.0),
    "caformer_s18": Published(224, 83.6),  # arXiv 2210.13452
    "edgenext_base": Published(256, 82.5),  # arXiv 2206.10589
    "fastvit_sa24": Published(256, 82.6),  # arXiv 2303.14189
    "repvit_m2_3": Published(224, 83.7, DISTILLED),  # arXiv 2307.09283
    "efficientvit_l1": Published(224, 84.5),  # arXiv 2205.14756
    "mobilenetv4_conv_large": Published(256, 81.9),  # timm's e500_r256_in1k
    "hgnetv2_b2": Published(224, 81.7, "1k and 22k, distilled"),  # PaddleClas, SSLD, and the next two
    "hgnetv2_b3": Published(224, 83.0, "1k and 22k, distilled"),
    "hgnetv2_b4": Published(224, 83.6, "1k and 22k, distilled"),
    "cpubone_b0_bfrobust": Published(224, 77.4),  # arXiv 2603.26425, and the next
    "cpubone_b1_bfrobust": Published(224, 78.5),
    "cpubone_b2_bfrobust": Published(224, 81.2),
    "cpubone_b3": Published(224, 83.0),
}


def frontier(options: BenchmarkOptions) -> list[Row]:
    """Measures the models of ``MODELS`` that this timm has; ``options.models`` and ``image_sizes`` are not looked at.

    Raises:
        UserError: A mistake in the options, or not one model that could be measured.
    """
    if options.training or options.image_sizes or options.profile:
        raise UserError("--frontier is about inference at set sizes: leave --train, --size and --profile out")
    given = [mode for mode in MODES if mode == "eager" or importlib.util.find_spec("nncf" if "int8" in mode else mode)]
    modes = options.modes or given
    if not options.modes and len(given) < len(MODES):
        say(f"OpenVINO or NNCF is not installed: measured by {', '.join(modes)} (pip install openvino nncf)")
    names = [name for name in MODELS if timm.is_model(name)]
    if missing := MODELS.keys() - names:
        say(f"this timm is older than {', '.join(sorted(missing))}: left out")
    rows: list[Row] = []
    for dtype in options.dtypes:
        own = [mode for mode in modes if dtype == "float32" or mode != "openvino-int8"]  # which has its own precision
        for batch_size in options.batch_sizes if own else ():
            for name in (REFERENCE, *(name for name in names if name != REFERENCE), REFERENCE):
                one = replace(options, models=(name,), modes=own, image_sizes=(MODELS[name].size,))
                try:
                    found = benchmark(replace(one, dtypes=(dtype,), batch_sizes=(batch_size,)))
                except UserError as error:  # of one model: the others are measured all the same
                    say(f"left out: {name}: {error}")
                    continue
                rows += found
                if options.out:  # at once: all of them take half an hour
                    append_rows(found, options.out / "frontier.jsonl")
    if not rows:
        raise UserError("nothing could be measured: see the reasons above")
    return rows


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes the table and the picture beside the rows, and returns the files; raises UserError."""
    text = folder / "frontier.md"
    with attempt(f"write to --out {folder}"):
        replace_text(text, to_markdown(rows))
        return [folder / "frontier.jsonl", text, draw(rows, folder)]


def columns(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """The fastest row of each model, by column: dtype (8 bits by itself) and batch size."""
    found: dict[str, dict[str, Row]] = {}
    for int8 in (False, True):
        for row in best_modes([row for row in rows if (row.mode == "openvino-int8") == int8]):
            title = f"{'int8' if int8 else row.dtype}, batch size {row.batch_size}"
            found.setdefault(title, {})[row.model] = row
    return found


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A head, and a line for each model: its accuracy, and images per second with the runtime that reached them."""
    cells = columns(rows)
    lines = [["model", "top-1, %", "trained on ImageNet", "px", *cells]]
    for name in dict.fromkeys(row.model for row in rows):
        size, top1, data = MODELS[name]
        best = [own.get(name) for own in cells.values()]
        speeds = [f"{row.images_per_second:.1f} ({_runtime(row)})" if row else "" for row in best]
        lines.append([name, *((f"{top1:.1f}", data) if top1 else ("", "no weights")), str(size), *speeds])
    return lines


def _runtime(row: Row) -> str:
    ours = row.mode == "eager" and row.model.startswith("conv2former") and row.ops != "reference"
    return "kernels" if ours else row.mode.removesuffix("-int8")


def to_markdown(rows: Sequence[Row]) -> str:
    """The table for a document, in images per second, with its conditions above and below."""
    head, *lines = table(rows)
    marks = ["---", "---:", "---", *["---:"] * (len(head) - 3)]
    said = f"{in_markdown(conditions(rows))}; images per second"
    return "\n".join([said, "", *map(markdown_row, (head, marks, *lines)), "", steadiness(rows), ""])


def steadiness(rows: Sequence[Row]) -> str:
    """How far the reference's first and last measurement of a column are apart."""
    times: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if row.model == REFERENCE and row.mode == "eager" and row.images_per_second:
            times.setdefault((row.dtype, row.batch_size), []).append(row.images_per_second)
    said = [f"{dtype}, batch size {size}: {own[0]:.1f} and {own[-1]:.1f}" for (dtype, size), own in times.items()]
    return f"{REFERENCE} (eager), first and last of each column, images/s: {'; '.join(said)}." if said else ""


def draw(rows: Sequence[Row], folder: Path) -> Path:
    """``frontier.png``: accuracy against images per second, a panel for each column; a line joins those that no other
    model beats in both."""
    cells = {title: own for title, own in columns(rows).items() if any(MODELS[name].top1 for name in own)}
    across = max(min(len(cells), 2), 1)
    down = max(-(-len(cells) // across), 1)
    figure = Figure(figsize=(8 * across, 6 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes, (title, own) in zip(panels, cells.items(), strict=False):
        rated = {name: row.images_per_second or 0 for name, row in own.items() if MODELS[name].top1}
        points = sorted((speed, MODELS[name].top1 or 0, name) for name, speed in rated.items())
        front = [p for p in points if not any(q[0] > p[0] and q[1] > p[1] for q in points)]
        axes.plot([p[0] for p in front], [p[1] for p in front], color="0.75", zorder=0)
        for x, y, name in points:
            colour = "C3" if name.startswith("conv2former") else "C0"
            axes.plot(x, y, marker="o" if MODELS[name].data == "1k" else "s", color=colour, markersize=7)
        axes.set(title=title, xlabel="images per second, fastest runtime", ylabel="published ImageNet-1k top-1, %")
        axes.set(xscale="log", xlim=(0.7 * points[0][0], 2 * points[-1][0]))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(y=0.1)
        axes.grid(alpha=0.3)
        _name(axes, points)
    for axes in panels[len(cells) :]:
        axes.set_axis_off()
    figure.suptitle("Squares: trained with more images or a teacher. The line: no other model beats these in both.")
    figure.savefig(folder / "frontier.png", dpi=DPI)
    return folder / "frontier.png"


def _name(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Names beside points, each at the first of some places that no other name or point has taken."""
    ratio = axes.get_xlim()[1] / axes.get_xlim()[0]
    low, high = axes.get_ylim()

    def pixels(x: float, y: float) -> tuple[float, float]:  # roughly, of a panel
        return 720 * math.log(x / axes.get_xlim()[0]) / math.log(ratio), 560 * (y - low) / (high - low)

    taken = [(px - 6, py - 6, px + 6, py + 6) for px, py in (pixels(x, y) for x, y, _ in points)]
    for x, y, name in points:
        shown = name.removesuffix("_bfrobust").replace("mobilenetv4_conv_large", "mobilenetv4_large")
        (px, py), width = pixels(x, y), 7.2 * len(shown)
        places = [(right, up) for up in (0, 13, -13, 26, -26) for right in (10, -10 - width)]
        boxes = [(px + a, py + b - 6, px + a + width, py + b + 6) for a, b in places]
        free = [not any(_meet(box, other) for other in taken) for box in boxes]
        best = free.index(True) if True in free else 0
        taken.append(boxes[best])
        weight = "bold" if name.startswith("conv2former") else "normal"
        right, up = places[best]
        axes.annotate(
            shown, (x, y), (0.72 * right, 0.72 * up), textcoords="offset points", fontsize=9, weight=weight, va="center"
        )


def _meet(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
