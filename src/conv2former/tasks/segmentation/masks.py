"""Label maps: images whose numbers are classes."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from conv2former.data.images import IGNORED, MAX_PIXELS, BadImage
from conv2former.errors import one_line

LABEL_EXTENSIONS = (".png", ".tif", ".tiff", ".bmp", ".gif")
LOSSY_EXTENSIONS = (".jpg", ".jpeg", ".webp")  # read where the recipe says what the values mean
FORMATS = ("PNG", "TIFF", "BMP", "GIF", "JPEG", "WEBP")
MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # of a palette image the numbers count, not the colours
GREY = 0x010101  # of which greys are multiples, as 24 bits
SCALED: dict[Any, int] = {"L;2": 85, "L;4": 17}  # by what Pillow multiplies grey of 2 and 4 bits


class ColourMask(BadImage):
    """A mask in colour where numbers are asked for.

    Attributes:
        colours: Pixels of each, by red, green and blue as 24 bits.
    """

    def __init__(self, file: str, reason: str, colours: Counter[int] | None = None) -> None:
        super().__init__(file, reason)
        self.colours: Counter[int] = colours or Counter()


def read_labels(
    path: Path,
    *,
    max_pixels: int = MAX_PIXELS,
    colours: bool = False,
    greys: bool = False,
    white: int = 1,
    turn: bool = False,
) -> np.ndarray:
    """A mask (H, W) of uint16 as it is stored; colour images whose channels are equal count as grey.

    Args:
        path: The file.
        max_pixels: Larger ones are refused.
        colours: Gives red, green and blue as 24 bits of uint32, those of a palette too.
        greys: Gives the grey that a palette has for each number, in the place of the number.
        white: The value of white in a mask of 1 bit.
        turn: Whether its own EXIF orientation is applied.

    Raises:
        ColourMask: It is a colour image, and ``colours`` is off.
        BadImage: It cannot be read, or is too large.
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
                if (frames := getattr(image, "n_frames", 1)) > 1:
                    image.seek(1)  # smaller ones are overviews of the first (GDAL's)
                    if image.size == (width, height):
                        raise BadImage(str(path), f"it has {frames} pages or frames: a mask is one image")
                    image.seek(0)
                mode, depth = image.mode, image.tile[0][3] if image.format == "PNG" and image.tile else None
                shown = ImageOps.exif_transpose(image) if turn else image
                if greys and mode == "P":
                    return _greys(shown, path)
                if colours or mode not in (*MODES, "F"):
                    return _colours(np.asarray(shown.convert("RGB")), path, shown, colours=colours)
                values = np.asarray(shown)
                values = values * white if mode == "1" else values
                values = _whole(values, path) if mode == "F" else values // SCALED.get(depth, 1)
    except BadImage:
        raise
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        raise BadImage(str(path), one_line(error)[:200]) from error
    if values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
        raise BadImage(str(path), f"it holds the label {int(values.min() if values.min() < 0 else values.max())}")
    return values.astype(np.uint16)


def palette(path: Path) -> dict[int, int]:
    """The colours, as 24 bits, of the numbers in a mask with a palette; empty for others and damaged files."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return _used(image) if image.mode == "P" else {}
    except Exception:  # whoever reads the mask says it
        return {}


def _used(image: Image.Image) -> dict[int, int]:
    codes = _codes(np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3))
    return {int(value): int(codes[value]) for value in np.unique(np.asarray(image)) if value < len(codes)}


def _codes(pixels: np.ndarray) -> np.ndarray:
    """Red, green and blue (..., 3) as 24 bits (...)."""
    return pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)


def _greys(image: Image.Image, path: Path) -> np.ndarray:
    table = np.zeros(256, np.uint16)
    for value, colour in _used(image).items():
        if colour % GREY:
            raise BadImage(str(path), "it has a palette of colours, others have one of greys: save all masks alike")
        table[value] = colour & 255
    return table[np.asarray(image)]


def _whole(values: np.ndarray, path: Path) -> np.ndarray:
    """Numbers with a point as whole ones; raises BadImage where they are none."""
    rounded = np.rint(values)
    if not (np.abs(values - rounded) < 1e-3).all():  # not a number either
        wrong = values[~(np.abs(values - rounded) < 1e-3)].flat[0]
        raise BadImage(str(path), f"it holds {wrong:.4g}, and classes are whole numbers: save it with whole numbers")
    return rounded.astype(np.int64)


def _colours(pixels: np.ndarray, path: Path, image: Image.Image, *, colours: bool) -> np.ndarray:
    """Red, green and blue (H, W, 3) as 24 bits (H, W), or grey as it is."""
    mode = image.mode
    if mode in ("LA", "RGBA") and (pixels == pixels[:1, :1]).all() and np.ptp(np.asarray(image)[..., -1]):
        raise BadImage(str(path), "it is of one colour, with its shape in the alpha channel: save that as a grey image")
    if not colours and (pixels == pixels[..., :1]).all():
        return pixels[..., 0].astype(np.uint16)
    codes = _codes(pixels)
    if not colours:
        values, counts = np.unique(codes, return_counts=True)
        found = Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        reason = (
            f"a mask holds one number a pixel, this is a {mode} image: say what its colours mean in data.mask_values"
        )
        raise ColourMask(str(path), reason, found)
    return codes


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
