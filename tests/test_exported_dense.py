"""Exported segmentation models and detectors in the place of their runs: free sizes, `predict` and `evaluate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from conv2former.checkpoints.exported import KEY, open_runtime
from conv2former.data.rle import decode_mask
from conv2former.engine.evaluate import evaluate
from conv2former.engine.predict import predict
from conv2former.errors import UserError
from conv2former.tasks import load
from conv2former.tasks.segmentation.task import SegmentationTask
from conv2former.tasks.segmentation.upernet import average_by_products
from conv2former.tools.explain.subjects import open_subject
from conv2former.tools.export import ExportOptions, export
from scenes import certain, scene, small_segmenter, write_coco, write_pairs

CLASSES = ["ground", "block", "disc"]
SIZES = [(128, 96), (70, 131), (300, 57)]  # width and height of images


@pytest.mark.parametrize("size", [(1, 1), (3, 4), (5, 7), (6, 6), (13, 2), (17, 31)])
@pytest.mark.parametrize("cells", [1, 2, 3, 6])
def test_two_products_are_adaptive_pooling(size: tuple[int, int], cells: int) -> None:
    """Also where there are fewer positions than cells."""
    x = torch.randn(2, 3, *size)
    expected = torch.nn.AdaptiveAvgPool2d(cells)(x)
    torch.testing.assert_close(average_by_products(x, cells), expected, atol=1e-6, rtol=1e-6)


def segmenter(folder: Path, fill: Callable[..., Any], *overrides: str) -> Path:
    """A saved model whose masks are no single class."""
    task = SegmentationTask.build(small_segmenter("model.args.depths=[1,1,1,1]", *overrides), CLASSES)
    task.save(folder, state=fill(task.model).state_dict(), note={})
    return folder


def exported(source: Path, out: Path, images: Path, *formats: str, **options: Any) -> Path:
    """The folder of the files, which have passed the export's own check."""
    options |= dict(formats=formats or ("onnx",), images=[images], count=2)
    assert all(one.ok for one in export(str(source), out, ExportOptions(**options), say=lambda line: None))
    return out


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of photographs, of several sizes."""
    folder = tmp_path_factory.mktemp("photos")
    for number, (width, height) in enumerate(SIZES):
        scene(number)[0].resize((width, height)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "data", count=3)


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory, fill: Callable[..., Any], photos: Path) -> Path:
    """``model``, and ``model.onnx`` of it for any size; not to be changed."""
    root = tmp_path_factory.mktemp("free")
    return exported(segmenter(root / "model", fill), root, photos, dynamic_size=True)


def same_masks(source: Path, file: Path, images: Path) -> None:
    """What the file finds on each image is what the run finds, but for pixels that rounding decides."""
    several = 0
    for one, other in zip(predict(source, [images]), predict(file, [images]), strict=True):
        assert one["ok"] and other["ok"] and one["file"] == other["file"]
        maps = []
        for row in (one, other):
            masks = [(found["index"], decode_mask(found["mask"])) for found in row["classes"]]
            maps.append(sum(mask * (index + 1) for index, mask in masks))
        assert maps[0].shape == maps[1].shape == Image.open(one["file"]).size[::-1] and maps[0].min() > 0
        assert (maps[0] == maps[1]).mean() > 0.999
        several += len(one["classes"]) > 1
    assert several > 1


def same_figures(source: Path, file: Path, data: Path, **options: Any) -> None:
    ours, theirs = (evaluate(path, data=data, workers=0, **options)[0].metrics for path in (source, file))
    assert ours.keys() == theirs.keys() and any(ours.values())
    assert theirs == pytest.approx(ours, abs=0.05)


def test_a_free_size_answers_as_the_run(free: Path, photos: Path, pairs: Path) -> None:
    same_masks(free / "model", free / "model.onnx", photos)
    same_figures(free / "model", free / "model.onnx", pairs)


def test_sides_need_not_be_multiples(free: Path) -> None:
    """The file itself takes them as the network does."""
    network, runtime = load(free / "model").exportable().network.eval(), open_runtime(free / "model.onnx")
    for size in ((32, 32), (75, 133), (224, 33)):
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected = network(images)
        (logits,) = runtime(images.numpy())
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


@pytest.mark.slow
def test_a_free_size_in_openvino(free: Path, photos: Path, pairs: Path, tmp_path: Path) -> None:
    """At several scales, too."""
    out = exported(free / "model", tmp_path, photos, "openvino", "torch", dynamic_size=True)
    same_masks(free / "model", out / "model.xml", photos)
    same_figures(free / "model", out / "model.xml", pairs, multi_scale=True)


@pytest.mark.slow
def test_a_fixed_size(fill: Callable[..., Any], pairs: Path, tmp_path: Path) -> None:
    """The runtime gets windows of that size; whole images do not have it."""
    source = segmenter(tmp_path / "model", fill, "data.window=slide")
    file = exported(source, tmp_path, pairs / "images") / "model.onnx"
    check_windows(source, file, pairs)


def test_windows_fit_a_fixed_size(fill: Callable[..., Any], free: Path, pairs: Path, tmp_path: Path) -> None:
    """As above by what the file says, without an export of its own."""
    source = segmenter(tmp_path / "model", fill, "data.window=slide")
    file = copied(free / "model.onnx", tmp_path / "model.onnx")
    recipe = json.loads((source / "config.json").read_text())["recipe"]
    check_windows(source, told(file, recipe=recipe, dynamic_size=False), pairs)


def check_windows(source: Path, file: Path, pairs: Path) -> None:
    """They give the run's answers; whole images are refused with the size that would fit."""
    assert about(file)["input_size"] == [3, 64, 64]
    same_masks(source, file, pairs / "images")
    same_figures(source, file, pairs)
    recipe = about(file)["recipe"]
    told(file, recipe=recipe | dict(data=recipe["data"] | dict(window="whole", stride=None)))
    with pytest.raises(UserError, match=r"64 x 64 alone .* 96 x 96 .* --dynamic-size, or --size 96 96"):
        list(predict(file, [pairs / "images"]))


def copied(file: Path, to: Path) -> Path:
    to.write_bytes(file.read_bytes())
    return to


def about(file: Path) -> dict[str, Any]:
    return json.loads({entry.key: entry.value for entry in onnx.load(file).metadata_props}[KEY])


def told(file: Path, **changes: Any) -> Path:
    """The file, which now says something else of its model."""
    model = onnx.load(file)
    entry = next(entry for entry in model.metadata_props if entry.key == KEY)
    entry.value = json.dumps(json.loads(entry.value) | changes)
    onnx.save(model, file)
    return file


def test_what_a_file_says_is_checked(free: Path, photos: Path, tmp_path: Path) -> None:
    recipe = about(free / "model.onnx")["recipe"]
    assert recipe["model"]["weights"] is None and recipe["segmenter"]["channels"] == 16
    data = recipe["data"]
    wrong: list[tuple[dict[str, Any], str]] = [
        (dict(recipe=None), "export the run again"),
        (dict(recipe=[1]), "not from `conv2former export`"),
        (dict(recipe=recipe | dict(data=data | dict(crop_size=10**9))), "data.crop_size"),
        (dict(recipe=recipe | dict(weights="/etc/passwd")), "weights"),
        (dict(recipe=recipe | dict(task="detection")), "task"),
        (dict(labels=[]), "export the run again"),
        (dict(labels=["a", "a", "b"]), "export the run again"),
        (dict(labels=["a", "b"]), "gives"),
        (dict(task="classification"), "gives"),
        (dict(task="detection"), "recipe"),
        (dict(task="other"), "unknown task 'other'"),
        (dict(input_size=[3, 64, 10**9]), "not from `conv2former export`"),
    ]
    for number, (changes, message) in enumerate(wrong):
        file = copied(free / "model.onnx", tmp_path / f"{number}.onnx")
        with pytest.raises(UserError, match=message) as caught:
            list(predict(told(file, **changes), [photos]))
        assert str(caught.value).isprintable() and len(str(caught.value)) < 2000
    with pytest.raises(UserError, match="--data DIR"):
        evaluate(free / "model.onnx", workers=0)
    with pytest.raises(UserError, match="is an exported file: give the run"):
        open_subject(str(free / "model.onnx"), size=64, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco") / "data")


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind", ["mask_rcnn", *(pytest.param(kind, marks=SLOW) for kind in ("cascade_mask_rcnn", "boxes alone"))]
)
def test_a_whole_detector(kind: str, coco: Path, photos: Path, tmp_path: Path) -> None:
    masks = kind != "boxes alone"
    choice = f"detector.kind={kind}" if masks else "detector.masks=false"
    settings = [choice, "detector.max_detections=20", "data.short_side=64", "data.long_side=96"]
    source = certain(tmp_path / "model", *settings)
    said: list[str] = []
    options = ExportOptions(formats=["onnx", "openvino"], size=(64, 96), images=[coco / "val2017"])
    for found in export(str(source), tmp_path / "out", options, say=said.append):
        assert found.ok and not said and found.comparison.agreement == 1.0 and found.comparison.difference < 1e-5
    file = tmp_path / "out" / "model.onnx"
    boxes, scores, labels, *rest = open_runtime(file)(np.zeros((1, 3, 64, 96), np.float32), np.array([50, 96]))
    assert boxes.shape == (20, 4) and scores.shape == labels.shape == (20,)
    assert [part.shape for part in rest] == ([(20, 28, 28)] if masks else [])
    assert boxes.min() >= 0 and boxes[:, 3].max() <= 50 and set(labels) <= {-1, 0, 1}
    assert ((labels >= 0) == (scores > 0.05)).all()
    for each in (file, file.with_suffix(".xml")):
        same_objects(source, each, coco, masks=masks)
    other_images_and_files(file, photos)


def same_objects(source: Path, file: Path, coco: Path, *, masks: bool) -> None:
    """Images that the run sees at the file's size: ``predict`` and ``evaluate`` find the same."""
    images = coco / "val2017"
    for one, other in zip(predict(source, [images]), predict(file, [images]), strict=True):
        assert len(one["objects"]) == len(other["objects"]) > 0
        for mine, theirs in zip(one["objects"], other["objects"], strict=True):
            assert mine["label"] == theirs["label"] and mine["score"] == pytest.approx(theirs["score"], abs=1e-4)
            assert mine["box"] == pytest.approx(theirs["box"], abs=0.05)
            assert masks == (mine["mask"] is not None) == (theirs["mask"] is not None)
            if masks:
                shapes = [decode_mask(found["mask"]) for found in (mine, theirs)]
                assert shapes[0].shape == (96, 128) and (shapes[0] == shapes[1]).mean() > 0.999
    ours, others = (evaluate(path, data=coco, workers=0)[0].records for path in (source, file))
    assert len(ours) == len(others) > 0
    for mine, theirs in zip(ours, others, strict=True):
        assert (mine["image_id"], mine["category_id"]) == (theirs["image_id"], theirs["category_id"])
        assert mine["score"] == pytest.approx(theirs["score"], abs=1e-4)


def other_images_and_files(file: Path, photos: Path) -> None:
    """Images of other proportions are fitted into the file's size; what it cannot do is said."""
    for row in predict(file, [photos]):
        width, height = Image.open(row["file"]).size
        for found in row["objects"]:
            left, top, right, bottom = found["box"]
            assert -0.1 <= left <= right <= width + 0.1 and -0.1 <= top <= bottom <= height + 0.1
            assert found["mask"] is None or decode_mask(found["mask"]).shape == (height, width)
    with pytest.raises(UserError, match=r"--threshold 0\.01: the file leaves out scores below 0\.05"):
        list(predict(file, [photos], threshold=0.01))
    recipe = about(file)["recipe"]
    detector = recipe["detector"] | dict(max_detections=21)
    with pytest.raises(UserError, match=r"gives .*20, 4.* says .*21, 4"):
        list(predict(told(file, recipe=recipe | dict(detector=detector)), [photos]))
    with pytest.raises(UserError, match="is an exported file: give the run"):
        export(str(file), file.parent / "again", ExportOptions())
    with pytest.raises(UserError, match="holds a part of a detector"):
        list(predict(told(file, outputs=["p2", "p3", "p4", "p5", "p6"]), [photos]))
