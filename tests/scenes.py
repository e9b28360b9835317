"""Small annotated scenes: parts of scikit-learn's photographs with shapes painted on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images

from conv2former.data.rle import encode_mask
from conv2former.recipes import Recipe, load_recipe
from conv2former.tasks.detection.task import DetectionTask

RED, BLUE = (250, 10, 10), (10, 10, 250)
CATEGORIES = [dict(id=7, name="disc"), dict(id=3, name="block")]  # ids with gaps, not in order


def small_detector(*overrides: str) -> Recipe:
    """A recipe for ``write_coco``'s scenes that trains in a second."""
    return load_recipe("smoke_detection", overrides=[*overrides])


def small_segmenter(*overrides: str) -> Recipe:
    """A recipe for ``write_pairs``'s scenes that trains in a second."""
    return load_recipe("smoke_segmentation", overrides=[*overrides])


def certain(folder: Path, *overrides: str) -> Path:
    """A saved detector with new weights, whose scores lie far apart; those of a barely trained one are almost equal."""
    torch.manual_seed(3)
    task = DetectionTask.build(small_detector(*overrides), ["disc", "block"])
    model = task.model
    for layer in (model.rpn.head.cls_logits, model.rpn.head.bbox_pred):
        torch.nn.init.normal_(layer.weight, std=0.5)
    for stage in model.stages:
        torch.nn.init.normal_(stage.box_head.classes.weight, std=1.0)
        torch.nn.init.normal_(stage.box_head.offsets.weight, std=0.3)
    task.save(folder, state=model.state_dict(), note={})
    return folder


def scene(number: int, *, width: int = 128, height: int = 96) -> tuple[Image.Image, list[int], list[int]]:
    """A part of a photograph with a red block and a blue disc, and their boxes (x0, y0, x1, y1), ends included."""
    generator = np.random.default_rng(number)
    photograph = Image.fromarray(load_sample_images().images[number % 2])
    left, top = generator.integers(0, 200, 2)
    image = photograph.crop((left, top, left + 2 * width, top + 2 * height)).resize((width, height))
    x, y = generator.integers(4, 24, 2)
    block = [int(x), int(y), int(x) + int(generator.integers(20, 36)), int(y) + int(generator.integers(20, 36))]
    x, y = generator.integers(70, 80), generator.integers(40, 50)
    disc = [int(x), int(y), int(x) + 32, int(y) + 32]
    canvas = ImageDraw.Draw(image)
    canvas.rectangle(block, fill=RED)
    canvas.ellipse(disc, fill=BLUE)
    return image, block, disc


def block_polygon(box: list[int]) -> list[float]:
    """The outline of a painted rectangle, pixel edges."""
    left, top, right, bottom = box[0], box[1], box[2] + 1, box[3] + 1
    return [left, top, right, top, right, bottom, left, bottom]


def coco_entries(number: int, image: Image.Image, block: list[int], disc: list[int]) -> list[dict[str, Any]]:
    """COCO's annotations of a scene: a polygon, run lengths, and a crowd in the corner."""
    painted = (np.asarray(image) == BLUE).all(axis=2)
    crowd = np.zeros((image.height, image.width), bool)
    crowd[-10:, :10] = True
    rows = [
        dict(category_id=3, segmentation=[block_polygon(block)], box=block, iscrowd=0),
        dict(category_id=7, segmentation=encode_mask(painted), box=disc, iscrowd=0),
        dict(
            category_id=3, segmentation=encode_mask(crowd), box=[0, image.height - 10, 9, image.height - 1], iscrowd=1
        ),
    ]
    entries = []
    for position, row in enumerate(rows):
        left, top, right, bottom = row.pop("box")
        box = [left, top, right + 1 - left, bottom + 1 - top]
        entries.append(dict(row, id=10 * number + position, image_id=number, bbox=box, area=box[2] * box[3]))
    return entries


def write_coco(root: Path, *, train: int = 4, val: int = 2) -> Path:
    """COCO's layout; the last training image shows nothing that counts."""
    (root / "annotations").mkdir(parents=True)
    for split, numbers in (("train2017", range(train)), ("val2017", range(100, 100 + val))):
        (root / split).mkdir()
        images, annotations = [], []
        for number in numbers:
            image, block, disc = scene(number)
            image.save(root / split / f"{number:03d}.png")
            images.append(dict(id=number, file_name=f"{number:03d}.png", width=image.width, height=image.height))
            annotations += coco_entries(number, image, block, disc) if number != train - 1 else []
        content = dict(images=images, annotations=annotations, categories=CATEGORIES)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def label_map(image: Image.Image, *, first: int = 0) -> np.ndarray:
    """Background, block and disc as ``first`` and the next two numbers; the left column as 255."""
    pixels = np.asarray(image)
    labels = np.full(pixels.shape[:2], first, np.uint8)
    labels[(pixels == RED).all(axis=2)] = first + 1
    labels[(pixels == BLUE).all(axis=2)] = first + 2
    labels[:, 0] = 255
    return labels


def write_pairs(root: Path, *, count: int = 6) -> Path:
    """Folders images/ and masks/ with classes.txt."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number in range(count):
        image = scene(number)[0]
        image.save(root / "images" / f"{number}.png")
        Image.fromarray(label_map(image)).save(root / "masks" / f"{number}.png")
    (root / "classes.txt").write_text("ground\nblock\ndisc\n")
    return root


def write_ade20k(root: Path, *, train: int = 3, val: int = 2) -> Path:
    """ADE20K's layout; label 0 is no class."""
    for split, numbers in (("training", range(train)), ("validation", range(100, 100 + val))):
        for folder in ("images", "annotations"):
            (root / folder / split).mkdir(parents=True)
        for number in numbers:
            image = scene(number)[0]
            image.save(root / "images" / split / f"{number}.png")
            labels = label_map(image, first=1)
            labels[labels == 255] = 0
            Image.fromarray(labels).save(root / "annotations" / split / f"{number}.png")
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tName\n1\t0.5\tground, earth\n2\t0.2\tblock\n3\t0.3\tdisc\n")
    return root
