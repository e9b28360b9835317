"""Real images for tests: scikit-learn's handwritten digits as PNG files in class folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from conv2former.config import IMAGENET_MEAN, IMAGENET_STD
from conv2former.recipes import Recipe, load_recipe
from conv2former.tasks.classification.sources import DigitsSource

# a run of seconds: four digits, 16 px, three epochs of four steps
TINY = [
    "data.source=folder",
    "data.input_size=16",
    "data.val_fraction=0.2",
    "optim.batch_size=16",
    "schedule.epochs=3",
    "schedule.warmup_epochs=1",
    "engine.accelerator=cpu",
]


def tiny_recipe(*overrides: str) -> Recipe:
    """The quick start's recipe on folders, cut down to seconds."""
    recipe = load_recipe("quickstart", overrides=[*TINY, *overrides])
    return recipe.settled({"data.mean": IMAGENET_MEAN, "data.std": IMAGENET_STD})


def write_digits(root: Path, *, classes: int = 4, train: int = 16, val: int = 4) -> Path:
    """``root/train`` and ``root/val`` with one folder per digit."""
    source = DigitsSource()
    targets = np.asarray(source.targets)
    for digit in range(classes):
        members = np.flatnonzero(targets == digit)
        for split, indices in (("train", members[:train]), ("val", members[train : train + val])):
            folder = root / split / f"digit-{digit}"
            folder.mkdir(parents=True)
            for index in indices:
                source.load(int(index)).save(folder / f"{index:04d}.png")
    return root


def one_picture(path: Path, index: int = 0) -> Path:
    """One digit as a file."""
    Image.fromarray(DigitsSource().images[index]).save(path)
    return path
