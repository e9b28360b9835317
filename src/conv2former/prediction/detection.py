"""Objects on pictures: boxes, masks and classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from conv2former.engine.devices import pick_device
from conv2former.evaluation.detection import detect, draw_rows, load_detector
from conv2former.prediction.common import Finding


class ObjectFinder:
    """A trained detector that looks at pictures.

    A finding's ``objects`` is a list of ``label``, ``index``, ``score``, ``box`` (x0, y0, x1, y1 in the picture's
    pixels) and ``mask`` as COCO's compressed run lengths (``size``, ``counts``), the most certain first.

    Args:
        checkpoint: Run folder, saved model folder, or its ``model.safetensors``.
        threshold: Least score of what is given out.
        device: 'auto', 'cpu', 'cuda', ...

    Raises:
        UserError: The checkpoint cannot be used.
    """

    most_at_once = 1

    def __init__(self, checkpoint: Path, *, threshold: float, device: str = "auto") -> None:
        self.model, self.saved = load_detector(checkpoint)
        self.model.to(pick_device(device))
        section = self.model.section
        lower = min(threshold, section.score_threshold)
        self.model.section = section.model_copy(update=dict(score_threshold=lower))
        self.threshold = threshold

    def prepare(self, image: Image.Image) -> Image.Image:
        """The picture as it is: its size decides on the view."""
        return image

    def find(self, batch: Sequence[Image.Image]) -> list[Finding]:
        """One picture after the other, because they differ in size."""
        return [self._find(image) for image in batch]

    def _find(self, image: Image.Image) -> Finding:
        rows = [row for row in detect(self.model, image, self.saved.recipe.data) if row["score"] >= self.threshold]
        found = []
        for row in rows:
            left, top, width, height = row["bbox"]
            found.append(
                dict(
                    label=self.saved.classes[row["label"]],
                    index=row["label"],
                    score=row["score"],
                    box=[left, top, left + width, top + height],
                    mask=row["segmentation"],
                )
            )
        return Finding(dict(objects=found), partial(draw_rows, rows=rows, classes=self.saved.classes))
