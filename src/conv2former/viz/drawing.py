"""Results drawn on images: overlays of classes with their legend, boxes with masks and labels."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from conv2former.data.images import IGNORED
from conv2former.errors import printable

STRENGTH = 0.55  # of an overlay's colour
RGB = tuple[int, int, int]
LINE = 22  # height of a line of the legend, pixels
BARS_SIDE = 512  # longer side of an image with bars below


def colour(index: int) -> RGB:
    """A colour for a class; neighbours differ (golden ratio over hues, with three strengths)."""
    hue, value = (index * 0.618034) % 1, (1.0, 0.75, 0.55)[index % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def over_grey(rgb: RGB) -> RGB:
    """The colour of a class as an overlay shows it, on the grey of a middling image."""
    red, green, blue = (round(STRENGTH * part + (1 - STRENGTH) * 128) for part in rgb)
    return red, green, blue


def label_overlay(image: Image.Image, labels: np.ndarray, colours: Sequence[RGB | None]) -> Image.Image:
    """The image with its classes (H, W) in their colours; pixels of no class (255) or no colour stay as they are."""
    palette, bare = np.zeros((IGNORED + 1, 3), np.uint8), np.ones(IGNORED + 1, bool)
    for index, rgb in enumerate(colours):
        if rgb is not None:
            palette[index], bare[index] = rgb, False
    pixels = np.asarray(image)
    mixed = (pixels * (1 - STRENGTH) + palette[labels] * STRENGTH).astype(np.uint8)
    return Image.fromarray(np.where(bare[labels][..., None], pixels, mixed))


def legend(classes: Sequence[str], colours: Sequence[RGB | None], shown: Iterable[int], *, width: int) -> Image.Image:
    """Names of some classes in their colours, as many a line as fit; a class without a colour has an empty square."""
    font = ImageFont.load_default(14)
    names = [(int(index), printable(classes[int(index)])) for index in shown if int(index) < len(classes)]
    positions: list[tuple[int, int]] = []
    left, row = 6, 0
    for _, name in names:
        needed = round(font.getlength(name)) + 36
        if left + needed > width and left > 6:
            left, row = 6, row + 1
        positions.append((left, LINE * row + 4))
        left += needed
    sheet = Image.new("RGB", (width, LINE * (row + 1) + 4), "white")
    canvas = ImageDraw.Draw(sheet)
    for (left, top), (index, name) in zip(positions, names, strict=True):
        rgb = colours[index]
        canvas.rectangle((left, top + 2, left + 14, top + 16), fill=rgb and over_grey(rgb), outline="grey")
        canvas.text((left + 19, top), name, fill="black", font=font)
    return sheet


def side_by_side(images: Sequence[Image.Image], *, vertical: bool = False, gap: int = 4) -> Image.Image:
    """Images in a row or a column, on white."""
    if not images:
        return Image.new("RGB", (1, 1), "white")
    widths, heights = [p.width for p in images], [p.height for p in images]
    spare = gap * (len(images) - 1)
    size = (max(widths), sum(heights) + spare) if vertical else (sum(widths) + spare, max(heights))
    sheet = Image.new("RGB", size, "white")
    at = 0
    for image in images:
        sheet.paste(image, (0, at) if vertical else (at, 0))
        at += gap + (image.height if vertical else image.width)
    return sheet


def titled(images: Sequence[Image.Image], titles: Sequence[str]) -> list[Image.Image]:
    """The images of one row with a title above each."""
    font, sheets = ImageFont.load_default(14), []
    for image, title in zip(images, titles, strict=True):
        sheet = Image.new("RGB", (max(image.width, round(font.getlength(title))), image.height + LINE), "white")
        sheet.paste(image, (0, LINE))
        ImageDraw.Draw(sheet).text((0, 2), title, fill="black", font=font)
        sheets.append(sheet)
    return sheets


def outline(inside: np.ndarray, width: int) -> np.ndarray:
    """The pixels of a mask (H, W) of bool that lie at most ``width`` from its edge."""
    inner = np.pad(inside, width)
    for axis in (0, 1):  # shrunk by a square, one axis after the other
        shifted = [np.roll(inner, shift, axis) for shift in range(-width, width + 1)]
        inner = np.logical_and.reduce(shifted)
    return inside & ~inner[width:-width, width:-width]


def objects(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    captions: Sequence[str],
    colours: Sequence[int],
    masks: Iterable[np.ndarray | None],
) -> Image.Image:
    """The image with masks (H, W), boxes (x0, y0, x1, y1 in its pixels) and captions in colours of ``colour``.

    A mask's outline is drawn in the full colour, by which neighbours are told apart.
    """
    pixels = np.array(image)
    for mask, index in zip(masks, colours, strict=True):
        if mask is not None:
            tint(pixels, mask.astype(bool), colour(index), outlined=True)
    sheet = Image.fromarray(pixels)
    for box, index in zip(boxes, colours, strict=True):
        frame(sheet, box, colour(index))
    for box, caption, index in zip(boxes, captions, colours, strict=True):  # no box over another one's caption
        label(sheet, box, caption, colour(index))
    return sheet


def tint(
    pixels: np.ndarray,
    inside: np.ndarray,
    rgb: RGB,
    *,
    strength: float = STRENGTH,
    outlined: bool = False,
) -> None:
    """Colours the pixels (H, W, 3) of a mask (H, W) of bool, in place."""
    pixels[inside] = (pixels[inside] * (1 - strength) + np.array(rgb) * strength).astype(np.uint8)
    if outlined:
        pixels[outline(inside, max(1, max(inside.shape) // 400))] = rgb


def frame(image: Image.Image, box: Sequence[float], rgb: RGB) -> None:
    """Draws a box (x0, y0, x1, y1) into the image."""
    left, top, right, bottom = box
    corners = left, top, max(right, left), max(bottom, top)
    ImageDraw.Draw(image).rectangle(corners, outline=rgb, width=max(2, max(image.size) // 400))


def label(image: Image.Image, box: Sequence[float], caption: str, rgb: RGB) -> None:
    """Writes above a box, into the image, what it holds."""
    canvas, caption, font = (
        ImageDraw.Draw(image),
        printable(caption),
        ImageFont.load_default(max(12, max(image.size) // 50)),
    )
    left, top = box[:2]
    extent = canvas.textbbox((left, top), caption, font=font)
    high = extent[3] - extent[1] + 6
    above = max(top - high, 0)
    canvas.rectangle((left, above, left + extent[2] - extent[0] + 6, above + high), fill=rgb)
    canvas.text((left + 3, above), caption, fill="white", font=font)


def with_bars(image: Image.Image, bars: Sequence[tuple[str, float]]) -> Image.Image:
    """The image, enlarged where it is small, with names and bars of their probabilities below."""
    scale = BARS_SIDE / max(image.size)
    filter_ = Image.Resampling.NEAREST if scale >= 4 else Image.Resampling.LANCZOS
    image = image.resize((max(round(image.width * scale), 1), max(round(image.height * scale), 1)), filter_)
    line, font = 26, ImageFont.load_default(16)
    width = max(image.width, 360)
    sheet = Image.new("RGB", (width, image.height + line * len(bars) + 8), "white")
    sheet.paste(image, ((width - image.width) // 2, 0))
    canvas = ImageDraw.Draw(sheet)
    for i, (name, probability) in enumerate(bars):
        above = image.height + 6 + line * i
        canvas.rectangle((0, above, max(round(width * probability), 1), above + line - 6), fill="#bcd7f0")
        canvas.text((8, above), f"{printable(name)}  {probability:.1%}", fill="black", font=font)
    return sheet
