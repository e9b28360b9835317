"""The class of every pixel of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from conv2former.engine.devices import pick_device
from conv2former.evaluation.segmentation import load_segmenter, segment
from conv2former.prediction.common import Finding
from conv2former.viz.drawing import label_overlay, legend, side_by_side


class Segmenter:
    """A trained segmenter that looks at pictures.

    A finding's ``classes`` is a list of ``label``, ``index``, ``share`` of the pixels and the ``mask`` as COCO's
    compressed run lengths (``size``, ``counts``), the largest share first.

    Args:
        checkpoint: Run folder, saved model folder, or its ``model.safetensors``.
        device: 'auto', 'cpu', 'cuda', ...

    Raises:
        UserError: The checkpoint cannot be used.
    """

    most_at_once = 1

    def __init__(self, checkpoint: Path, *, device: str = "auto") -> None:
        self.model, self.saved = load_segmenter(checkpoint)
        self.model.to(pick_device(device))

    def prepare(self, image: Image.Image) -> Image.Image:
        """The picture as it is: its size decides on the views."""
        return image

    def find(self, batch: Sequence[Image.Image]) -> list[Finding]:
        """One picture after the other, because they differ in size."""
        return [self._find(image) for image in batch]

    def _find(self, image: Image.Image) -> Finding:
        from conv2former.data.rle import encode_mask

        labels = segment(self.model, image, self.saved.recipe.data)
        indices, counts = np.unique(labels, return_counts=True)
        classes = [
            dict(
                label=self.saved.classes[index],
                index=int(index),
                share=int(count) / labels.size,
                mask=encode_mask(labels == index),
            )
            for index, count in sorted(zip(indices, counts, strict=True), key=lambda pair: -pair[1])
        ]
        return Finding(dict(classes=classes), partial(draw, labels=labels, classes=self.saved.classes))


def draw(picture: Image.Image, labels: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """The picture with its classes in colour, and what the colours mean below."""
    overlay = label_overlay(picture, labels)
    names = legend(classes, np.unique(labels), width=max(overlay.width, 240))
    return side_by_side([overlay, names], vertical=True)
