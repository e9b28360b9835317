"""Sheets of maps over images: drawn with matplotlib, one for each image file, with a JSON line each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from conv2former.data.images import BadImage, decode, given_images
from conv2former.errors import UserError, attempt, say
from conv2former.files import output_names

STRENGTH = 0.6  # of a map's colours over the image
PANEL = 1.9  # width of a panel, inches
SMALL = 64  # images up to this side are drawn with their pixels visible


class NotShown(UserError):
    """An image on which there is nothing of what was asked for."""


def over(image: np.ndarray, values: np.ndarray, *, signed: bool = False) -> np.ndarray:
    """A map (h, w) in colours over the image in grey; images are (h, w, 3) of uint8.

    The map is drawn from the lowest to the highest value. If it is ``signed``, 0 is the middle of the colours.
    """
    low, high = float(values.min()), float(values.max())
    if signed:
        high = max(abs(low), abs(high))
        low = -high
    scaled = (values - low) / ((high - low) or 1)
    colours = colormaps["coolwarm" if signed else "turbo"](scaled)[..., :3] * 255
    grey = np.asarray(Image.fromarray(image).convert("L"), float)[..., None]
    return (grey * (1 - STRENGTH) + colours * STRENGTH).round().astype(np.uint8)


def sheet(rows: Sequence[tuple[str, Sequence[tuple[str, np.ndarray]]]]) -> Figure:
    """Panels (title, image (h, w, 3)) in rows with a name each; shorter rows end early."""
    columns = max(len(panels) for _, panels in rows)
    height, width = rows[0][1][0][1].shape[:2]
    panel = PANEL * min(max(height / width, 0.4), 2.5)
    figure = Figure(figsize=(PANEL * columns + 0.4, (panel + 0.3) * len(rows) + 0.1), layout="constrained")
    for axes_row, (name, panels) in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for axes in axes_row:
            axes.set_axis_off()
        for axes, (title, image) in zip(axes_row, panels, strict=False):
            axes.imshow(image, interpolation="nearest" if max(image.shape) <= SMALL else "antialiased")
            axes.set_title(title, fontsize=8)
        axes_row[0].annotate(
            name, (-0.04, 0.5), xycoords="axes fraction", rotation=90, ha="right", va="center", fontsize=8
        )
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a sheet and makes its folder; raises UserError where that cannot be done."""
    with attempt(f"write {path}", "; give another --out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.05)


def each_image(
    inputs: Sequence[Path], out: Path, ending: str, explain: Callable[[Image.Image], tuple[dict[str, Any], Figure]]
) -> int:
    """Writes a sheet for every image file in the inputs, files and folders, and prints a JSON line.

    Sheets get the names of ``output_names``, with the ``ending``. ``explain`` turns an image into fields for the line
    and the sheet, and may raise ``NotShown``. The exit status is 1 if a file has no sheet.

    Raises:
        UserError: There is no image in the inputs, or the sheets cannot be written.
    """
    files = given_images(inputs)
    names, failed = output_names(files, inputs, f".{ending}.png"), 0
    for file in files:
        try:
            fields, figure = explain(decode(file))
        except (BadImage, NotShown) as error:
            failed += 1
            row = dict(ok=False, error=error.reason if isinstance(error, BadImage) else str(error))
        else:
            path = out / names[file]
            save(figure, path)
            row = dict(ok=True, sheet=str(path)) | fields
        print(json.dumps(dict(file=str(file)) | row), flush=True)  # ASCII: names may hold bytes that no terminal has
    if failed:
        say(f"{failed} of {len(files)} files have no sheet")
    return 1 if failed else 0
