"""The figures by which a trained model of each task is judged, and where a run keeps them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from conv2former.errors import UserError, one_line


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        metric: The Hugging Face hub's name of it.
        title: Its name with its unit.
        keys: Where it stands in ``evaluation.json``.
    """

    metric: str
    title: str
    keys: tuple[str, ...]


# the headline of each task first
FIGURES = dict(
    classification=(Figure("accuracy", "top-1, %", ("top1",)), Figure("accuracy", "top-5, %", ("top5",))),
    detection=(
        Figure("mean_average_precision", "box AP, %", ("box", "ap")),
        Figure("mean_average_precision", "mask AP, %", ("mask", "ap")),
    ),
    segmentation=(
        Figure("mean_iou", "mIoU, %", ("miou",)),
        Figure("accuracy", "pixel accuracy, %", ("pixel_accuracy",)),
    ),
)


def recorded_figures(run: Path, task: str) -> list[tuple[Figure, float]]:
    """What the report of a run folder says, the headline first; none where there is no report.

    Raises:
        UserError: The report is damaged.
    """
    path = run / "evaluation.json"
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from None
    rows = []
    for figure in FIGURES[task]:
        value = found
        for key in figure.keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, (int, float)):
            rows.append((figure, float(value)))
    return rows
