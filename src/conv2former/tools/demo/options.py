"""What the page's controls say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from conv2former.tasks.base import Task
from conv2former.viz.drawing import STRENGTH

LAYERS = ("boxes", "masks", "labels")
MOST_CLASSES = 10


@dataclass(frozen=True)
class Options:
    """How models answer and how that is drawn; the defaults are those of ``conv2former predict``.

    Attributes:
        top_k: Classes that a classifier names.
        threshold: Least score of what a detector gives out.
        opacity: Of masks, 0 to 1.
        layers: Of ``LAYERS``, those that are drawn.
        cam: Whether class activation is shown.
        maps: Whether modulation maps are shown.
    """

    top_k: int = 5
    threshold: float = 0.3
    opacity: float = STRENGTH
    layers: frozenset[str] = frozenset(LAYERS)
    cam: bool = False
    maps: bool = False

    @classmethod
    def read(cls, top_k: Any, threshold: Any, opacity: Any, layers: Any, cam: Any, maps: Any) -> Options:
        """From a request, which may hold anything: what no control can say counts as the nearest, or the default."""
        return cls(
            round(_within(top_k, 1, MOST_CLASSES, cls.top_k)),
            _within(threshold, 0.05, 1, cls.threshold),
            _within(opacity, 0, 1, cls.opacity),
            frozenset(layer for layer in LAYERS if layer in layers) if isinstance(layers, list) else cls.layers,
            bool(cam),
            bool(maps),
        )

    def of(self, task: Task) -> dict[str, Any]:
        """Those that the task's predictions take."""
        return {name: getattr(self, name) for name in ("top_k", "threshold") if name in task.options}


def _within(value: Any, low: float, high: float, default: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        return default
    return min(max(value, low), high)
