"""Images from files to classes: what ``conv2former predict`` does, with numpy and Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from os import PathLike
from typing import Any

import numpy as np
from PIL import Image

from conv2former_runtime.errors import UserError
from conv2former_runtime.images import BadImage, decode, limit_aspect, shown
from conv2former_runtime.model import Floats, Model

BATCH = 16


class Classifier(Model):
    """A network that names what is on images; see ``Model`` for what it computes."""

    def predict(self, images: Any, *, top_k: int = 5) -> Iterator[dict[str, Any]]:
        """For each image ``ok`` and ``top``, its classes with ``label``, ``index`` and ``probability``, or ``error``.

        Args:
            images: Paths, the contents of files, or what `Image.open` gives (see ``images.shown``); one, or any number.
            top_k: Classes that are named.

        Raises:
            UserError: The network has no classifier.
        """
        if isinstance(images, str | bytes | PathLike | Image.Image) or hasattr(images, "read"):
            images = [images]
        if self.steps[-1] != "head":
            raise UserError("the file holds a network without a classifier: it gives maps, not classes")
        waiting = iter(images)
        while prepared := [self._prepared(image) for image in islice(waiting, BATCH)]:
            good = [each for each in prepared if not isinstance(each, BadImage)]
            rows = iter(self(np.stack(good)) if good else ())
            for each in prepared:
                if isinstance(each, BadImage):
                    yield dict(ok=False, error=each.reason)
                else:
                    yield dict(ok=True, top=top_classes(next(rows), self.labels, top_k))

    def prepare(self, image: Image.Image) -> Floats:
        """An image as the network takes it, (3, H, W)."""
        return prepare(image, self.facts)

    def _prepared(self, image: Any) -> Floats | BadImage:
        try:
            return self.prepare(image if isinstance(image, Image.Image) else decode(image))
        except BadImage as error:
            return error


def prepare(image: Image.Image, facts: Mapping[str, Any]) -> Floats:
    """An image as a network takes it, (3, H, W): resized, its middle, normalised.

    ``facts`` are those of an exported file: ``input_size``, ``crop_pct``, ``crop_mode``, ``interpolation``, ``mean``,
    ``std``.
    """
    _, height, width = facts["input_size"]
    image = limit_aspect(shown(image))
    short = [math.floor(side / facts["crop_pct"]) for side in (height, width)]
    if facts["crop_mode"] == "center":
        longest, shortest = max(image.size), min(image.size)
        sizes = {shortest: short[0], longest: int(short[0] * longest / shortest)}
        size = sizes[image.width], sizes[image.height]
    else:
        size = short[1], short[0]
    if size != image.size:
        image = image.resize(size, Image.Resampling[facts["interpolation"].upper()])
    left, top = round((image.width - width) / 2.0), round((image.height - height) / 2.0)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32)
    mean, std = (255 * np.array(facts[name], np.float32) for name in ("mean", "std"))
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))


def top_classes(logits: Floats, labels: Sequence[str], count: int) -> list[dict[str, Any]]:
    """The most probable classes of an image, from its logits (classes,)."""
    powers = np.exp(logits - logits.max())
    probabilities = powers / powers.sum()
    best = np.argsort(-probabilities, kind="stable")[:count]
    return [dict(label=labels[i], index=int(i), probability=float(probabilities[i])) for i in best]
