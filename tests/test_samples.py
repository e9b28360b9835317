"""``conv2former samples``: what it writes is what the tasks read, and can be learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command import run_command
from conv2former.errors import UserError
from conv2former.recipes import load_recipe
from conv2former.tasks import task_class
from conv2former.tools.samples import KINDS, write_samples

SETTINGS = dict(
    classification=("finetune", []),
    segmentation=("finetune_segmentation", ["data.mask_values={0: background, 255: crack}"]),
    detection=("finetune_detection", []),
)
CLASSES = dict(classification=3, segmentation=2, detection=3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_task_reads_them(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    assert run_command(monkeypatch, "samples", kind, folder, "--count", 12) == 0
    name, settings = SETTINGS[kind]
    recipe = load_recipe(name, overrides=[*settings, "model.weights=null"])
    splits = task_class(recipe.task).open_splits(recipe, folder)
    assert len(splits.train.classes) == CLASSES[kind] and len(splits.train) > len(splits.val) > 0
    for source in (splits.train, splits.val):
        loaded = source.load(0)
        image = loaded[0] if isinstance(loaded, tuple) else loaded
        assert np.asarray(image).std() > 5
    write_samples(kind, tmp_path / "again", count=12)
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    assert files and all((tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes() for file in files)
    with pytest.raises(UserError, match="is not empty"):
        write_samples(kind, folder)


def test_masks_are_where_it_is_dark(tmp_path: Path) -> None:
    write_samples("segmentation", tmp_path, count=12)
    seen = 0
    for path in sorted((tmp_path / "masks").iterdir()):
        mask = np.asarray(Image.open(path))
        assert {*np.unique(mask)} <= {0, 255}
        image = np.asarray(Image.open(tmp_path / "images" / f"{path.stem}.jpg").convert("L"), float)
        if (mask == 255).sum() > 50:
            seen += 1
            assert image[mask == 255].mean() < image[mask == 0].mean() - 15
    assert seen >= 8


def test_masks_without_their_meaning_are_looked_at(tmp_path: Path) -> None:
    write_samples("segmentation", tmp_path, count=12)
    recipe = load_recipe("finetune_segmentation", overrides=["model.weights=null"])
    with pytest.raises(
        UserError,
        match=r"hold 0 and 255, and .*: add --set 'data\.mask_values=\{0: background, 255: object\}'",
    ):
        task_class(recipe.task).open_splits(recipe, tmp_path)
