"""COCO annotations: reading, bad input, views of images with their boxes and masks, COCO's figures."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from conv2former.data.images import BadImage
from conv2former.data.rle import decode_mask, encode_mask, polygons_to_mask
from conv2former.data.sampling import SampleKey, seed_cpu
from conv2former.data.sources import remarks
from conv2former.errors import UserError
from conv2former.tasks.detection.coco import APART, BEYOND, CocoSource
from conv2former.tasks.detection.config import DetectionAugmentSection, DetectionDataSection
from conv2former.tasks.detection.data import EvalObjects, TrainObjects, View, draw_view, fitted, view_objects
from conv2former.tasks.detection.folders import open_coco, open_eval_coco
from conv2former.tasks.detection.metrics import NUMBERS, CocoMetric, coco_evaluation, coco_rows
from conv2former.tasks.detection.model.detector import Detections
from conv2former.tasks.detection.model.mask_head import paste_masks
from conv2former.tasks.detection.objects import usable_mask
from scenes import BLUE, RED, coco_entries, scene, write_coco

DATA = DetectionDataSection(short_side=96, long_side=128)


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"))


def change(root: Path, edit: Callable[[dict[str, Any]], Any], split: str = "train2017") -> Path:
    """Edits an annotation file; returns the root."""
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return root


def test_what_is_read(coco: Path) -> None:
    splits = open_coco(DATA, coco, seed=0)
    assert splits.train.classes == ["block", "disc"] and splits.train.category_ids == [3, 7]
    assert len(splits.train) == 3 and len(splits.val) == 2  # without the image that shows nothing
    image, objects = splits.train.load(0)
    assert image.size == splits.train.entries[0][2:] == (128, 96) and [entry["iscrowd"] for entry in objects] == [
        0,
        0,
        1,
    ]
    kept = open_coco(DATA.model_copy(update=dict(keep_empty=True)), coco, seed=0)
    assert len(kept.train) == 4 and kept.train.objects_of(3) == [] and kept.digest() != splits.digest()


def no_key(content: dict[str, Any]) -> None:
    del content["images"][1]["file_name"]


def no_file(content: dict[str, Any]) -> None:
    content["images"][0]["file_name"] = "gone.png"


def no_category(content: dict[str, Any]) -> None:
    content["annotations"][1]["category_id"] = 9


def other_categories(content: dict[str, Any]) -> None:
    """Of validation images, since those of training come first: with an object."""
    content["categories"][0]["name"] = "star"


def two_of_one_name(content: dict[str, Any]) -> None:
    content["categories"][0]["name"] = "block"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            no_key,
            "1 values in 'images' are missing or of the wrong kind; the first: file_name of entry 1 must be a text",
        ),
        (lambda content: content.pop("annotations"), "has no list 'annotations': give COCO annotations"),
        (no_file, "1 of the 4 images that .* names are not in .*train2017: gone.png"),
        (no_category, "annotation 1 is of category 9, which it does not list"),
        (other_categories, "different categories (only in .*instances_train2017.json: star; only in .*: block|disc"),
        (
            two_of_one_name,
            "category name block occurs more than once (id 7 with 3 objects, id 3 with 6 objects): rename",
        ),
        (lambda content: content["annotations"].clear(), "no image with an object that counts"),
        (lambda content: content["images"][2].update(file_name=[]), "file_name of entry 2 must be a text, it is "),
        (lambda content: content["images"][0].update(width="wide"), "width of entry 0 must be a whole number"),
        (lambda content: content["images"][0].update(height=-3), "height of entry 0 must be a whole number, it is -3"),
        (lambda content: content["annotations"][3].update(image_id=[1]), "image_id of entry 3 must be an id"),
        (lambda content: content["categories"][0].update(id=True), "id of entry 0 must be an id, it is True"),
    ],
)
def test_damaged_annotations_are_one_line(tmp_path: Path, edit: Callable[[Any], Any], message: str) -> None:
    root = change(write_coco(tmp_path / "coco"), edit)
    pattern = message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(UserError, match=pattern) as caught:
        open_coco(DATA, root, seed=0)
    assert "\n" not in str(caught.value)


def test_what_is_no_annotation_file_is_one_line(coco: Path, tmp_path: Path) -> None:
    for name, text, message in (("a.json", "{", "is not JSON"), ("b.json", "[1]", "has no list 'images'")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            CocoSource(coco / "train2017", tmp_path / name)
    with pytest.raises(UserError, match=r"cannot read .*none\.json"):
        CocoSource(coco / "train2017", tmp_path / "none.json")
    with pytest.raises(UserError, match="no such folder"):
        open_coco(DATA, tmp_path / "none", seed=0)
    with pytest.raises(UserError, match="name the folder of images and annotations with --data"):
        open_coco(DATA, None, seed=0)


def test_boxes_that_are_none_are_left_out_in_one_line(coco: Path, tmp_path: Path) -> None:
    def spoil(content: dict[str, Any]) -> None:
        entries = content["annotations"]
        boxes = [[5, 5, 0, 9], [500, 5, 9, 9], [1, 2, 3], [5, 5, float("nan"), 3]]
        for entry, box in zip(entries, boxes, strict=False):
            entry["bbox"] = box
        entries[0].pop("segmentation")
        entries[4].pop("segmentation")
        entries[5]["iscrowd"] = None
        entries[6]["segmentation"] = encode_mask(np.ones((8, 9)))

    root = change(write_coco(tmp_path / "coco"), spoil)
    source = CocoSource(root / "train2017", root / "annotations" / "instances_train2017.json")
    assert sum(len(source.objects_of(index)) for index in range(4)) == 9 - 4
    assert len(source.ground_truth(range(4))["annotations"]) == 9 - 2, "what has a box is never left out of the truth"
    assert (
        len(source.notes) == 6 and "1 of 9 objects whose box has no area are not trained on (ids 0)" in source.notes[0]
    )
    for words in (
        "2 of 9 objects whose box is not [x, y, width, height] are left out",
        "lies outside of the image are not trained on",
        "without a mask (segmentation) count for their boxes alone",
        "has not the image's size count for their boxes alone",
        "of 9 objects are crowds (iscrowd): not trained on",
    ):
        assert sum(words in line for line in source.notes) == 1, words


def test_a_model_is_evaluated_whatever_the_ids(coco: Path, tmp_path: Path) -> None:
    source = open_eval_coco(DATA, coco, ["star", "disc", "block"])
    assert source.classes == ["star", "disc", "block"] and source.category_ids == [8, 7, 3]
    with pytest.raises(UserError, match=r"1 categories that the model does not know \(disc\); its 1 are block"):
        open_eval_coco(DATA, coco, ["block"])


def test_a_picture_of_another_size_is_a_bad_image(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco")
    Image.new("RGB", (64, 64)).save(root / "train2017" / "000.png")
    source = open_coco(DATA, root, seed=0).train
    with pytest.raises(BadImage, match="it has 64 x 64 pixels, by the annotations 128 x 96"):
        source.load(0)


def test_damaged_masks_are_named() -> None:
    assert usable_mask([[1, 2, 3, 4, 5, 3]], (8, 8)) == ([[1, 2, 3, 4, 5, 3]], None)
    assert usable_mask(encode_mask(np.ones((8, 9))), (9, 8))[1] is None
    assert usable_mask([[1, 2], [3, 4], [5, 3]], (8, 8)) == ([[1, 2, 3, 4, 5, 3]], None)  # one polygon of points
    for mask, words in (
        ([[1, 2, 3, 4]], "less than three points"),
        ([[1, 2, 3, 4, 5, 6]], "less than a pixel"),
        ([[1, 2, 3, 4, 5, 6, 7]], "an odd number of coordinates"),
        ([[1, 2, 3, 4, 5, float("nan")]], "far outside"),
        ([[1, 2, 3, 4, 5, 1e10]], "far outside"),
        (["x"], "no list of polygons"),
        ("abc", "neither polygons nor run lengths"),
        ([5], "an odd number of coordinates"),
        ([[]], "without a mask"),
        ([], "without a mask"),
        (None, "without a mask"),
        (dict(size=[8, 8]), "cannot be decoded"),
        (dict(size=[30000, 30000], counts="00"), "size"),
        (encode_mask(np.ones((8, 9))), "size"),
    ):
        found, trouble = usable_mask(mask, (8, 8))
        assert found is None and words in str(trouble), mask


def test_masks_survive_their_codes() -> None:
    mask = np.random.default_rng(0).random((37, 53)) > 0.5
    assert np.array_equal(decode_mask(encode_mask(mask)), mask)
    assert decode_mask(dict(size=[2, 3], counts=[1, 2, 3])).tolist() == [[0, 1, 0], [1, 0, 0]]
    square = polygons_to_mask([[1, 1, 5, 1, 5, 4, 1, 4]], 6, 8)
    assert square.sum() == 12 and square[1:4, 1:5].all()
    # what lies outside of the image is cut off
    assert polygons_to_mask([[-3, -3, 5, -3, 5, 4, -3, 4]], 6, 8)[:4, :5].all()


@pytest.mark.parametrize("number", range(12))
def test_a_view_moves_picture_boxes_and_masks_together(number: int) -> None:
    """Where the mask says block or disc, the image is red or blue; masks fill their boxes."""
    image, block, disc = scene(number)
    entries = coco_entries(number, image, block, disc)
    seed_cpu(1, number)  # type: ignore[arg-type]
    augment = DetectionAugmentSection(
        short_sides=[70, 96, 130], long_side=180, crop_short_sides=[100, 140], crop_sizes=(50, 120)
    )
    view = draw_view(image.size, augment)
    target = view_objects(entries, view, {3: 0, 7: 1})
    pixels = view.pixels(image).astype(int)
    assert pixels.shape == (view.size[1], view.size[0], 3) and target.masks.shape[1:] == pixels.shape[:2]
    for box, label, mask in zip(target.boxes.tolist(), target.labels.tolist(), target.masks.numpy(), strict=True):
        inside = mask.astype(bool)
        colour = np.array(RED if label == 0 else BLUE)
        assert np.median(np.abs(pixels[inside] - colour).sum(axis=1)) < 60
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert np.abs(np.array(found) - box).max() <= (1.01 if label == 0 else 3)
        assert 0 <= box[0] < box[2] <= view.size[0] and 0 <= box[1] < box[3] <= view.size[1]


def test_a_mirrored_view_is_the_mirror_of_the_view() -> None:
    image, block, disc = scene(3)
    entries = coco_entries(3, image, block, disc)
    plain, mirrored = (View((4.0, 2.0, 100.0, 90.0), (120, 110), flag) for flag in (False, True))
    assert np.array_equal(plain.pixels(image)[:, ::-1], mirrored.pixels(image))
    one, other = (view_objects(entries, view, {3: 0, 7: 1}) for view in (plain, mirrored))
    assert torch.allclose(one.boxes[:, [0, 2]], 120 - other.boxes[:, [2, 0]]) and len(one.boxes) == 2
    assert (one.masks.flip(2) != other.masks).float().mean() < 0.01  # rasterised on its own: the edges may differ


def test_views_keep_to_their_sizes() -> None:
    """The long side gives way first; crops lie in the image."""
    assert fitted((640, 480), short=800, long=1333) == (1067, 800)
    assert fitted((1000, 300), short=800, long=1333) == (1333, 400)
    augment = DetectionAugmentSection()
    random.seed(0)
    views = [draw_view((640, 427), augment) for _ in range(200)]
    assert {min(view.size) for view in views} <= {*augment.short_sides, *range(400, 801)}
    assert max(max(view.size) for view in views) <= 1333
    cropped = [view for view in views if view.box != (0, 0, 640, 427)]
    assert 60 < len(cropped) < 140 and 60 < sum(view.mirrored for view in views) < 140
    for left, top, right, bottom in (view.box for view in cropped):
        assert 0 <= left < right <= 640.01 and 0 <= top < bottom <= 427.01


def test_samples_are_a_function_of_their_key_and_batches_are_padded(coco: Path) -> None:
    source = open_coco(DATA, coco, seed=0).train
    augment = DetectionAugmentSection(short_sides=[60, 90], long_side=128, crop_short_sides=[90], crop_sizes=(40, 80))
    dataset = TrainObjects(source, DATA, augment, seed=1)
    samples = [dataset[SampleKey(0, index)] for index in range(3)]
    again = dataset[SampleKey(0, 1)]
    assert not isinstance(again, BadImage) and np.array_equal(again[0][0], samples[1][0][0])
    batch = dataset.collate(samples)
    assert batch.images.shape[-1] % 32 == batch.images.shape[-2] % 32 == 0
    for pixels, (height, width), target in zip(batch.images, batch.sizes, batch.targets, strict=True):
        assert target.masks.shape[1:] == (height, width)
        assert not pixels[:, height:].any() and not pixels[:, :, width:].any()
    masked = EvalObjects(source, DATA, on_bad_image="mask")
    masked.read = lambda index: (_ for _ in ()).throw(BadImage("x", "y"))  # type: ignore[method-assign]
    assert masked.collate([masked[SampleKey(0, 0)]]).originals == [(0, 0)]


def detections(coco: Path, seed: int) -> tuple[CocoSource, list[dict[str, Any]]]:
    """Detections near the truth, some beside it, of both classes."""
    source = open_coco(DATA, coco, seed=0).val
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(len(source)):
        for entry in source.objects_of(index) * 3:
            x, y, width, height = (value + generator.normal(0, 2) for value in entry["bbox"])
            mask = np.zeros((96, 128), np.uint8)
            mask[int(max(y, 0)) : int(y + height), int(max(x, 0)) : int(x + width)] = 1
            rows.append(
                dict(
                    image_id=source.entries[index].id,
                    category_id=int(generator.choice([3, 7])) if generator.random() < 0.2 else entry["category_id"],
                    bbox=[x, y, width, height],
                    score=float(generator.random()),
                    segmentation=encode_mask(mask),
                )
            )
    return source, rows


@pytest.mark.parametrize(("kind", "seed"), [("bbox", 0), ("segm", 0), ("bbox", 1), ("segm", 1)])
def test_figures_equal_pycocotools(coco: Path, kind: str, seed: int) -> None:
    source, rows = detections(coco, seed)
    truth = source.ground_truth(range(len(source)))
    ours = coco_evaluation(truth, rows, kind)[0]
    wanted = COCO()
    wanted.dataset = json.loads(json.dumps(truth))
    wanted.createIndex()
    keys = ("image_id", "category_id", "score", "bbox" if kind == "bbox" else "segmentation")
    found = wanted.loadRes([{key: copy.deepcopy(row[key]) for key in keys} for row in rows])
    theirs = COCOeval(wanted, found, kind)
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    for name, value in zip(NUMBERS, theirs.stats, strict=True):
        assert ours[name] == (None if value < 0 else pytest.approx(100 * value, abs=1e-9)), name
    assert 5 < (ours["ap"] or 0) < 95


def test_perfect_and_empty_results(coco: Path) -> None:
    source = open_coco(DATA, coco, seed=0).val
    results = CocoMetric(source)
    for index in range(len(source)):
        single = [entry for entry in source.objects_of(index) if not entry["iscrowd"]]
        boxes = torch.tensor([entry["bbox"] for entry in single], dtype=torch.float)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([source.category_ids.index(entry["category_id"]) for entry in single])
        # seen at twice the size
        found = Detections(2 * boxes, torch.ones(len(boxes)), labels, torch.ones(len(boxes), 28, 28))
        results.add(index, found, size=(192, 256), original=(96, 128))
    figures = results.compute()
    assert figures["box"]["ap"] == pytest.approx(100) and figures["box"]["ap_large"] is None
    assert figures["mask"]["ap50"] == pytest.approx(100)  # a disc fills three quarters of its square
    assert (figures["images"], figures["objects"], figures["detections"]) == (2, 4, 4)
    results = CocoMetric(source)
    results.seen = [0, 1]
    assert results.compute()["box"]["ap"] == 0.0


def test_rows_are_in_the_pictures_pixels() -> None:
    boxes = torch.tensor([[10.0, 20.0, 30.0, 60.0], [0.0, 0.0, 50.0, 40.0]])
    found = Detections(boxes, torch.tensor([0.9, 0.8]), torch.tensor([1, 0]), torch.ones(2, 28, 28))
    rows = coco_rows(found, size=(60, 100), original=(30, 200))
    assert [row["label"] for row in rows] == [1, 0]
    assert rows[0]["bbox"] == pytest.approx([20, 10, 40, 20])
    mask = decode_mask(rows[0]["segmentation"])
    assert mask.shape == (30, 200) and mask[10:30, 20:60].mean() > 0.9 and mask.sum() < 900


def test_masks_pasted_in_windows_are_those_pasted_into_the_picture() -> None:
    boxes = torch.tensor(
        [[3.2, 4.9, 31.7, 40.1], [-5.0, -3.0, 20.5, 18.2], [50.0, 30.0, 90.0, 70.0], [7.0, 7.0, 7.2, 7.1]]
    )
    masks = torch.rand(4, 28, 28).pow(0.5)
    found = Detections(boxes, torch.ones(4), torch.zeros(4, dtype=torch.long), masks)
    rows = coco_rows(found, size=(60, 80), original=(90, 120))
    wanted = paste_masks(masks, boxes * 1.5, (90, 120)).numpy()
    for row, mask in zip(rows, wanted, strict=True):
        assert (decode_mask(row["segmentation"]) != mask).mean() < 1e-3
    assert decode_mask(rows[0]["segmentation"]).sum() > 500


def test_objects_that_are_hardly_seen_are_said(coco: Path) -> None:
    splits = open_coco(DATA, coco, seed=0)
    sides = [
        math.sqrt(own["bbox"][2] * own["bbox"][3]) / 96
        for index in range(len(splits.train))
        for own in splits.train.objects_of(index)
    ]  # of objects, as fractions of the short side of their image
    data = DATA.model_copy(update=dict(short_side=int(7 / sorted(sides)[len(sides) // 2]), long_side=1000))
    line = splits.too_small(data)
    assert line is not None and line.endswith(
        f"(--set data.short_side={2 * data.short_side} --set data.long_side=2000)"
    )
    assert re.match(r"\d+% of the objects measure less than 8 pixels", line) and line in remarks(splits, data)
    assert splits.too_small(DATA.model_copy(update=dict(short_side=round(9 / min(sides)), long_side=9999))) is None
    assert splits.too_small(data.model_copy(update=dict(short_side=9999, long_side=data.short_side))) is not None


def test_one_file_is_enough(coco: Path, tmp_path: Path) -> None:
    root, data = tmp_path / "cvat", DATA.model_copy(update=dict(val_fraction=0.5))
    (root / "annotations").mkdir(parents=True)
    shutil.copytree(coco / "train2017", root / "images")
    shutil.copy(coco / "annotations" / "instances_train2017.json", root / "annotations" / "instances_default.json")
    splits = open_coco(data, root, seed=0)
    names = [[source.name(index) for index in range(len(source))] for source in (splits.train, splits.val)]
    assert splits.held_out and len(names[1]) == 2 and not {*names[0]} & {*names[1]}  # two of four images
    assert sum(splits.train.per_class) == sum(splits.train.counted) < sum(CocoSource(*_only(root)).per_class)
    assert any("1 image without objects is not" in line for line in splits.notes)
    assert splits.digest() == open_coco(data, root, seed=0).digest()
    others = {open_coco(data, root, seed=seed).digest() for seed in range(5)}
    assert len(others) > 1
    assert len(open_eval_coco(data, root, splits.train.classes)) == 4
    with pytest.raises(UserError, match=r"no annotations .*or hold out a fraction with --set data.val_fraction=0.1"):
        open_coco(DATA, root, seed=0)


def test_a_part_without_another_is_divided(coco: Path, tmp_path: Path) -> None:
    shutil.copytree(coco / "train2017", tmp_path / "train")
    shutil.copy(coco / "annotations" / "instances_train2017.json", tmp_path / "train" / "_annotations.coco.json")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "people.json").write_text("{}")
    splits = open_coco(DATA.model_copy(update=dict(val_fraction=0.3)), tmp_path, seed=0)
    assert len(splits.val) == 1 and f"{tmp_path}: not read: people.json" in splits.notes


def _only(root: Path) -> tuple[Path, Path]:
    return root / "images", root / "annotations" / "instances_default.json"


def test_which_files_are_meant_is_not_guessed(coco: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(coco / "train2017", root / "images")
    (root / "annotations").mkdir()
    own = coco / "annotations" / "instances_train2017.json"
    shutil.copy(own, root / "annotations" / "train.json")
    shutil.copy(own, root / "annotations" / "val.json")
    (root / "annotations" / "._train.json").write_bytes(b"\0")  # of macOS
    assert len(open_coco(DATA, root, seed=0).train) == 3
    data = DATA.model_copy(update=dict(val_annotations="annotations/valid.json", val_fraction=0.5))
    with pytest.raises(
        UserError, match=r"no annotations .*valid.json; there are annotations/train.json, annot"
    ) as held:
        open_coco(data, root, seed=0)
    assert "val_fraction" not in str(held.value)  # which counts for nothing where a file is named
    with pytest.raises(UserError, match=r"no annotations .*valid.json"):
        open_eval_coco(data, root, ["block", "disc"])
    shutil.copy(own, root / "annotations" / "train copy.json")
    with pytest.raises(UserError, match=r"several may be the training images and their annotations \(images with ann"):
        open_coco(DATA, root, seed=0)
    named = DATA.model_copy(update=dict(val_annotations="valves_val.json", val_images="."))
    with pytest.raises(UserError, match=r"no annotations .*valves_test.json"):
        open_eval_coco(named, root, ["block", "disc"], "test")


def test_what_rotated_boxes_lose_is_said(coco: Path, tmp_path: Path) -> None:
    def rotate(content: dict[str, Any]) -> None:
        for entry in content["annotations"]:
            entry |= dict(attributes=dict(rotation=30.0), segmentation=[])

    source = open_coco(DATA, change(write_coco(tmp_path), rotate), seed=0).train
    assert any("are rotated (attributes.rotation) and have no mask" in note for note in source.notes)


def test_an_image_that_is_missing_is_not_its_namesake(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    for name in ("a", "b"):
        (root / "train2017" / name).mkdir()

    def names(content: dict[str, Any]) -> None:
        first, second = content["images"][:2]
        (root / "train2017" / first["file_name"]).rename(root / "train2017" / "a" / "1.png")
        first["file_name"], second["file_name"] = "a/1.png", "b/1.png"

    with pytest.raises(UserError, match=r"1 of the 4 images .* are not in .*train2017: b/1.png"):
        open_coco(DATA, change(root, names), seed=0)


def test_categories_that_one_part_lacks(coco: Path, tmp_path: Path) -> None:
    """An export lists all categories or those that occur: what matters is that no object is of an unknown one."""
    root = Path(shutil.copytree(coco, tmp_path / "coco"))
    names = {part: root / "annotations" / f"instances_{part}2017.json" for part in ("train", "val")}
    content = {part: json.loads(path.read_text()) for part, path in names.items()}
    first, second = (entry["id"] for entry in content["val"]["categories"])
    content["val"]["categories"] = [dict(id=99, name="star"), content["val"]["categories"][1]]
    kept = [entry for entry in content["val"]["annotations"] if entry["category_id"] == second]
    content["val"]["annotations"] = kept
    names["val"].write_text(json.dumps(content["val"]))
    splits = open_coco(DATA, root, seed=0)
    place = splits.train.category_ids.index(second)
    assert splits.val.classes == splits.train.classes and splits.val.category_ids[place] == second
    assert splits.val.category_ids[1 - place] not in (first, second, 99)
    counted = sum(not entry["iscrowd"] for entry in kept)
    assert sum(splits.val.per_class) == splits.val.per_class[place] == counted > 0
    assert any(f"no objects of {splits.train.classes[1 - place]} to validate on" in line for line in splits.val.notes)


def test_boxes_that_leave_the_image_or_their_mask_are_said(coco: Path, tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        one = content["annotations"][0]
        one["bbox"] = [one["bbox"][0] - 50, one["bbox"][1] - 50, one["bbox"][2] + 50, one["bbox"][3] + 50]
        other = next(entry for entry in content["annotations"][1:] if isinstance(entry["segmentation"], list))
        other["bbox"][:2] = [side + (12 if side < 40 else -12) for side in other["bbox"][:2]]

    root = change(Path(shutil.copytree(coco, tmp_path / "x")), edit)
    source = CocoSource(coco / "train2017", root / "annotations" / "instances_train2017.json")
    assert sum(BEYOND in line for line in source.notes) == 1 and sum(APART in line for line in source.notes) == 1
    truth = source.ground_truth(range(len(source)))
    assert all(min(entry["bbox"][:2]) >= 0 for entry in truth["annotations"])


def test_images_in_no_annotation_are_counted(coco: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(coco, tmp_path / "coco"))
    assert not any("in no annotation" in line for line in open_coco(DATA, root, seed=0).notes)
    shutil.copy(root / "val2017" / "100.png", root / "val2017" / "new.png")
    line = f"{root / 'val2017'}: not read: 1 image in no annotation (new.png)"
    assert line in open_coco(DATA, root, seed=0).notes
