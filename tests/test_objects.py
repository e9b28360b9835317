"""COCO's annotations as tools write them: boxes alone, texts, crowds, masks in every form, ids of any kind, EXIF."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
import unicodedata
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
from conv2former.data.rle import encode_mask
from conv2former.data.sources import remarks
from conv2former.engine.evaluate import evaluate
from conv2former.engine.predict import predict
from conv2former.engine.train import train
from conv2former.errors import UserError
from conv2former.tasks import load
from conv2former.tasks.detection.coco import CocoSource
from conv2former.tasks.detection.config import DetectionDataSection
from conv2former.tasks.detection.data import View, view_objects
from conv2former.tasks.detection.folders import CocoSplits, open_coco, open_eval_coco
from conv2former.tasks.detection.metrics import NUMBERS, CocoMetric, coco_evaluation
from conv2former.tasks.detection.objects import usable_mask
from scenes import small_detector

pytestmark = pytest.mark.usefixtures("quick")

DATA = DetectionDataSection(short_side=96, long_side=128)
Edit = Callable[[dict[str, Any]], Any]


def write(root: Path, edit: Edit = lambda content: None, *, exif: int = 0) -> Path:
    """Three images for each part, with two objects each."""
    generator = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    options: dict[str, Any] = {}
    if exif:
        options["exif"] = Image.Exif()
        options["exif"][0x112] = exif
    for part in ("train2017", "val2017"):
        (root / part).mkdir()
        content: dict[str, Any] = dict(
            images=[], annotations=[], categories=[dict(id=1, name="cat"), dict(id=2, name="dog")]
        )
        for number in range(3):
            pixels = generator.integers(0, 255, (72, 96, 3), np.uint8)
            Image.fromarray(pixels).save(root / part / f"{number}.jpg", **options)
            content["images"].append(dict(id=number + 1, file_name=f"{number}.jpg", width=96, height=72))
            for label in (1, 2):
                width, height = (int(side) for side in generator.integers(20, 34, 2))
                x, y = int(generator.integers(0, 96 - width)), int(generator.integers(0, 72 - height))
                outline = [x, y, x + width, y, x + width, y + height, x, y + height]
                shape = dict(bbox=[x, y, width, height], area=width * height, segmentation=[outline], iscrowd=0)
                identity = dict(id=len(content["annotations"]) + 1, image_id=number + 1, category_id=label)
                content["annotations"].append(identity | shape)
        edit(content)
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return root


def each(change: Callable[[dict[str, Any]], Any], step: int = 1) -> Edit:
    """An edit of every ``step``-th annotation."""
    return lambda content: [change(entry) for entry in content["annotations"][::step]]


def content(root: Path, part: str = "val2017") -> dict[str, Any]:
    return json.loads((root / "annotations" / f"instances_{part}.json").read_text())


def detections(truth: dict[str, Any], seed: int = 0) -> list[dict[str, Any]]:
    """Boxes near the true ones, with masks."""
    generator = np.random.default_rng(seed)
    rows = []
    for entry in truth["annotations"] * 2:
        x, y, width, height = (float(value) for value in entry["bbox"])
        x, y = x + generator.normal(0, 3), y + generator.normal(0, 3)
        mask = np.zeros((72, 96), np.uint8)
        mask[int(max(y, 0)) : int(y + height), int(max(x, 0)) : int(x + width)] = 1
        row = dict(image_id=entry["image_id"], category_id=entry["category_id"], score=float(generator.random()))
        rows.append(row | dict(bbox=[x, y, width, height], segmentation=encode_mask(mask)))
    return rows


def reference(truth: dict[str, Any], rows: list[dict[str, Any]], kind: str) -> list[float]:
    """pycocotools' twelve numbers, with ids 1 to N."""
    truth, rows = copy.deepcopy((truth, rows))
    places = {key: {entry["id"]: n for n, entry in enumerate(truth[key], 1)} for key in ("images", "categories")}
    for key in places:
        for entry in truth[key]:
            entry["id"] = places[key][entry["id"]]
    for number, entry in enumerate([*truth["annotations"], *rows], 1):
        entry["image_id"] = places["images"][entry["image_id"]]
        entry["category_id"] = places["categories"][entry["category_id"]]
        entry["id"] = number
    keys = ("image_id", "category_id", "score", "bbox" if kind == "bbox" else "segmentation")
    with contextlib.redirect_stdout(io.StringIO()):
        wanted = COCO()
        wanted.dataset = truth
        wanted.createIndex()
        evaluation = COCOeval(wanted, wanted.loadRes([{key: row[key] for key in keys} for row in rows]), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [100 * value if value >= 0 else None for value in evaluation.stats]


def check(root: Path, truth: dict[str, Any], kind: str = "bbox") -> None:
    """The product's figures on a set of validation equal pycocotools' on what it ought to be."""
    source, rows = open_coco(DATA, root, seed=0).val, detections(truth)
    ours = coco_evaluation(source.ground_truth(range(len(source))), rows, kind)[0]
    assert [ours[name] for name in NUMBERS] == pytest.approx(reference(truth, rows, kind), abs=1e-9)
    assert 5 < (ours["ap"] or 0) < 95


SOUND: dict[str, Edit] = dict(
    as_it_is=each(lambda a: None),
    texts=each(lambda a: a.update(iscrowd="0", area=str(a["area"]), bbox=[str(value) for value in a["bbox"]])),
    no_crowds=each(lambda a: a.update(iscrowd=None)),
    false=each(lambda a: a.update(iscrowd="false")),
    text_ids=each(lambda a: a.update(image_id=str(a["image_id"]), category_id=float(a["category_id"]))),
    no_area=each(lambda a: a.update(area=None)),
    no_key=each(lambda a: a.pop("area")),
    points=each(lambda a: a.update(segmentation=[np.reshape(a["segmentation"][0], (-1, 2)).tolist()])),
    flat=each(lambda a: a.update(segmentation=a["segmentation"][0])),
    text_points=each(lambda a: a.update(segmentation=[[str(value) for value in a["segmentation"][0]]])),
    stray=each(lambda a: a["segmentation"].append([1, 1, 2, 2])),
    odd=each(lambda a: a["segmentation"].insert(0, [1, 1, 2, 2, 3, 3, 4])),
    far=each(lambda a: a["segmentation"].append([1, 1, 2, 2, 1e9, 3])),
    no_box=each(lambda a: a.pop("bbox")),
    null_box=each(lambda a: a.update(bbox=None)),
    zero_box=each(lambda a: a.update(bbox=[0, 0, 0, 0])),
    sizes=lambda d: [image.update(width="96", height=72.0) for image in d["images"]],
)


@pytest.mark.parametrize("name", SOUND)
def test_usable_objects_are_used(tmp_path: Path, name: str) -> None:
    truth = content(write(tmp_path / "truth"))
    splits = open_coco(DATA, write(tmp_path / "coco", SOUND[name]), seed=0)
    assert sum(splits.train.counted) == sum(splits.val.counted) == 6 and splits.train.has_masks
    for kind in ("bbox", "segm"):
        check(tmp_path / "coco", truth, kind)


@pytest.mark.parametrize("ids", [2**60, 20230101123456789000, "frame-", -5.5])
def test_ids_of_any_size_and_kind(tmp_path: Path, ids: Any) -> None:
    def change(content: dict[str, Any]) -> None:
        for entry in content["images"]:
            entry["id"] = ids + (str(entry["id"]) if isinstance(ids, str) else entry["id"])
        for entry in content["annotations"]:
            entry["image_id"] = ids + (str(entry["image_id"]) if isinstance(ids, str) else entry["image_id"])

    root = write(tmp_path, change)
    check(root, content(root))
    source = open_coco(DATA, root, seed=0).val
    assert source.entries[0].id == content(root)["images"][0]["id"]


def test_ids_that_fall_together_as_floating_point() -> None:
    """The figures of six images are the same whatever their ids; as doubles 1 and 2 above 2**53 are one number."""
    images = [dict(id=2**53 + n, width=100, height=100) for n in range(6)]
    annotations = [
        dict(id=n + 1, image_id=image["id"], category_id=3, bbox=[10 * n, 20, 30, 30], area=900, iscrowd=0)
        for n, image in enumerate(images)
    ]
    truth = dict(images=images, annotations=annotations, categories=[dict(id=3, name="x")])
    rows = detections(truth)
    assert coco_evaluation(truth, rows, "bbox")[0]["ap"] == pytest.approx(reference(truth, rows, "bbox")[0], abs=1e-9)


def test_polygons_that_cross_themselves() -> None:
    """The two halves of an eight, whose areas cancel out, are an object; a point, a line and fractions are none."""
    eight = [10, 10, 30, 30, 30, 10, 10, 30]
    assert usable_mask([eight], (64, 48)) == ([eight], None)
    for nothing in ([5, 5] * 3, [5, 5, 40, 5, 5, 5], [0.1, 0.1, 0.9, 0.1, 0.9, 0.9]):
        assert usable_mask([nothing], (64, 48)) == (None, "whose mask has a polygon of less than a pixel")


def test_objects_that_are_listed_twice_are_said(tmp_path: Path) -> None:
    def twice(content: dict[str, Any]) -> None:
        content["annotations"] += [entry | dict(id=1000 + entry["id"]) for entry in content["annotations"]]

    notes = open_coco(DATA, write(tmp_path, twice), seed=0).train.notes
    assert any("6 of 12 objects have the class and the box of another one of their image" in line for line in notes)


def test_crowds_are_counted_in_a_line(tmp_path: Path) -> None:
    source = open_coco(DATA, write(tmp_path / "a", each(lambda a: a.update(iscrowd=1), 2)), seed=0).train
    assert source.notes[0].endswith("3 of 6 objects are crowds (iscrowd): not trained on") and sum(source.counted) == 3
    with pytest.raises(UserError, match=r"nothing to train on \(6 of 6 objects are crowds"):
        open_coco(DATA, write(tmp_path / "b", each(lambda a: a.update(iscrowd=1))), seed=0)


def test_no_truth_is_left_out_of_evaluation(tmp_path: Path) -> None:
    """What cannot be trained on counts, as pycocotools counts it."""

    def change(content: dict[str, Any]) -> None:
        entries = content["annotations"]
        entries[0]["bbox"][2] = 0
        entries[0].pop("segmentation")
        entries[1]["bbox"][0] = 500
        entries[2]["segmentation"] = []
        entries[3].pop("segmentation")

    root = write(tmp_path, change)
    check(root, content(root))
    masks = content(root)
    for entry in masks["annotations"]:  # without a mask: a region in which nothing counts
        if not entry.get("segmentation"):
            (left, top, width, _), right, low = entry["bbox"], sum(entry["bbox"][::2]), sum(entry["bbox"][1::2])
            entry.update(iscrowd=1, segmentation=[[left, top, right, top, right, low, left, low]] if width else None)
    masks["annotations"] = [entry for entry in masks["annotations"] if entry["segmentation"]]
    source, rows = open_coco(DATA, root, seed=0).val, detections(content(root))
    ours = coco_evaluation(source.ground_truth(range(3)), rows, "segm")[0]
    assert ours["ap"] == pytest.approx(reference(masks, rows, "segm")[0], abs=1e-9)


def roboflow(content: dict[str, Any]) -> None:
    root = dict(id=0, name="raccoon", supercategory="none")
    content["categories"] = [root, dict(id=1, name="raccoon", supercategory="raccoon")]
    for entry in content["annotations"]:
        entry["category_id"] = 1


def test_an_unused_root_category_goes(tmp_path: Path) -> None:
    splits = open_coco(DATA, write(tmp_path / "a", roboflow), seed=0)
    assert splits.train.classes == ["raccoon"] and splits.val.category_ids == [1]
    assert "category raccoon (id 0) is left out: it has no objects" in splits.train.notes[0]

    def twice(content: dict[str, Any]) -> None:
        content["categories"].append(dict(id=3, name="cat"))

    with pytest.raises(UserError, match=r"cat occurs more than once \(id 1 with 3 objects, id 3 with no objects\)"):
        open_coco(DATA, write(tmp_path / "b", twice), seed=0)


def test_categories_are_compared_by_name(tmp_path: Path) -> None:
    root = write(tmp_path)
    other = content(root)
    other["categories"] = [dict(id="d", name="dog"), dict(id=9, name="cat")]
    for entry in other["annotations"]:
        entry["category_id"] = {1: 9, 2: "d"}[entry["category_id"]]
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(other))
    splits = open_coco(DATA, root, seed=0)
    assert splits.val.classes == splits.train.classes == ["cat", "dog"] and splits.val.category_ids == [9, "d"]
    check(root, other)
    assert open_eval_coco(DATA, root, ["bird", "dog", "cat"]).category_ids == [10, "d", 9]


@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_is_named_and_can_be_ignored(tmp_path: Path, orientation: int) -> None:
    root = write(tmp_path, exif=orientation)
    splits = open_coco(DATA, root, seed=0)
    assert "3 of 3 images are turned by their EXIF orientation" in remarks(splits)[0]
    stored = np.asarray(Image.open(root / "train2017" / "0.jpg").convert("RGB"))
    if orientation == 3:
        assert np.array_equal(np.asarray(splits.train.load(0)[0]), stored[::-1, ::-1])
    else:
        with pytest.raises(BadImage, match=r"72 x 96 pixels, by the annotations 96 x 72; its EXIF .*data.exif=ignore"):
            splits.train.load(0)
    ignored = open_coco(DATA.model_copy(update=dict(exif="ignore")), root, seed=0)
    assert np.array_equal(np.asarray(ignored.train.load(0)[0]), stored) and len(remarks(ignored)) == 1


def test_names_of_files_in_any_unicode_form(tmp_path: Path) -> None:
    apart, composed = (unicodedata.normalize(form, "é.jpg") for form in ("NFD", "NFC"))
    root = write(tmp_path, lambda content: content["images"][0].update(file_name=apart))
    for part in ("train2017", "val2017"):
        (root / part / "0.jpg").rename(root / part / composed)
    source = open_coco(DATA, root, seed=0).train
    assert source.load(0)[0].size == (96, 72) and source.name(0) == apart
    other = content(root)
    for part, name in (("train2017", composed), ("val2017", apart)):
        other["categories"][0]["name"] = name
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(other))
    assert open_coco(DATA, root, seed=0).val.classes == [composed, "dog"]
    assert open_eval_coco(DATA, root, [composed, "dog"]).classes == [composed, "dog"]


def test_other_layouts_are_found(tmp_path: Path) -> None:
    write(tmp_path)
    for old, new in (("train2017", "train"), ("val2017", "Valid")):  # Roboflow's
        (tmp_path / old).rename(tmp_path / new)
        (tmp_path / "annotations" / f"instances_{old}.json").rename(tmp_path / new / "_annotations.coco.json")
    (tmp_path / "annotations").rmdir()
    (tmp_path / "test").mkdir()
    splits = open_coco(DATA, tmp_path, seed=0)
    assert splits.val.images == tmp_path / "Valid" and "not read: test;" in remarks(splits)[0]
    (tmp_path / "labels").mkdir()
    for old, new in (("train", "train"), ("Valid", "validation")):
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / old / "_annotations.coco.json").rename(tmp_path / "annotations" / f"{new}.json")
    assert open_coco(DATA, tmp_path, seed=0).val.images == tmp_path / "Valid"
    (tmp_path / "annotations" / "validation.json").rename(tmp_path / "annotations" / "test.json")
    (tmp_path / "test").rmdir()
    (tmp_path / "Valid").rename(tmp_path / "test")
    assert open_eval_coco(DATA, tmp_path, ["cat", "dog"], "test").images == tmp_path / "test"
    with pytest.raises(UserError, match=r"there are no annotations .*--set data.val_annotations=FILE"):
        open_coco(DATA, tmp_path, seed=0)


def boxes_alone(content: dict[str, Any]) -> None:
    for number, entry in enumerate(content["annotations"]):
        entry["segmentation"] = []
        if number % 2:
            del entry["segmentation"]


@pytest.mark.parametrize("kind", ["mask_rcnn", pytest.param("cascade_mask_rcnn", marks=pytest.mark.slow)])
def test_boxes_without_masks_train_and_are_evaluated_as_boxes(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture
) -> None:
    root, run = write(tmp_path / "coco", boxes_alone), tmp_path / "run"
    recipe = small_detector("schedule.epochs=1", "optim.batch_size=1", f"detector.kind={kind}")
    train(recipe, data=root, out=run)
    said = capsys.readouterr().err
    assert "detector.masks=False  (no object has a mask: trained and evaluated for boxes)" in said
    task: Any = load(run)
    assert not [name for name in task.state_dict() if "mask_head" in name] and not task.recipe.detector.masks
    report = json.loads((run / "evaluation.json").read_text())
    assert "ap" in report["box"] and "mask" not in report and (run / "predictions.png").is_file()
    (row,) = predict(run, [root / "val2017" / "0.jpg"], threshold=0.0)
    assert row["ok"] and row["objects"] and all(found["mask"] is None for found in row["objects"])
    assert "mask AP" not in (run / "best" / "README.md").read_text()
    if kind == "mask_rcnn":
        train(recipe, data=None, out=run, resume=True)
        assert evaluate(run, data=root, workers=0)[0].metrics.keys() == {"box_ap", "box_ap50", "box_ap75"}


def test_objects_without_a_mask_enter_every_loss_but_that_of_masks(tmp_path: Path) -> None:
    splits = open_coco(DATA, write(tmp_path, each(lambda a: a.update(segmentation=[]), 2)), seed=0)
    view = View((0, 0, 96, 72), (96, 72))
    target = view_objects(splits.train.objects_of(0), view, {1: 0, 2: 1})
    assert target.masked is not None and target.masked.tolist() == [False, True]
    assert target.masks.flatten(1).any(dim=1).tolist() == [False, True]
    from conv2former.tasks.detection.task import DetectionTask

    task = DetectionTask.build(small_detector(), ["cat", "dog"]).train()
    image = torch.zeros(1, 3, 96, 96)

    def losses(masks: torch.Tensor) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return task.model(image, [(72, 96)], [target._replace(masks=masks)])

    other = target.masks.clone()
    other[0] = 1  # of the object without one
    one, two = losses(target.masks), losses(other)
    assert all(torch.equal(one[name], two[name]) for name in one) and one["mask"] > 0
    without = target._replace(masked=torch.tensor([False, False]))
    assert task.model(image, [(72, 96)], [without])["mask"] == 0


def test_what_is_said_first(tmp_path: Path) -> None:
    splits = open_coco(DATA, write(tmp_path), seed=0)
    assert isinstance(splits, CocoSplits)
    assert remarks(splits) == [
        "2 classes with objects to train on: cat (3), dog (3); 3 training and 3 validation images"
    ]
    assert CocoMetric(splits.val).kinds.keys() == {"box", "mask"}
    assert CocoSource(tmp_path / "val2017", tmp_path / "annotations" / "instances_val2017.json").notes == []


def test_names_sizes_and_ids_that_the_files_tell(tmp_path: Path) -> None:
    """Another folder or case in names, sizes that are missing, ids as texts with zeros: each with a line, none lost."""

    def foreign(content: dict[str, Any]) -> None:
        for entry in content["images"]:
            entry.update(file_name=f"C:\\photos\\{entry['file_name'].upper()}", width=None, height=0)
        for entry in content["annotations"]:
            entry["image_id"] = f"{entry['image_id']:05}"

    root = write(tmp_path, foreign)
    sound = CocoSource(write(tmp_path / "sound") / "val2017", tmp_path / "sound/annotations/instances_val2017.json")
    source = CocoSource(root / "val2017", root / "annotations/instances_val2017.json")
    assert [entry[2:] for entry in source.entries] == [entry[2:] for entry in sound.entries]
    assert source.counted == sound.counted and source.load(0)[0].size == sound.load(0)[0].size
    assert any("images are found by their names alone" in line for line in source.notes)
    assert any("sizes of images are missing: the files say them" in line for line in source.notes)


def test_names_as_addresses_write_them(tmp_path: Path) -> None:
    """Label Studio's annotations name files in the form of addresses."""

    def encoded(content: dict[str, Any]) -> None:
        for entry in content["images"]:
            entry["file_name"] = f"a%20b%20{entry['file_name']}"

    root = write(tmp_path, encoded)
    for path in sorted((root / "val2017").iterdir()):
        path.rename(path.with_name(f"a b {path.name}"))
    source = CocoSource(root / "val2017", root / "annotations/instances_val2017.json")
    assert source.load(0)[0].size and source.notes == []


def test_a_validation_set_without_objects_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path)
    path = root / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(annotations=[])))
    with pytest.raises(UserError, match="has no object that counts: there is nothing to validate on"):
        open_coco(DetectionDataSection(), root, seed=0)


def scaled(box: list[float]) -> list[float]:
    return [box[0] / 96, box[1] / 72, box[2] / 96, box[3] / 72]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (each(lambda entry: entry.update(bbox=scaled(entry["bbox"]))), "all boxes lie between 0 and 1"),
        (lambda found: found["images"][1].update(file_name="./0.jpg"), "images 1 and 2 are one file, ./0.jpg"),
        (lambda found: found["categories"][0].update(name=" "), "category of id 1 has no name"),
    ],
)
def test_what_cannot_be_meant_is_refused(edit: Edit, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_coco(DATA, write(tmp_path, edit), seed=0)


@pytest.mark.parametrize(
    ("mask", "has_masks"),
    [
        (dict(size=[72, 96], counts=[72 * 96]), False),
        ([[0.1, 0.1, 0.4, 0.1, 0.4, 0.5]], False),  # fractions of the sides
        ([[5, 5, 60, 40, 5, 5]], False),
        ([[5, 5, 60, 5, 60, 40]], True),
    ],
)
def test_masks_without_pixels_are_no_masks(mask: Any, has_masks: bool, tmp_path: Path) -> None:
    source = open_coco(DATA, write(tmp_path, each(lambda entry: entry.update(segmentation=mask))), seed=0).train
    assert source.has_masks == has_masks and source.counted == [2, 2, 2]
    assert any(
        re.search("6 of 6 objects whose mask has (no pixel|a polygon of less)", line) for line in source.notes
    ) != (has_masks)


def test_boxes_as_two_corners_are_named(tmp_path: Path) -> None:
    def corners(entry: dict[str, Any]) -> None:
        x, y, width, height = entry["bbox"]
        entry["bbox"] = [x, y, 96 + x + width, y + height]

    notes = open_coco(DATA, write(tmp_path, each(corners)), seed=0).train.notes
    assert any("6 of 6 objects have a box that reaches beyond the image; COCO's are [x, y" in line for line in notes)
    assert not any("reaches beyond" in line for line in open_coco(DATA, write(tmp_path / "whole"), seed=0).train.notes)
