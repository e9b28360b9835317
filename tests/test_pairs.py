"""Images with masks: layouts, bad input, augmentation; and what segmentation counts and computes."""

from __future__ import annotations

import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conv2former.data.images import BadImage
from conv2former.data.sampling import SampleKey
from conv2former.errors import UserError
from conv2former.tasks.dense import padded_with_mean
from conv2former.tasks.segmentation import inference as segmentation
from conv2former.tasks.segmentation.config import SegmentationAugmentSection, SegmentationDataSection
from conv2former.tasks.segmentation.data import EvalPairs, TrainPairs, crop_box
from conv2former.tasks.segmentation.folders import open_eval_pairs, open_pairs
from conv2former.tasks.segmentation.inference import probability_bands, slide, whole
from conv2former.tasks.segmentation.losses import pixel_loss
from conv2former.tasks.segmentation.masks import read_labels, to_classes
from conv2former.tasks.segmentation.metrics import SegmentationMetric
from conv2former.tasks.segmentation.task import SegmentationTask
from scenes import BLUE, RED, small_segmenter, write_ade20k, write_pairs

PAIRS = SegmentationDataSection(source="pairs", val_fraction=0.34, short_side=72, long_side=96, crop_size=64)
ADE20K = PAIRS.model_copy(update=dict(source="ade20k", val_fraction=0.0, reduce_zero_label=True))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("scenes") / "pairs")


@pytest.fixture(scope="module")
def ade20k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ade20k(tmp_path_factory.mktemp("scenes") / "ade20k")


def test_layouts(pairs: Path, ade20k: Path, tmp_path: Path) -> None:
    split = open_pairs(PAIRS, pairs, seed=0)
    assert split.train.classes == ["ground", "block", "disc"] and (len(split.train), len(split.val)) == (4, 2)
    names = {source.name(i) for source in (split.train, split.val) for i in range(len(source))}
    assert names == {f"images/{number}.png" for number in range(6)}
    fixed = open_pairs(ADE20K, ade20k, seed=0)
    assert fixed.train.classes == ["ground", "block", "disc"] and (len(fixed.train), len(fixed.val)) == (3, 2)
    for part in ("train", "val"):
        shutil.copytree(pairs, tmp_path / "two" / part)
    (tmp_path / "two" / "classes.txt").write_text("a\nb\nc\n")
    two = open_pairs(PAIRS.model_copy(update=dict(val_fraction=0.0)), tmp_path / "two", seed=0)
    assert len(two.train) == len(two.val) == 6 and two.digest() != split.digest() != fixed.digest()
    assert len(open_eval_pairs(PAIRS, tmp_path / "two", two.val.classes)) == 6
    assert len(open_eval_pairs(PAIRS, pairs, split.val.classes)) == 6


def test_classes_of_both_conventions(pairs: Path, ade20k: Path) -> None:
    """Background, block and disc are 0, 1, 2 where zero counts and where it does not."""
    for split in (open_pairs(PAIRS, pairs, seed=0), open_pairs(ADE20K, ade20k, seed=0)):
        image, classes = split.val.load(0)
        pixels = np.asarray(image)
        assert (classes[(pixels == RED).all(axis=2)][1:] == 1).all() and set(np.unique(classes)) == {0, 1, 2, 255}
        assert (classes[(pixels == BLUE).all(axis=2)] == 2).all() and (classes[:, 0] == 255).all()


def test_bad_layouts_are_one_line(pairs: Path, tmp_path: Path) -> None:
    def message(data: SegmentationDataSection, root: Path | None) -> str:
        with pytest.raises(UserError) as caught:
            open_pairs(data, root, seed=0)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such folder" in message(PAIRS, tmp_path / "none") and "--data DIR" in message(PAIRS, None)
    assert "no images/training and annotations/training" in message(ADE20K, pairs)
    assert "hold out a fraction" in message(PAIRS.model_copy(update=dict(val_fraction=0.0)), pairs)
    copy = tmp_path / "copy"
    shutil.copytree(pairs, copy)
    (copy / "masks" / "3.png").unlink()
    assert "1 of 6 images have no mask of their name" in message(PAIRS, copy) and "images/3.png" in message(PAIRS, copy)
    (copy / "classes.txt").unlink()
    assert "add" in message(PAIRS, copy) and "data.classes=NUMBER" in message(PAIRS, copy)
    (copy / "classes.txt").write_text("one\n")
    assert "1 classes: give at least 2" in message(PAIRS, copy)
    assert "names 1: make them match" in message(PAIRS.model_copy(update=dict(classes=3)), copy)
    shutil.rmtree(copy / "masks")
    (copy / "classes.txt").write_text("a\nb\n")
    assert "has no" in message(PAIRS, copy) and "each folder of images needs one of masks" in message(PAIRS, copy)


def test_bad_label_maps_are_bad_images(pairs: Path, tmp_path: Path) -> None:
    shutil.copytree(pairs, tmp_path / "pairs")
    source, file = open_pairs(PAIRS, tmp_path / "pairs", seed=0).train, tmp_path / "pairs" / "masks"

    def reason(content: Image.Image | bytes) -> str:
        path = file / Path(source.name(0)).name
        path.write_bytes(content) if isinstance(content, bytes) else content.save(path)
        with pytest.raises(BadImage) as caught:
            source.load(0)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "it has 64 x 64 pixels, its image 128 x 96" in reason(Image.new("L", (64, 64)))
    beyond = np.zeros((96, 128), np.uint8)
    beyond[:2, :3] = 7
    assert "6 pixels hold labels up to 7, the last of the 3 classes is 2" in reason(Image.fromarray(beyond))
    assert "this is a RGB image" in reason(Image.new("RGB", (128, 96), (9, 0, 0)))
    assert "cannot" in reason(b"not a image") and "cannot" in reason(b"")
    for bits in (2, 4):  # which PNG optimisers make of small numbers
        write_grey_png(tmp_path / "grey.png", beyond % 3, bits)
        assert Image.open(tmp_path / "grey.png").tile[0][3] == f"L;{bits}"
        assert np.array_equal(read_labels(tmp_path / "grey.png"), beyond % 3)
    palette = Image.fromarray(beyond % 3).convert("P")
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(read_labels(tmp_path / "palette.png"), beyond % 3)
    with pytest.raises(BadImage, match="more than the limit of 100"):
        read_labels(tmp_path / "palette.png", max_pixels=100)


def write_grey_png(path: Path, values: np.ndarray, bits: int) -> None:
    """A PNG of 2 or 4 bits, which Pillow reads and does not write."""
    height, width = values.shape
    codes = np.unpackbits(values[..., None].astype(np.uint8), axis=2)[..., 8 - bits :].reshape(height, -1)
    lines = b"".join(b"\0" + np.packbits(line).tobytes() for line in codes)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def test_other_classes_are_no_silent_mistake(pairs: Path, tmp_path: Path) -> None:
    """The same names in another order would count everything wrongly."""
    with pytest.raises(UserError, match=r"are not the model's, in its order: here 'ground', the model's 'disc'"):
        open_eval_pairs(PAIRS, pairs, ["disc", "block", "ground"])
    with pytest.raises(UserError, match=r"here 3, the model's 2"):
        open_eval_pairs(PAIRS, pairs, ["ground", "block"])
    shutil.copytree(pairs, tmp_path / "copy")
    (tmp_path / "copy" / "classes.txt").write_text("\ufeffa\na\nb\n")
    with pytest.raises(UserError, match="names a more than once"):
        open_pairs(PAIRS, tmp_path / "copy", seed=0)
    (tmp_path / "copy" / "classes.txt").write_text("a\nb\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"is not in UTF-8 .*: save it as UTF-8"):
        open_pairs(PAIRS, tmp_path / "copy", seed=0)
    (tmp_path / "copy" / "classes.txt").write_text("# label:color_rgb:parts:actions\na:0,0,0::\nb:255,0,0::\n")
    with pytest.raises(UserError, match="is a label map of CVAT's: leave the names alone in it"):
        open_pairs(PAIRS, tmp_path / "copy", seed=0)
    shutil.copy(pairs / "classes.txt", tmp_path / "copy")
    shutil.copy(pairs / "images" / "0.png", tmp_path / "copy" / "images" / "0.jpg")
    with pytest.raises(UserError, match="differ by their extension alone"):
        open_pairs(PAIRS, tmp_path / "copy", seed=0)


def test_windows_must_meet() -> None:
    with pytest.raises(ValueError, match="would leave gaps"):
        SegmentationDataSection(window="slide", crop_size=256, stride=341)
    with pytest.raises(ValueError, match=r"requires data\.window=slide"):
        SegmentationDataSection(stride=100)
    assert SegmentationDataSection(window="slide", crop_size=512).step == 341


def test_labels_by_hand() -> None:
    stored = np.array([[0, 1, 2, 255]], np.uint16)
    where = Path("x")
    assert to_classes(stored, classes=3, reduce_zero=False, path=where).tolist() == [[0, 1, 2, 255]]
    assert to_classes(stored, classes=2, reduce_zero=True, path=where).tolist() == [[255, 0, 1, 255]]
    with pytest.raises(BadImage, match=r"1 pixels hold labels up to 2, the last of the 1 classes is 1 "):
        to_classes(stored, classes=1, reduce_zero=True, path=where)
    with pytest.raises(BadImage, match="reduce_zero_label=true"):
        to_classes(stored, classes=2, reduce_zero=False, path=where)


def test_augmentation_moves_picture_and_labels_together(pairs: Path) -> None:
    source = open_pairs(PAIRS, pairs, seed=0).train
    augment = SegmentationAugmentSection(photometric=0.0)
    dataset = TrainPairs(source, PAIRS, augment, seed=3)
    for epoch in range(8):
        sample = dataset[SampleKey(epoch, epoch % 4)]
        assert not isinstance(sample, BadImage)
        (pixels, classes), _, _ = sample
        assert pixels.shape[:2] == classes.shape and max(classes.shape) <= 64
        for index, colour in ((1, RED), (2, BLUE)):
            inside = classes == index
            if inside.sum() > 40:
                assert np.median(np.abs(pixels[inside].astype(int) - colour).sum(axis=1)) < 30
    again = dataset[SampleKey(7, 3)]
    assert not isinstance(again, BadImage) and np.array_equal(again[0][0], pixels)


def test_batches_are_padded_with_what_does_not_count(pairs: Path) -> None:
    data = PAIRS.model_copy(update=dict(crop_size=96))
    augment = SegmentationAugmentSection(scale=(0.5, 0.6))
    dataset = TrainPairs(open_pairs(data, pairs, seed=0).train, data, augment)
    batch = dataset.collate([dataset[SampleKey(0, index)] for index in range(3)])
    assert batch.images[0].shape == (3, 3, 96, 96) and batch.masks.shape == (3, 96, 96)
    for labels, (height, width) in zip(batch.masks, batch.sizes, strict=True):
        assert (labels[height:] == 255).all() and (labels[:, width:] == 255).all() and height < 96
    images = padded_with_mean(torch.ones(3, 3, 96, 96), batch.sizes)
    assert float(images[0].sum()) == 3 * batch.sizes[0][0] * batch.sizes[0][1]


def test_colours_change_and_nothing_else(pairs: Path) -> None:
    source = open_pairs(PAIRS, pairs, seed=0).train
    plain, changed = (
        TrainPairs(source, PAIRS, SegmentationAugmentSection(photometric=p), seed=0)[SampleKey(0, 0)]
        for p in (0.0, 1.0)
    )
    assert not isinstance(plain, BadImage) and not isinstance(changed, BadImage)
    assert np.array_equal(plain[0][1], changed[0][1]) and np.abs(plain[0][0].astype(int) - changed[0][0]).mean() > 3


def test_no_class_fills_a_crop_where_it_can_be_helped() -> None:
    labels = np.zeros((200, 200), np.uint8)
    labels[:, 120:] = 1
    labels[:, 190:] = 255
    import random

    random.seed(0)
    shares = []
    for _ in range(50):
        left, top, right, bottom = crop_box(labels, 64, max_share=0.75)
        assert (right - left, bottom - top) == (64, 64)
        part = labels[top:bottom, left:right]
        counts = np.bincount(part[part != 255].ravel(), minlength=2)
        shares.append(counts.max() / counts.sum())
    assert np.mean([share < 0.75 for share in shares]) > 0.9
    assert crop_box(np.zeros((30, 20), np.uint8), 64, max_share=0.75) == (0, 0, 20, 30)


def one_hot(classes: torch.Tensor) -> torch.Tensor:
    """Certain probabilities (1, 3, H, W)."""
    return F.one_hot(classes.long() % 3, 3).movedim(-1, 1).float()


def test_counts_by_hand() -> None:
    """Eight pixels that count in three classes, one of which never occurs; in two bands of rows."""
    truth = torch.tensor([[[0, 0, 0], [1, 1, 1], [1, 1, 255]]], dtype=torch.uint8)
    found = one_hot(torch.tensor([[[0, 0, 1], [1, 1, 1], [0, 1, 0]]]))
    bands = [(slice(0, 2), found[:, :, :2]), (slice(2, 3), found[:, :, 2:])]
    counts = SegmentationMetric(["a", "b", "c"])
    counts.update(bands, truth)
    counts.update(bands, torch.full_like(truth, 255))  # nothing counts
    result = counts.compute()
    assert (result["images"], result["pixels"]) == (1, 8)
    rows = [*result["per_class"].values()]
    assert [row["iou"] for row in rows] == [pytest.approx(50.0), pytest.approx(100 * 4 / 6), None]
    assert [row["accuracy"] for row in rows[:2]] == [pytest.approx(100 * 2 / 3), pytest.approx(80.0)]
    assert result["miou"] == pytest.approx((50 + 100 * 4 / 6) / 2) and result["pixel_accuracy"] == pytest.approx(75.0)
    counts.reset()
    counts.update([(slice(0, 3), one_hot(truth))], truth)
    assert counts.compute()["miou"] == pytest.approx(100.0) and counts.compute()["loss"] == pytest.approx(0.0)


def test_nothing_counted_has_no_miou() -> None:
    counts = SegmentationMetric(["a", "b", "c"])
    counts.update([(slice(0, 1), torch.ones(1, 3, 1, 2) / 3)], torch.full((1, 1, 2), 255, dtype=torch.uint8))
    assert counts.compute()["miou"] is None and counts.compute()["images"] == 0


@pytest.mark.parametrize("size", [(50, 70), (200, 31), (64, 96)])
@torch.no_grad()
def test_bands_are_the_whole(model: Any, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Against interpolation of the whole map at once."""
    image, data = torch.randn(1, 3, 64, 96), PAIRS
    model.eval()
    wanted = F.interpolate(whole(model, image), size=size, mode="bilinear", align_corners=False).softmax(1)
    monkeypatch.setattr(segmentation, "BAND", 3 * size[1] * 7)  # seven rows
    bands = list(segmentation.probability_bands(model, [image], data, size=size))
    assert len(bands) == -(-size[0] // 7) and bands[0][1].shape == (1, 3, 7, size[1])
    torch.testing.assert_close(torch.cat([band for _, band in bands], dim=2), wanted, atol=1e-6, rtol=1e-5)


def test_the_loss_is_divided_by_all_pixels() -> None:
    logits = torch.randn(2, 3, 4, 4)
    labels = torch.randint(3, (2, 4, 4))
    full = F.cross_entropy(logits, labels)
    torch.testing.assert_close(pixel_loss(logits, labels), full)
    labels[:, :2] = 255
    valid = F.cross_entropy(logits, labels, ignore_index=255)
    torch.testing.assert_close(pixel_loss(logits, labels), valid / 2)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    recipe = small_segmenter()
    return SegmentationTask.build(recipe, ["ground", "block", "disc"]).model


def test_every_parameter_gets_a_gradient(model: Any) -> None:
    task = SegmentationTask(model, small_segmenter(), ["ground", "block", "disc"])
    batch = task.example_batch(2)
    task.train().training_step(batch._replace(images=[torch.randint_like(batch.images[0], 256)])).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    model.zero_grad()


@torch.no_grad()
def test_windows_cover_the_image(model: Any) -> None:
    """A window as large as the image is the whole image; smaller ones give logits everywhere."""
    image = torch.randn(1, 3, 64, 96)
    model.eval()
    torch.testing.assert_close(slide(model, image, side=96, stride=64), whole(model, image))
    found = slide(model, image, side=64, stride=43)
    left, right = whole(model, image[..., :64]), whole(model, image[..., 32:])
    torch.testing.assert_close(found[..., :32], left[..., :32])
    torch.testing.assert_close(found[..., 64:], right[..., 32:])
    torch.testing.assert_close(found[..., 32:64], (left[..., 32:] + right[..., :32]) / 2)


def class_probabilities(*arguments: Any, **options: Any) -> torch.Tensor:
    """All bands as one, (1, K, H, W)."""
    return torch.cat([part for _, part in probability_bands(*arguments, **options)], dim=2)


@torch.no_grad()
def test_probabilities_of_views_are_averaged(model: Any) -> None:
    model.eval()
    image = torch.randn(1, 3, 64, 96)
    data = PAIRS
    plain = class_probabilities(model, [image], data, size=(50, 70))
    torch.testing.assert_close(plain.sum(1), torch.ones(1, 50, 70))
    other = class_probabilities(model, [image.flip(3)], data, size=(50, 70)).flip(3)
    both = class_probabilities(model, [image], data, size=(50, 70), mirror=True)
    torch.testing.assert_close(both, (plain + other) / 2)
    two = class_probabilities(model, [image, image], data, size=(50, 70))
    torch.testing.assert_close(two, plain)


def test_evaluation_sees_pictures_at_every_scale(pairs: Path) -> None:
    source = open_pairs(PAIRS, pairs, seed=0).val
    dataset = EvalPairs(source, PAIRS, scales=(0.5, 1.0))
    batch = dataset.collate([dataset[SampleKey(0, 0)]])
    assert [tuple(view.shape) for view in batch.images] == [(1, 3, 36, 48), (1, 3, 72, 96)]
    assert batch.masks.shape == (1, 96, 128)
    padding = dataset.collate([dataset[SampleKey(0, 0, padding=True)]])
    assert (padding.masks == 255).all()
