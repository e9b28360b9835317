"""Masks as COCO's run lengths, by faster-coco-eval."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from conv2former.errors import UserError


@functools.cache
def library() -> Any:
    """faster-coco-eval's masks; raises UserError where it is not installed."""
    try:
        from faster_coco_eval.core import mask
    except ImportError:
        raise UserError("COCO's masks and metrics need faster-coco-eval: pip install faster-coco-eval") from None
    return mask


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """A mask (H, W) as compressed run lengths: ``size`` [H, W] and ``counts``, a string, as in COCO's results."""
    encoded = library().encode(np.asfortranarray(mask.astype(np.uint8)))
    counts = encoded["counts"]
    counts = counts if isinstance(counts, str) else counts.decode()
    return dict(size=[int(side) for side in encoded["size"]], counts=counts)


def decode_mask(encoded: dict[str, Any]) -> np.ndarray:
    """Run lengths, compressed or as a list, as a mask (H, W) of uint8; raises ValueError where they are damaged."""
    height, width = encoded["size"]
    counts = encoded["counts"]
    if isinstance(counts, list):
        encoded = library().frPyObjects(dict(size=[height, width], counts=counts), height, width)
    else:
        encoded = dict(size=[height, width], counts=counts.encode() if isinstance(counts, str) else counts)
    return np.asarray(library().decode(encoded))


def polygons_to_mask(polygons: list[Any], height: int, width: int) -> np.ndarray:
    """The union of polygons [x0, y0, x1, y1, ...] in pixels as a mask (H, W) of uint8."""
    parts = library().frPyObjects([list(map(float, polygon)) for polygon in polygons], height, width)
    return np.asarray(library().decode(library().merge(parts)))
