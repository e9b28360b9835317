"""``conv2former samples``: small data sets to try the commands on, made here, so that nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from conv2former.errors import UserError, attempt
from conv2former.files import replace_text

Random = np.random.Generator
SIDE = 192  # pixels of the images that are drawn
SMOOTHER = 4  # drawn at so many times the size, then made smaller: smooth edges
PARTS = ("nut", "washer", "bolt")


def write_samples(name: str, folder: Path, *, count: int = 60, seed: int = 0) -> str:
    """Writes a data set, and returns a sentence that says what it is; the same one for the same ``seed``.

    Raises:
        UserError: The folder is there and not empty, or cannot be written.
    """
    with attempt(f"write to {folder}"):
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: give a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        return KINDS[name](folder, count, np.random.default_rng(seed))


def _singles(folder: Path, count: int, random: Random) -> str:
    """A part alone in each image, in class folders; a fifth of the images for validation."""
    for kind, name in enumerate(PARTS):
        for number in range(count):
            part = folder / ("val" if number < count // 5 else "train") / name
            part.mkdir(parents=True, exist_ok=True)
            image = _ground(random)
            _part(image, kind, random, middle=random.uniform(0.4, 0.6, 2) * SIDE, size=random.uniform(35, 60))
            image.resize((SIDE, SIDE), Image.Resampling.BOX).save(part / f"{number:03d}.jpg", quality=90)
    return "drawn nuts, washers and bolts in class folders, train/ and val/"


def _cracks(folder: Path, count: int, random: Random) -> str:
    """Pictures of concrete, and masks that are 255 on a crack and 0 beside it."""
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for number in range(count):
        mask = Image.new("L", (SIDE * SMOOTHER,) * 2)
        for _ in range(0 if number % 6 == 5 else random.integers(1, 4)):  # every sixth wall is sound
            _crack(ImageDraw.Draw(mask), random)
        mask = mask.resize((SIDE, SIDE), Image.Resampling.BOX)
        depth = np.asarray(mask.filter(ImageFilter.GaussianBlur(0.7)))[..., None] / 255
        pixels = _surface(random, random.uniform(120, 190)) * (1 - depth * random.uniform(0.35, 0.7))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{number:03d}.jpg", quality=90)
        mask.point(lambda value: 255 * (value > 127)).save(folder / "masks" / f"{number:03d}.png")
    return "drawn walls in images/, masks of their cracks (0 and 255) in masks/"


def _crack(canvas: ImageDraw.ImageDraw, random: Random) -> None:
    """A line that changes its direction and width a little at every step."""
    place, direction, width = random.uniform(0, SIDE, 2), random.uniform(0, 2 * np.pi), random.uniform(1.5, 4)
    for _ in range(random.integers(20, 60)):
        direction += random.normal(0, 0.35)
        width = float(np.clip(width + random.normal(0, 0.3), 1.2, 5))
        ahead = place + 5 * np.array([np.cos(direction), np.sin(direction)])
        ends = [tuple(SMOOTHER * point) for point in (place, ahead)]
        canvas.line(ends, fill=255, width=round(SMOOTHER * width), joint="curve")
        place = ahead


def _benches(folder: Path, count: int, random: Random) -> str:
    """Nuts, washers and bolts on a bench, with outlines in COCO's format; a fifth of the images for validation."""
    (folder / "annotations").mkdir()
    for split, images in (("train", count - count // 5), ("val", count // 5)):
        (folder / split).mkdir()
        entries: list[dict[str, Any]] = []
        for number in range(images):
            image, found = _bench(random)
            image.save(folder / split / f"{number:03d}.jpg", quality=90)
            entries += [dict(entry, id=len(entries) + i + 1, image_id=number + 1) for i, entry in enumerate(found)]
        rows = [dict(id=i + 1, file_name=f"{i:03d}.jpg", width=SIDE, height=SIDE) for i in range(images)]
        categories = [dict(id=i + 1, name=name) for i, name in enumerate(PARTS)]
        content = json.dumps(dict(images=rows, annotations=entries, categories=categories))
        replace_text(folder / "annotations" / f"{split}.json", content)
    return "drawn nuts, washers and bolts in train/ and val/, their boxes and outlines in annotations/"


def _bench(random: Random) -> tuple[Image.Image, list[dict[str, Any]]]:
    """An image with a part in some of its nine fields, and COCO's entry of each."""
    image, entries = _ground(random), []
    for field in random.permutation(9)[: random.integers(2, 7)]:
        kind, middle = int(random.integers(3)), np.array([field % 3, field // 3]) * SIDE / 3 + SIDE / 6
        outline = _part(image, kind, random, middle=middle + random.uniform(-4, 4, 2), size=random.uniform(17, 27))
        inside = outline.clip(0, SIDE)
        low, high = inside.min(0), inside.max(0)
        box = [*low.round(2).tolist(), *(high - low).round(2).tolist()]
        polygon = [inside.round(2).ravel().tolist()]
        x, y = inside.T
        area = round(abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2, 2)  # of the polygon
        entries.append(dict(category_id=kind + 1, bbox=box, area=area, iscrowd=0, segmentation=polygon))
    return image.resize((SIDE, SIDE), Image.Resampling.BOX), entries


def _ground(random: Random) -> Image.Image:
    """A bench of some colour, ``SMOOTHER`` times as large."""
    ground = _surface(random, random.uniform(60, 150)) * random.uniform(0.85, 1.15, 3)
    return Image.fromarray(ground.clip(0, 255).astype(np.uint8)).resize((SIDE * SMOOTHER,) * 2)


def _part(
    image: Image.Image, kind: int, random: Random, *, middle: npt.NDArray[np.float64], size: float
) -> npt.NDArray[np.float64]:
    """Draws a part with its shadow; its corners (N, 2), pixels of the small image."""
    outline = _outline(kind, random.uniform(0, np.pi), size) + middle
    steel, canvas = int(random.uniform(150, 225)), ImageDraw.Draw(image)
    canvas.polygon([tuple(p) for p in SMOOTHER * (outline + 1.5)], fill=(25, 25, 25))
    canvas.polygon([tuple(p) for p in SMOOTHER * outline], fill=(steel, steel, min(255, steel + 12)))
    if PARTS[kind] != "bolt":
        hole = size * (0.5 if PARTS[kind] == "nut" else 0.6)
        canvas.ellipse([*(SMOOTHER * (middle - hole)), *(SMOOTHER * (middle + hole))], fill=(45, 45, 48))
    return outline


def _outline(kind: int, turn: float, size: float) -> npt.NDArray[np.float64]:
    """Corners (N, 2) of a part around its middle, pixels."""
    if PARTS[kind] == "bolt":
        length, head, shaft = size, 0.5 * size, 0.2 * size
        half = [(-length, -head), (-0.5 * length, -head), (-0.5 * length, -shaft), (length, -shaft)]
        corners = np.array([*half, *[(x, -y) for x, y in reversed(half)]])
    else:
        angles = np.linspace(0, 2 * np.pi, 6 if PARTS[kind] == "nut" else 40, endpoint=False)
        corners = size * np.stack([np.cos(angles), np.sin(angles)], 1)
    return corners @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])


def _surface(random: Random, light: float) -> npt.NDArray[np.float64]:
    """A rough grey surface (SIDE, SIDE, 3): noise of several sizes, and light from one side."""
    ground = np.full((SIDE, SIDE), light)
    for cells, strength in ((6, 9.0), (24, 7.0), (SIDE, 6.0)):
        noise = Image.fromarray(random.normal(0, strength, (cells, cells)).astype(np.float32))
        ground += np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    ground += np.linspace(-1, 1, SIDE) * random.uniform(-25, 25)
    return np.repeat(ground[..., None], 3, axis=2)


KINDS: dict[str, Callable[[Path, int, Random], str]] = dict(
    classification=_singles, segmentation=_cracks, detection=_benches
)
