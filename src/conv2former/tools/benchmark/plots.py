"""Plots of measured rows: accuracy against speed, cost against resolution."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from conv2former.models.zoo import PAPER_TOP1
from conv2former.tools.benchmark.measure import Row

# ImageNet-1k top-1 in percent at 224 px of the paper's baselines, those that timm has: Tables 3 and 7
BASELINES_TOP1 = {
    "resnet50d": 79.5,
    "swin_tiny_patch4_window7_224": 81.5,
    "swin_small_patch4_window7_224": 83.0,
    "swin_base_patch4_window7_224": 83.5,
    "convnext_tiny": 82.1,
    "convnext_small": 83.1,
    "convnext_base": 83.8,
    "deit_small_patch16_224": 79.8,
    "deit_base_patch16_224": 81.8,
    "regnety_160": 82.9,
    "focalnet_base_lrf": 83.9,
}
ACCURACY_SIZE = 224
# the beginning of a family's name -> its colour
FAMILIES = {"conv2former": "C3", "convnext": "C0", "swin": "C2", "deit": "C4", "resnet": "C1", "regnet": "C5"}
OTHERS = "C7"
DPI = 110


def best_modes(rows: Sequence[Row]) -> list[Row]:
    """The fastest measured row of each model at each dtype, batch size and image size."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (row.model, row.dtype, row.batch_size, row.image_size)
        if row.seconds is not None and (key not in best or row.seconds < (best[key].seconds or 0)):
            best[key] = row
    return list(best.values())


def top1(row: Row) -> float | None:
    """The paper's accuracy of a row's model; None where it gives none for this image size."""
    known = (PAPER_TOP1 | BASELINES_TOP1).get(row.model.split(".")[0])  # a pretrained tag makes no difference
    return known if row.image_size == ACCURACY_SIZE else None


def speed(rows: Sequence[Row], folder: Path) -> Path | None:
    """``speed.png``: accuracy against images per second, a panel for each dtype and batch size.

    There is none where the paper gives no accuracy for any row.
    """
    known = [row for row in best_modes(rows) if top1(row) is not None]
    if not known:
        return None
    panels = _panels(known)
    figure = Figure(figsize=(1 + 5.5 * len(panels), 5), layout="constrained")
    for axes, (title, group) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, row in enumerate(sorted(group, key=lambda row: (top1(row), row.images_per_second))):
            colour = next((c for start, c in FAMILIES.items() if row.model.startswith(start)), OTHERS)
            axes.plot(row.images_per_second, top1(row), marker="o", color=colour)
            name = f"{row.model.partition('_patch')[0]} ({row.mode})"
            offset = (0, -14 if number % 2 else 7)  # below and above in turn, so that names do not meet
            point = row.images_per_second, top1(row)
            axes.annotate(name, point, offset, textcoords="offset points", fontsize=8, ha="center")
        axes.margins(x=0.35, y=0.2)  # room for the names
        axes.set(xlabel=f"{group[0].task}, images/s, best mode", ylabel="paper's ImageNet top-1, %", title=title)
        axes.grid(alpha=0.3)
    figure.savefig(folder / "speed.png", dpi=DPI)
    return folder / "speed.png"


def resolution(rows: Sequence[Row], folder: Path) -> Path | None:
    """``resolution.png``: time and multiply-adds of an image against its side, for each dtype and batch size.

    There is none where there is one size alone.
    """
    best = sorted(best_modes(rows), key=lambda row: row.image_size)
    if len({row.image_size for row in best}) < 2:
        return None
    panels = _panels(best)
    figure = Figure(figsize=(11, 0.5 + 4.5 * len(panels)), layout="constrained")
    for (time, macs), (title, group) in zip(
        figure.subplots(len(panels), 2, squeeze=False), panels.items(), strict=True
    ):
        for name in dict.fromkeys(row.model for row in rows):
            own = [row for row in group if row.model == name]
            sides = [row.image_size for row in own]
            milliseconds = [1e3 * (row.seconds or 0) / row.batch_size for row in own]
            time.plot(sides, milliseconds, marker=".", label=name)
            macs.plot(sides, [row.macs / 1e9 for row in own], marker=".", label=name)
        time.set(title=f"{group[0].task}, {title}", ylabel="ms per image, best mode")
        macs.set(title="multiply-adds of the forward pass", ylabel="GMAC per image")
        for axes in (time, macs):
            axes.set(xscale="log", yscale="log", xlabel="side of the image, pixels")
            axes.set_xticks(sorted({row.image_size for row in group}))
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_locator(NullLocator())
            axes.grid(alpha=0.3)
        time.legend()
    figure.savefig(folder / "resolution.png", dpi=DPI)
    return folder / "resolution.png"


def _panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by dtype and batch size."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(f"{row.dtype}, batch size {row.batch_size}", []).append(row)
    return panels
