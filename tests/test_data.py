"""Folders of labelled images: what is taken, what is refused, and that reading them is keyed."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from conv2former.data.images import BadImage
from conv2former.data.loading import Normalizer, checked, keyed_loader
from conv2former.data.sampling import EvalSampler, SampleKey, TrainSampler
from conv2former.errors import UserError
from conv2former.tasks.classification.data import (
    NO_TARGET,
    ImageDataset,
    eval_transform,
    limit_aspect,
    posterize,
    train_transform,
)
from conv2former.tasks.classification.layouts import open_eval_source, open_splits
from conv2former.tasks.classification.sources import DigitsSource, FolderSource
from digits import one_picture, tiny_recipe, write_digits

DATA = tiny_recipe().data
WHOLE = tiny_recipe("data.val_fraction=0").data
CONFIG = dict(input_size=(3, 16, 16), interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_digits(tmp_path / "digits", train=6, val=2)


def test_train_and_val_folders(data: Path) -> None:
    splits = open_splits(WHOLE, data, seed=0)
    assert (len(splits.train), len(splits.val)) == (24, 8)
    assert splits.train.classes == splits.val.classes == [f"digit-{i}" for i in range(4)]
    assert sorted(splits.train.targets) == [i for i in range(4) for _ in range(6)]
    assert splits.train.load(0).size == (8, 8)
    (data / "val").rename(data / "validation")
    assert len(open_splits(WHOLE, data, seed=0).val) == 8


def test_a_val_folder_wins_over_val_fraction(data: Path) -> None:
    assert len(open_splits(DATA, data, seed=0).train) == 24


def test_one_folder_is_split_by_class_and_by_seed_alone(data: Path) -> None:
    first, again = (open_splits(DATA, data / "train", seed=0) for _ in range(2))
    other = open_splits(DATA, data / "train", seed=1)
    names = [{split.val.name(i) for i in range(len(split.val))} for split in (first, again, other)]
    assert names[0] == names[1] != names[2]
    assert sorted(first.val.targets) == [0, 1, 2, 3]
    trained = {first.train.name(i) for i in range(len(first.train))}
    assert len(trained) == 20 and not trained & names[0]


def test_a_train_folder_alone_is_split(data: Path) -> None:
    shutil.rmtree(data / "val")
    assert len(open_splits(DATA, data, seed=0).val) == 4
    with pytest.raises(UserError, match=r"no val/ folder in .*data.val_fraction=0.1"):
        open_splits(WHOLE, data, seed=0)


def test_the_embedded_digits() -> None:
    splits = open_splits(tiny_recipe("data.source=digits").data, None, seed=0)
    assert len(splits.train) + len(splits.val) == 1797
    share = np.bincount(splits.val.targets) / np.bincount([*splits.train.targets, *splits.val.targets])
    assert share == pytest.approx(np.full(10, 0.2), abs=0.005)
    source = DigitsSource()
    assert np.asarray(source.load(0)).max() == 239 and np.asarray(source.load(0)).shape == (8, 8, 3)


def empty(data: Path) -> None:
    for image in data.rglob("*.png"):
        image.unlink()


def hide(data: Path) -> None:
    for image in sorted(data.rglob("*.png")):
        image.rename(image.with_name(f"._{image.name}"))


def one_class(data: Path) -> None:
    for split in ("train", "val"):
        for digit in (1, 2, 3):
            shutil.rmtree(data / split / f"digit-{digit}")


def rename_class(data: Path) -> None:
    (data / "val" / "digit-3").rename(data / "val" / "three")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (hide, "no images in .*train: expected one folder per class"),
        (empty, "no images in .*train: expected one folder per class"),
        (one_class, "only one class \\('digit-0'\\) in .*train: give at least two"),
        (rename_class, "different classes \\(only in train: digit-3; only in val: three\\)"),
        (lambda data: shutil.rmtree(data / "train" / "digit-1"), "only in val: digit-1"),
        (lambda data: shutil.rmtree(data), "no such folder"),
        (lambda data: shutil.rmtree(data / "train"), "no train/ folder"),
        (lambda data: one_picture(data / "train" / "loose.png"), "loose.png lies in no class folder"),
    ],
)
def test_what_is_refused(data: Path, spoil: object, message: str) -> None:
    spoil(data)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        open_splits(WHOLE, data, seed=0)


def test_a_file_in_place_of_the_folder(data: Path) -> None:
    with pytest.raises(UserError, match="not a folder"):
        open_splits(WHOLE, next(data.rglob("*.png")), seed=0)
    with pytest.raises(UserError, match="name the folder of images with --data"):
        open_splits(WHOLE, None, seed=0)


def test_a_class_of_one_image_is_trained_on_and_not_validated(data: Path) -> None:
    for image in sorted((data / "train" / "digit-2").iterdir())[1:]:
        image.unlink()
    splits = open_splits(DATA, data / "train", seed=0)
    assert splits.train.targets.count(2) == 1 and set(splits.val.targets) == {0, 1, 3}
    for image in sorted((data / "train").glob("*/*"), reverse=True):
        if len(list(image.parent.iterdir())) > 1:
            image.unlink()
    with pytest.raises(UserError, match="no class has two images"):
        open_splits(DATA, data / "train", seed=0)


def test_evaluation_maps_folders_to_the_classes_of_the_model(data: Path) -> None:
    shutil.rmtree(data / "val" / "digit-0")
    source = open_eval_source(data, ["digit-3", "digit-9", "digit-2", "digit-1"])
    names = [source.name(i).split("/")[0] for i in range(len(source))]
    assert dict(zip(names, source.targets, strict=True)) == {"digit-1": 3, "digit-2": 2, "digit-3": 0}
    with pytest.raises(UserError, match="class folders that the model does not know \\(digit-1"):
        open_eval_source(data, ["digit-2", "digit-3"])


def test_training_images_are_not_evaluated_on_by_accident(data: Path) -> None:
    shutil.rmtree(data / "val")
    with pytest.raises(UserError, match="has train/ and no val/"):
        open_eval_source(data, [f"digit-{i}" for i in range(4)])


def test_validation_images_are_not_trained_on_by_accident(data: Path) -> None:
    (data / "train").rename(data / "learning")
    with pytest.raises(UserError, match="no train/ folder"):
        open_splits(DATA, data, seed=0)


def test_classes_that_sort_alike_keep_one_order_and_hidden_files_stay_out(tmp_path: Path) -> None:
    for name in ("01", "1", "b", "B", ".hidden"):
        (tmp_path / name).mkdir()
        one_picture(tmp_path / name / "x.png")
        one_picture(tmp_path / name / ".y.png")
    source = FolderSource(tmp_path)
    assert source.classes == ["01", "1", "B", "b"] and sorted(source.targets) == [0, 1, 2, 3]
    assert [source.classes[target] for target in source.targets] == [source.name(i).split("/")[0] for i in range(4)]


def test_the_digest_knows_the_images_and_their_classes(data: Path) -> None:
    digests = [open_splits(WHOLE, data, seed=0).digest() for _ in range(2)]
    image = next((data / "train" / "digit-1").iterdir())
    image.rename(data / "train" / "digit-2" / image.name)
    digests.append(open_splits(WHOLE, data, seed=0).digest())
    assert digests[0] == digests[1] != digests[2]


def test_augmentation_is_a_function_of_seed_epoch_and_index(data: Path) -> None:
    recipe = tiny_recipe("augment.auto_augment=rand-m9-mstd0.5-inc1", "augment.random_erasing=0.5")
    source = open_splits(WHOLE, data, seed=0).train
    first, other = (ImageDataset(source, train_transform(recipe.data, recipe.augment), seed=seed) for seed in (0, 1))
    image = first[SampleKey(0, 3)][0][0]
    torch.manual_seed(99)  # what ran before does not matter
    assert np.array_equal(first[SampleKey(0, 3)][0][0], image)
    assert not np.array_equal(first[SampleKey(1, 3)][0][0], image)
    assert not np.array_equal(other[SampleKey(0, 3)][0][0], image)


def test_the_highest_magnitude_of_a_policy_is_taken() -> None:
    """rand-m10 posterises to 0 bits, which timm passes on to Pillow."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    transform = train_transform(DATA, tiny_recipe("augment.auto_augment=rand-m10-n15-inc1").augment)
    for number in range(20):
        random.seed(number)
        np.random.seed(number)
        assert transform(picture).size == (16, 16)
    assert not np.asarray(posterize(picture, 0)).any() and np.asarray(posterize(picture, 1)).any()


def test_workers_do_not_change_the_images(data: Path) -> None:
    recipe = tiny_recipe("augment.auto_augment=rand-m9-mstd0.5-inc1", "augment.random_erasing=0.5")
    source = open_splits(WHOLE, data, seed=0).train
    dataset = ImageDataset(source, train_transform(recipe.data, recipe.augment))
    runs = [
        list(keyed_loader(dataset, batch_sampler=TrainSampler(len(source), 8, seed=0, steps=6), workers=workers))
        for workers in (0, 2)
    ]
    assert len(runs[0]) == 6
    for mine, theirs in zip(*runs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine[:3], theirs[:3], strict=True))


def shown(source: Any) -> ImageDataset:
    return ImageDataset(source, eval_transform(CONFIG))


def test_evaluation_loader_keeps_the_last_small_batch(data: Path) -> None:
    source = open_splits(WHOLE, data, seed=0).train
    loader = keyed_loader(shown(source), sampler=EvalSampler(24), batch_size=5, workers=0)
    indices = torch.cat([batch.indices for batch in loader])
    assert indices.tolist() == list(range(24))


def test_a_broken_image_travels_as_a_value_and_is_raised_where_it_is_asked_for(data: Path) -> None:
    victim = sorted((data / "train" / "digit-1").iterdir())[0]
    victim.write_bytes(b"")
    source = open_splits(WHOLE, data, seed=0).train
    loader = keyed_loader(shown(source), sampler=EvalSampler(24), batch_size=12, workers=2)
    batches = list(loader)
    assert sum(isinstance(batch, BadImage) for batch in batches) == 1
    with pytest.raises(BadImage, match=victim.name):
        for batch in batches:
            checked(batch)


def test_collate_stacks() -> None:
    samples = [((np.zeros((2, 2, 3), np.uint8), 1), 7, []), ((np.ones((2, 2, 3), np.uint8), 0), 8, [])]
    dataset = ImageDataset(DigitsSource(), lambda picture: picture)
    images, targets, indices, bad = checked(dataset.collate(samples))
    assert images.shape == (2, 3, 2, 2) and images.is_contiguous(memory_format=torch.channels_last)
    assert targets.tolist() == [1, 0] and indices.tolist() == [7, 8] and bad == ()


@pytest.mark.parametrize("size", [(33, 40), (300, 64), (2000, 90)])
def test_pictures_reach_the_network_as_timm_would_give_them(size: tuple[int, int]) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    theirs = create_transform(**CONFIG, is_training=False)(picture)
    pixels = torch.from_numpy(np.asarray(eval_transform(CONFIG)(picture))).permute(2, 0, 1)
    ours = Normalizer(CONFIG["mean"], CONFIG["std"])(pixels[None])[0]
    torch.testing.assert_close(ours, theirs, atol=1e-6 if size[0] < 20 * size[1] else 0.2, rtol=1e-5)


@pytest.mark.parametrize("size", [(1, 30000), (30000, 1), (3, 61)])
def test_a_line_of_pixels_does_not_fill_the_memory(size: tuple[int, int]) -> None:
    """timm would resize the first to 36 x 1,080,000 pixels and cut out the middle."""
    assert limit_aspect(Image.new("RGB", size)).size == tuple(min(side, 20 * min(size)) for side in size)
    assert eval_transform(CONFIG)(Image.new("RGB", size)).size == (16, 16)


def test_a_broken_training_image_is_replaced_by_the_next_one(data: Path) -> None:
    source = FolderSource(data / "train")
    for name in (source.name(4), source.name(5)):
        (data / "train" / name).write_bytes(b"")
    transform = train_transform(DATA, tiny_recipe().augment)
    dataset = ImageDataset(source, transform, on_bad_image="replace")
    (image, target), index, bad = dataset[SampleKey(2, 4)]
    assert (
        index == 6
        and target == source.targets[6]
        and [error.file for error in bad] == [str(data / "train" / source.name(i)) for i in (4, 5)]
    )
    assert np.array_equal(image, dataset[SampleKey(2, 4)][0][0])
    assert len(dataset.collate([dataset[SampleKey(2, i)] for i in (3, 4, 5)]).bad) == 3


def test_a_broken_validation_image_does_not_count(data: Path) -> None:
    source = FolderSource(data / "val")
    (data / "val" / source.name(1)).write_bytes(b"")
    dataset = ImageDataset(source, eval_transform(CONFIG), on_bad_image="mask")
    batch = checked(dataset.collate([dataset[key] for key in EvalSampler(3)]))
    assert batch.targets.tolist() == [source.targets[0], NO_TARGET, source.targets[2]] and len(batch.bad) == 1


def test_a_folder_of_broken_images_is_not_replaced_for_ever(data: Path) -> None:
    source = FolderSource(data / "train")
    for index in range(len(source)):
        (data / "train" / source.name(index)).write_bytes(b"")
    dataset = ImageDataset(source, train_transform(DATA, tiny_recipe().augment), on_bad_image="replace")
    assert isinstance(dataset[SampleKey(0, 0)], BadImage)


def test_workers_that_are_left_do_not_keep_the_process_from_ending(data: Path) -> None:
    """They ignore SIGTERM, by which Python would end them."""
    program = f"""
from conv2former.tasks.classification.data import *
from conv2former.data.loading import *
from conv2former.tasks.classification.sources import FolderSource
from conv2former.data.sampling import EvalSampler
dataset = ImageDataset(FolderSource(__import__("pathlib").Path({str(data / "val")!r})), lambda image: image)
left = iter(keyed_loader(dataset, sampler=EvalSampler(4), batch_size=1, workers=2))
next(left)
raise SystemExit(7)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 7
