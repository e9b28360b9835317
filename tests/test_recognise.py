"""Folders that are given to another task than the one that they are for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conv2former.errors import UserError
from conv2former.recipes.load import load_recipe
from conv2former.tasks import task_class

COCO = dict(images=[dict(id=1, file_name="0.png")], annotations=[], categories=[])


def write(root: Path, *names: str) -> Path:
    """Images of noise, empty annotations and other files, by the endings of their names."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json"):
            (root / name).write_text(json.dumps(COCO))
        elif name.endswith(("txt", "xml")):
            (root / name).write_text("0 0.5 0.5 0.2 0.2\n")
        else:
            pixels = np.random.default_rng(number).integers(0, 2, (8, 8), np.uint8)
            Image.fromarray(pixels).save(root / name)
    return root


LAYOUTS = {  # what lies there, and what is said of it
    "COCO": (
        ("train2017/0.png", "val2017/0.png", "annotations/instances_train2017.json"),
        "instances_train2017.json looks like annotations of COCO's format: train with --recipe finetune_detection",
    ),
    "Roboflow": (
        ("train/0.png", "train/_annotations.coco.json", "valid/0.png", "valid/_annotations.coco.json"),
        "_annotations.coco.json looks like annotations of COCO's format: train with --recipe finetune_detection",
    ),
    "masks": (
        ("images/0.png", "images/1.png", "masks/0.png", "masks/1.png"),
        "images/ and masks/ in .* look like images and their masks: train with --recipe finetune_segmentation",
    ),
    "parts with masks": (
        ("train/Images/0.png", "train/labels/0.png", "val/Images/0.png", "val/labels/0.png"),
        "Images/ and labels/ in .*train look like images and their masks: train with --recipe finetune_segmentation",
    ),
    "mmseg": (
        ("img_dir/train/0.png", "ann_dir/train/0.png", "img_dir/val/0.png", "ann_dir/val/0.png"),
        "img_dir/ and ann_dir/ in .* look like images and their masks: train with --recipe finetune_segmentation",
    ),
    "classes": (
        ("bird/0.png", "cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"),
        "bird/, cat/, dog/ in .* look like folders of classes: train with --recipe finetune ",
    ),
    "YOLO": (
        ("images/train/0.png", "images/val/0.png", "labels/train/0.txt", "labels/val/0.txt"),
        "labels looks like annotations of YOLO: export them in COCO's format",
    ),
    "VOC": (
        ("JPEGImages/0.png", "Annotations/0.xml", "ImageSets/Main/train.txt"),
        "Annotations looks like annotations of Pascal VOC: export them in COCO's format",
    ),
}
TASKS = dict(classification="finetune", detection="finetune_detection", segmentation="finetune_segmentation")
WRONG = [
    (layout, task)
    for layout, (_, said) in LAYOUTS.items()
    for task, name in TASKS.items()
    if f" {name} " not in f"{said} " and not (task == "segmentation" and layout in ("YOLO", "VOC"))
]


@pytest.mark.parametrize(("layout", "task"), WRONG)
def test_a_folder_for_another_task_is_named_with_its_recipe(layout: str, task: str, tmp_path: Path) -> None:
    names, said = LAYOUTS[layout]
    recipe = load_recipe(TASKS[task])
    with pytest.raises(UserError, match=rf"{said}.*\(for {task}: "):
        task_class(task).open_splits(recipe, write(tmp_path, *names))


def test_what_is_for_this_task_keeps_its_own_error(tmp_path: Path) -> None:
    write(tmp_path / "classes", *LAYOUTS["classes"][0], "train.json", "bird/0.txt")
    with pytest.raises(UserError, match=r"^there are no annotations"):
        task_class("detection").open_splits(load_recipe("finetune_detection"), write(tmp_path / "loose", "0.png"))
    # a JSON file does no harm
    splits = task_class("classification").open_splits(load_recipe("finetune"), tmp_path / "classes")
    assert splits.train.classes == ["bird", "cat", "dog"]


def test_masks_inside_of_class_folders_are_not_learnt(tmp_path: Path) -> None:
    write(
        tmp_path, *(f"{name}/{kind}/{n}.png" for name in ("ill", "well") for kind in ("images", "masks") for n in "01")
    )
    with pytest.raises(UserError, match=r"^images/ and masks/ in .*ill look like images and their masks: give"):
        task_class("classification").open_splits(load_recipe("finetune"), tmp_path)


def test_annotations_beside_class_folders_are_not_what_is_wrong(tmp_path: Path) -> None:
    """DTD has lists in labels/, Stanford Dogs has boxes: their class folders lie further down."""
    write(tmp_path / "dtd", "images/a/0.png", "images/b/0.png", "labels/train1.txt")
    with pytest.raises(UserError, match=r"^only one class \('images'\)"):
        task_class("classification").open_splits(load_recipe("finetune"), tmp_path / "dtd")


def test_masks_by_other_names_are_recognised(tmp_path: Path) -> None:
    write(tmp_path / "voc", "JPEGImages/0.png", "SegmentationClass/0.png", "SegmentationObject/0.png")
    said = "^JPEGImages/ and SegmentationClass/ in .* which are read from images/ and masks/: train with"
    with pytest.raises(UserError, match=said):
        task_class("classification").open_splits(load_recipe("finetune"), tmp_path / "voc")
    write(tmp_path / "voc", "Annotations/0.xml")
    for task in ("classification", "detection"):
        with pytest.raises(UserError, match=r"Annotations looks like annotations of Pascal VOC"):
            task_class(task).open_splits(load_recipe(TASKS[task]), tmp_path / "voc")
