"""Sheets of maps over pictures: drawn with matplotlib, one for each picture file, with a JSON line each."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from conv2former.data.images import BadImage, decode, find_images
from conv2former.errors import UserError, one_line
from conv2former.files import free_name

STRENGTH = 0.6  # of a map's colours over the picture
PANEL = 1.9  # width of a panel, inches
SMALL = 64  # pictures up to this side are drawn with their pixels visible


class NotShown(UserError):
    """A picture on which there is nothing of what was asked for."""


def over(picture: np.ndarray, values: np.ndarray, *, signed: bool = False) -> np.ndarray:
    """A map in colours over the picture in grey.

    Args:
        picture: (h, w, 3) of uint8.
        values: (h, w); drawn from the lowest to the highest, or symmetrically around 0.
        signed: Whether 0 is the middle of the colours.

    Returns:
        (h, w, 3) of uint8.
    """
    low, high = float(values.min()), float(values.max())
    if signed:
        high = max(abs(low), abs(high))
        low = -high
    parts = (values - low) / ((high - low) or 1)
    colours = colormaps["coolwarm" if signed else "turbo"](parts)[..., :3] * 255
    grey = np.asarray(Image.fromarray(picture).convert("L"), float)[..., None]
    return (grey * (1 - STRENGTH) + colours * STRENGTH).round().astype(np.uint8)


def sheet(rows: Sequence[tuple[str, Sequence[tuple[str, np.ndarray]]]]) -> Figure:
    """Panels (title, picture (h, w, 3)) in rows with a name each; shorter rows end early."""
    columns = max(len(panels) for _, panels in rows)
    height, width = rows[0][1][0][1].shape[:2]
    panel = PANEL * min(max(height / width, 0.4), 2.5)
    figure = Figure(figsize=(PANEL * columns + 0.4, (panel + 0.3) * len(rows) + 0.1), layout="constrained")
    for axes_row, (name, panels) in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for axes in axes_row:
            axes.set_axis_off()
        for axes, (title, picture) in zip(axes_row, panels, strict=False):
            axes.imshow(picture, interpolation="nearest" if max(picture.shape) <= SMALL else "antialiased")
            axes.set_title(title, fontsize=8)
        axes_row[0].annotate(
            name, (-0.04, 0.5), xycoords="axes fraction", rotation=90, ha="right", va="center", fontsize=8
        )
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a picture, its folder made; raises UserError where that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.05)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or one_line(error)}): give another --out") from None


def each_picture(
    inputs: Sequence[Path], out: Path, ending: str, explain: Callable[[Image.Image], tuple[dict[str, Any], Figure]]
) -> int:
    """Writes a sheet for every picture file in the inputs and prints a JSON line.

    Args:
        inputs: Picture files, and folders that are searched for them.
        out: Folder for the sheets, which get the files' names; a number tells apart those of one name.
        ending: Of the sheets' names.
        explain: A picture -> fields for the line, and the sheet; may raise ``NotShown``.

    Returns:
        The exit status, 1 if there is a file without a sheet.

    Raises:
        UserError: There is no picture in the inputs, or the sheets cannot be written.
    """
    files = find_images(inputs)
    if not files:
        raise UserError(f"no images in {', '.join(map(str, inputs))}")
    taken: set[str] = set()
    failed = 0
    for file in files:
        row: dict[str, Any]
        try:
            fields, figure = explain(decode(file))
        except (BadImage, NotShown) as error:
            failed += 1
            row = dict(file=str(file), ok=False, error=error.reason if isinstance(error, BadImage) else str(error))
        else:
            path = out / free_name(file.stem, f".{ending}.png", taken)
            save(figure, path)
            row = dict(file=str(file), ok=True, sheet=str(path)) | fields
        print(json.dumps(row), flush=True)  # ASCII: file names may hold bytes that no terminal has
    if failed:
        print(f"{failed} of {len(files)} files have no sheet", file=sys.stderr)
    return 1 if failed else 0
