"""Label maps: images whose numbers are classes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from conv2former.data.images import IGNORED, MAX_PIXELS, BadImage
from conv2former.errors import one_line

LABEL_EXTENSIONS = (".png", ".tif", ".tiff", ".bmp")
FORMATS = ("PNG", "TIFF", "BMP")  # without loss
MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # of a palette image the numbers count, not the colours
SCALED: dict[Any, int] = {"L;2": 85, "L;4": 17}  # by what Pillow multiplies grey of 2 and 4 bits


def read_labels(path: Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A mask (H, W) of uint16 as it is stored.

    Raises:
        BadImage: It cannot be read, is a colour image, or is too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise BadImage(
                        str(path), f"its {width} x {height} pixels are more than the limit of {max_pixels:,}"
                    )
                if image.mode not in MODES:
                    raise BadImage(str(path), f"a mask holds one number a pixel, this is a {image.mode} image")
                depth = image.tile[0][3] if image.format == "PNG" and image.tile else None
                values = np.asarray(image) // SCALED.get(depth, 1)
    except BadImage:
        raise
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        raise BadImage(str(path), one_line(error)[:200]) from error
    if values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
        raise BadImage(str(path), f"it holds the label {int(values.min() if values.min() < 0 else values.max())}")
    return values.astype(np.uint16)


def to_classes(labels: np.ndarray, *, classes: int, reduce_zero: bool, path: Path) -> np.ndarray:
    """Stored labels (H, W) as classes 0 to K - 1 of uint8, ``IGNORED`` for none.

    Args:
        labels: As stored; 255 is no class.
        classes: K, at most 255.
        reduce_zero: Label 0 is no class, label 1 the first one.
        path: For the message.

    Raises:
        BadImage: A label beyond the classes.
    """
    void = labels == IGNORED
    if reduce_zero:
        void |= labels == 0
        labels = labels - 1  # 0 wraps around and is void
    beyond = (labels >= classes) & ~void
    if beyond.any():
        label = int(labels[beyond].max()) + reduce_zero
        most = classes - 1 + reduce_zero
        raise BadImage(
            str(path),
            f"{int(beyond.sum()):,} pixels hold labels up to {label}, the last of the {classes} classes is {most} "
            "(255 is ignored): give data.classes or a classes.txt that fits"
            + ("" if reduce_zero else ", or data.reduce_zero_label=true"),
        )
    return np.where(void, IGNORED, labels).astype(np.uint8)
