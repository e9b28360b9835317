"""Which folder is what: classes, splits, what is left out and named, images of both parts."""

from __future__ import annotations

import re
import shutil
import tarfile
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conv2former.data.folders import find_splits, listed
from conv2former.data.images import HEIC, BadImage, decode, find_images, given_images
from conv2former.data.sources import alike, remarks
from conv2former.engine.evaluate import evaluate
from conv2former.engine.train import train
from conv2former.errors import UserError
from conv2former.tasks.classification.archives import TarSource
from conv2former.tasks.classification.layouts import open_eval_source, open_splits
from conv2former.tasks.classification.sources import FolderSource
from digits import tiny_recipe

pytestmark = pytest.mark.usefixtures("quick")

DATA = tiny_recipe().data.model_copy(update=dict(val_fraction=0.0))
HELD = DATA.model_copy(update=dict(val_fraction=0.25))


def write(root: Path, *names: str, seed: int = 0) -> Path:
    """Images of noise, each another."""
    generator = np.random.default_rng([seed, *map(ord, str(names))])
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).save(root / name)
    return root


def images(root: Path, *splits: str, classes: tuple[str, ...] = ("cat", "dog"), count: int = 4) -> Path:
    """SPLIT/CLASS/N.png."""
    for number, split in enumerate(splits):
        write(root, *(f"{split}/{name}/{n}.png" for name in classes for n in range(count)), seed=number)
    return root


def test_the_first_level_names_the_class(tmp_path: Path) -> None:
    root = write(tmp_path, "a/day1/0.png", "a/day2/0.png", "a/1.png", "b/day1/0.png", "b/day1/x/0.png")
    source = FolderSource(root)
    assert source.classes == ["a", "b"] and source.targets == [0, 0, 0, 1, 1]
    assert [source.name(i) for i in (0, 1)] == ["a/1.png", "a/day1/0.png"]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a", "b"):
            tar.add(root / name, f"photos/{name}")
    packed = TarSource(tmp_path / "x.tar")
    assert packed.classes == source.classes and packed.targets == source.targets
    (parts := tmp_path / "parts").mkdir()
    for name in ("a", "b"):  # a/1.png lies in no folder of its tar file, which is therefore the class
        with tarfile.open(parts / f"{name}.tar", "w") as tar:
            tar.add(root / name, "" if name == "a" else name)
    assert TarSource(parts).classes == ["a", "b"] and TarSource(parts).targets == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("train_name", "val_name"), [("train", "valid"), ("Train", "Val"), ("TRAIN", "Validation"), ("train", "VALID")]
)
def test_splits_in_upper_and_lower_case(tmp_path: Path, train_name: str, val_name: str) -> None:
    root = images(tmp_path, train_name, val_name, "Test", "extra")
    splits = open_splits(HELD, root, seed=0)
    assert (len(splits.train), len(splits.val)) == (8, 8)
    assert {Path(splits.val.file(i)).parts[-3] for i in range(8)} == {val_name}  # type: ignore[attr-defined]
    unread, classes = remarks(splits)
    assert unread.endswith("not read: Test, extra; evaluate a trained model on the test part with --split test")
    assert classes == "2 classes: cat (4), dog (4); 8 training and 8 validation images"
    test = open_eval_source(root, ["cat", "dog"], split="test")
    assert Path(test.file(0)).parts[-3] == "Test"  # type: ignore[attr-defined]


def test_a_test_part_is_never_validated_on(tmp_path: Path) -> None:
    root = images(tmp_path, "train", "test")
    with pytest.raises(UserError, match=r"no val/ folder .*data.val_fraction=0.1; the test images are not"):
        open_splits(DATA, root, seed=0)
    splits = open_splits(HELD, root, seed=0)
    assert {Path(splits.val.file(i)).parts[-3] for i in range(len(splits.val))} == {"train"}  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"no val/: .* or --split test"):
        open_eval_source(root, ["cat", "dog"])
    with pytest.raises(UserError, match="no val images"):
        open_eval_source(root, ["cat", "dog"], split="val")
    assert find_splits(["dev", "val", "Val", "valid"]) == {"val": "val"}
    words = images(tmp_path / "words", ".", classes=("valid", "other"))  # classes, for want of a training part
    assert open_splits(HELD, words, seed=0).train.classes == ["other", "valid"]


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    root = images(tmp_path, ".")
    write(root, "cat/@eaDir/0.png/SYNOPHOTO.png", ".thumbnails/1.png", "__MACOSX/cat/0.png", "cat/0.predicted.png")
    write(root, "runs/a/learning_curves.png", "runs/a/samples/0.png", "dog/reports/predictions.png")
    for name in ("runs/a/recipe.yaml", "runs/a/run.json", "dog/reports/evaluation.json"):
        (root / name).write_text("{}")
    for name in ("IMG_1.DNG", "IMG_2.dng", "noextension", "x.PSD", ".DS_Store", "Thumbs.db"):
        (root / "cat" / name).write_bytes(b"x")
    (root / "cat" / "self").symlink_to(".")
    (root / "cat" / "up").symlink_to("../..")
    (root / "dog" / "deep").mkdir()
    write(root, "dog/deep/9.png")
    (root / "dog" / "again").symlink_to("deep")
    source = FolderSource(root)
    assert source.classes == ["cat", "dog"] and source.targets == [0] * 4 + [1] * 5
    (folders, empty, files) = source.notes
    assert empty.endswith(": no images in runs/")
    for word in ("runs/a (a run)", "dog/reports (a report)", "__MACOSX (made by a system)", "@eaDir", ".thumbnails"):
        assert word in folders.replace("and 3 more", "") or "more" in folders, word
    assert listed(root, (".png",)).left_out.keys() >= {"cat/self", "cat/up", "dog/again", "cat/@eaDir", "runs/a"}
    assert "2 files ending in .dng" in files and "1 file without an ending" in files and "Thumbs" not in files
    others: Counter[str] = Counter()
    assert len(find_images([root], others=others)) == 9 and others[".dng"] == 2 and others[""] == 1


def test_the_names_of_files_that_predict_passes_over(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, "0.png")
    (tmp_path / "1.dng").write_bytes(b"x")
    (tmp_path / "2").write_bytes(b"x")
    assert given_images([tmp_path]) == [tmp_path / "0.png"]
    assert "not read: 1 file without an ending, 1 file ending in .dng" in capsys.readouterr().err
    (tmp_path / "0.png").unlink()
    with pytest.raises(UserError, match=r"no images in .*: 1 file without an ending, 1 file ending in \.dng"):
        given_images([tmp_path])


def test_the_same_images_in_both_parts_are_noticed(tmp_path: Path) -> None:
    root = images(tmp_path, "train", "val")
    assert len(remarks(open_splits(DATA, root, seed=0))) == 1
    shutil.copy(root / "train" / "cat" / "0.png", root / "val" / "cat" / "other.png")
    line = remarks(open_splits(DATA, root, seed=0))[1]
    assert line.startswith("1 of the 9 validation images are training images, too (cat/other.png is cat/0.png)")


def test_names_match_in_any_unicode_form(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    root = images(tmp_path, "train", classes=(composed, "dog"))
    images(root, "val", classes=(apart, "dog"))
    splits = open_splits(DATA, root, seed=0)
    assert splits.train.classes == splits.val.classes == [composed, "dog"]
    assert set(open_eval_source(root, [apart, "dog"], split="train").targets) == {0, 1}
    images(root, "train", classes=(apart,))
    assert FolderSource(root / "train").classes == [apart, "dog"] and len(FolderSource(root / "train")) == 12


def test_a_rare_class_may_have_no_validation_images(tmp_path: Path) -> None:
    """Targets follow the order of training; a class without images has no recall, in training and in evaluation."""
    root = images(tmp_path / "data", "train", classes=("ape", "bat", "cat"))
    images(root, "val", classes=("bat", "cat"), count=2)
    splits = open_splits(DATA, root, seed=0)
    assert splits.val.classes == ["ape", "bat", "cat"] and splits.val.targets == [1, 1, 2, 2]
    assert "no validation images of: ape" in splits.notes
    recipe = tiny_recipe("schedule.epochs=1", "schedule.warmup_epochs=0", "data.val_fraction=0.0", "data.workers=0")
    recipe = recipe.model_copy(update=dict(optim=recipe.optim.model_copy(update=dict(batch_size=4))))
    train(recipe, data=root, out=tmp_path / "run")
    classes = evaluate(tmp_path / "run", workers=0)[0].details["per_class"]
    assert classes["ape"]["top1"] is None and classes["bat"]["images"] == 2
    images(root, "val", classes=("dog",))
    with pytest.raises(UserError, match="only in train: ape; only in val: dog"):
        open_splits(DATA, root, seed=0)


def test_images_that_are_enlarged_are_said(tmp_path: Path) -> None:
    splits = open_splits(
        HELD, write(tmp_path / "photos", *(f"{name}/{n}.png" for name in "ab" for n in range(4))), seed=0
    )
    size = Image.open(next((tmp_path / "photos").rglob("*.png"))).width
    data = HELD.model_copy(update=dict(input_size=224))
    line = f"images of {size} pixels are enlarged to 224, which adds no detail: --set data.input_size=96 computes 5.4 "
    assert remarks(splits, data)[-1].startswith(line) and size <= 48
    assert splits.too_small(data.model_copy(update=dict(input_size=96))) is None


def test_runs_inside_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two trainings of one folder into itself; the first resumes, is evaluated, and so is a part of its data."""
    images(tmp_path, "train", "val", "test")
    shutil.copytree(tmp_path / "train", tmp_path, dirs_exist_ok=True)
    for name in ("train", "val"):
        shutil.rmtree(tmp_path / name)
    shutil.move(tmp_path / "test", tmp_path / "dog" / "more")
    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe("schedule.epochs=1", "schedule.warmup_epochs=0", "data.val_fraction=0.25", "data.workers=0")
    recipe = recipe.model_copy(update=dict(optim=recipe.optim.model_copy(update=dict(batch_size=4))))
    for run in ("runs/a", "runs/b"):
        train(recipe, data=Path("."), out=Path(run))
        said = capfd.readouterr().err
        assert re.search(
            r"^no validation set: holding out 4 images for validation \(data.val_fraction=0.25\)$", said, re.M
        ), said
    train(None, data=None, out=Path("runs/a"), resume=True)
    evaluation, folder = evaluate("runs/b", split="train", workers=0)
    assert folder == Path("runs/b/evaluations/train") and evaluation.details["images"] > 8
    assert evaluate("runs/b", split="val", workers=0)[1] == Path("runs/b")
    with pytest.raises(UserError, match="has no test images"):
        evaluate("runs/b", split="test", workers=0)
    images(tmp_path / "other", "train", "Test")
    assert evaluate("runs/b", data="other", split="test", workers=0)[0].details["images"] == 8


def test_heic_is_read_where_the_extra_is_installed(tmp_path: Path) -> None:
    """Turned by its EXIF orientation, once; without the extra its name says how to get it."""
    image = Image.new("RGB", (60, 40), (200, 30, 30))
    exif = Image.Exif()
    exif[0x112] = 6
    file = tmp_path / "a.heic"
    if not HEIC:
        file.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
        with pytest.raises(BadImage, match=r"pip install pillow-heif"):
            decode(file)
        return
    import pillow_heif

    pillow_heif.from_pillow(image).save(file, exif=exif.tobytes(), quality=95)
    assert decode(file).size == (40, 60) and find_images([tmp_path]) == [file]


def test_what_an_archive_leaves(tmp_path: Path) -> None:
    (tmp_path / "photos.zip").touch()
    with pytest.raises(UserError, match=r"not a folder: .*: unpack it and give the folder that comes out"):
        open_splits(HELD, tmp_path / "photos.zip", seed=0)
    with pytest.raises(UserError, match=r"hold backslashes .* unpack it again with a program that makes folders"):
        open_splits(HELD, write(tmp_path / "flat", "train\\cat\\0.png", "train\\dog\\0.png"), seed=0)


def test_other_names_of_parts(tmp_path: Path) -> None:
    splits = open_splits(DATA, images(tmp_path / "a", "Training", "Validation"), seed=0)
    assert splits.train.classes == ["cat", "dog"] and len(splits.train) == len(splits.val) == 8
    with pytest.raises(UserError, match="train_images, val_images look like parts of a set: call them train/ and val/"):
        open_splits(HELD, images(tmp_path / "b", "train_images", "val_images"), seed=0)
    images(tmp_path / "c" / "my photos", "train", "val")
    images(tmp_path / "d" / "export" / "v2", "train", "val")
    for root, inner in (("c", "c/my photos"), ("d", "d/export/v2")):
        with pytest.raises(UserError, match=rf"train and val lie in .*: give --data '?.*/{inner}'?$"):
            open_splits(HELD, tmp_path / root, seed=0)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (
            ("cat/train", "cat/val", "dog/train", "dog/val"),
            r"cat holds train and val: put them above the class",
        ),
        (
            ("train", "car", "bus"),
            r"train has no class folders, and beside it are bus, car: if 'train' is a class, rename that folder",
        ),
        (("data/cat", "data/dog"), r"only one class \('data'\).* give --data \S+data$"),
        ((".",), r"holds images and no class folders: give the folder above"),
    ],
)
def test_folders_that_may_mean_something_else_are_refused(
    folders: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    for folder in folders:
        write(tmp_path, *(f"{folder}/{number}.png" for number in range(2)))
    with pytest.raises(UserError, match=message):
        open_splits(HELD, tmp_path, seed=0)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (
            "seg_train/seg_train/sea seg_test/seg_test/sea seg_pred/seg_pred",
            "seg_test, seg_train look like parts of a set",
        ),
        ("train2017 val2017", "train2017, val2017 look like parts"),
        ("TrainImages TestImages other", "TestImages, TrainImages look like parts"),
        (
            "x_images_part_1 x_images_part_2",
            "look like pieces of one set, and not like classes: sort their images into",
        ),
        ("images_001/images images_002/images", "look like pieces"),
        ("jpg segmim", "jpg/ and segmim/ in .* are not taken for classes: rename"),
        ("img masks_machine", "img/ and masks_machine/"),
        (
            "no yes brain/no brain/yes",
            r"brain holds folders that are called as other classes \(no, yes\): remove it if",
        ),
        ("images/Images/cat images/Images/dog", r"only one class \('images'\).* give --data \S+/images/Images$"),
        (
            "train/train/cat train/train/dog val/val/cat val/val/dog",
            r"only one class \('train'\) in .*, move them to \S+",
        ),
        ("Data/all/train/cat Data/all/val/cat", r"train and val lie in .*: give --data \S+/Data/all$"),
    ],
)
def test_folders_that_are_no_classes_are_refused(folders: str, message: str, tmp_path: Path) -> None:
    for folder in folders.split():
        write(tmp_path, *(f"{folder}/{number}.png" for number in range(2)))
    (tmp_path / "docs").mkdir()
    with pytest.raises(UserError, match=message):
        open_splits(HELD, tmp_path, seed=0)


@pytest.mark.parametrize(
    "folders",
    [
        *(
            "train_station test_tube",
            "training_fake training_real",
            "train_日本 test_中国",
            "test_positive test_negative",
        ),
        *("digit_1 digit_2", "class_1 class_2", "part_1 image", "images_1 photos_2", "1 2 3", "data_1 cat"),
        *("mask no_mask", "jpg cat", "segmentation depth", "cat/no/x no yes/x/y", "no/yes/x yes/no/x"),
        *("a/b/x b/a/x", "a/a/x a/b/x b/a/x b/b/x"),
    ],
)
def test_classes_that_are_called_nearly_so_are_read(folders: str, tmp_path: Path) -> None:
    for folder in folders.split():
        write(tmp_path, *(f"{folder}/{number}.png" for number in range(2)))
    expected = {folder.split("/")[0] for folder in folders.split()}
    assert {*open_splits(HELD, tmp_path, seed=0).train.classes} == expected


def test_tar_files_are_refused_as_folders_are(tmp_path: Path) -> None:
    for number, (folders, message) in enumerate(
        [
            (
                "train val",
                "train, val look like parts of a set: give each a tar file of its own, train.tar and val.tar",
            ),
            ("all/train all/test", "test, train look like parts"),
            ("images masks", "images/ and masks/ in .* are not taken for classes"),
            ("data_1 data_2", "look like pieces"),
            ("train_station test_tube", None),
        ]
    ):
        root = write(tmp_path / f"{number}", *(f"x/{folder}/{n}.png" for folder in folders.split() for n in range(2)))
        with tarfile.open(root / "y.tar", "w") as tar:
            tar.add(root / "x", ".")
        if message is None:
            assert len(TarSource(root / "y.tar").classes) == 2
            continue
        with pytest.raises(UserError, match=message):
            TarSource(root / "y.tar")


def test_masks_beside_the_images_of_a_class_are_refused(tmp_path: Path) -> None:
    """Photographs called so, as of people with and without a mask, have more colours than masks."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    for root, pixels in (("masks", np.eye(32, dtype=np.uint8)), ("photos", noise)):
        write(tmp_path / root, *(f"{name}/{n} (1).png" for name in ("ill", "well") for n in range(8)))
        for name in ("0 (1)_mask", "1 (1)_mask", "1 (1)_mask_1"):
            Image.fromarray(pixels).save(tmp_path / root / "ill" / f"{name}.png")
    assert len(open_splits(HELD, tmp_path / "photos", seed=0).train.classes) == 2
    with pytest.raises(UserError, match=r"ill holds masks beside its images \(0 \(1\)_mask.png and so on\): move"):
        open_splits(HELD, tmp_path / "masks", seed=0)
    for n in range(2):
        (tmp_path / "masks" / "ill" / f"{n} (1)_mask.png").unlink()  # one of nine remains
    assert len(open_splits(HELD, tmp_path / "masks", seed=0).train.classes) == 2


def test_the_way_for_shards_in_a_part_works(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(tmp_path / split, "0.png", "1.png")
        with tarfile.open(tmp_path / split / "000.tar", "w") as tar:
            for n in range(2):
                (tmp_path / split / f"{n}.cls").write_text(str(n))
                for ending in ("png", "cls"):
                    tar.add(tmp_path / split / f"{n}.{ending}", f"{n}.{ending}")
                    (tmp_path / split / f"{n}.{ending}").unlink()
    with pytest.raises(UserError, match=r"move them to .* as train-000.tar and so on, and add --set data.source=wds"):
        open_splits(DATA, tmp_path, seed=0)
    for split in ("train", "val"):
        shutil.move(tmp_path / split / "000.tar", tmp_path / f"{split}-000.tar")
    assert len(open_splits(DATA.model_copy(update=dict(source="wds")), tmp_path, seed=0).val) == 2


def test_class_folders_that_all_hold_the_same_are_named(tmp_path: Path) -> None:
    for fold in ("fold1", "fold2"):
        write(tmp_path, *(f"{fold}/{name}.png" for name in ("cat/1", "cat/2", "dog/1", "dog/2")))
    splits = open_splits(HELD, tmp_path, seed=0)
    assert splits.train.classes == ["fold1", "fold2"]
    assert any("all class folders hold cat, dog, and the first folder names" in line for line in remarks(splits))
    write(tmp_path / "office", "a/images/bike/0.png", "a/images/mug/0.png", "b/images/bike/0.png", "b/images/mug/0.png")
    write(tmp_path / "office", "b/images/pen/0.png")
    assert any("hold bike, mug, and" in line for line in remarks(open_splits(HELD, tmp_path / "office", seed=0)))
    write(tmp_path / "years", *(f"{name}.png" for name in ("a/1/0", "a/2/0", "a/3/0", "b/3/0", "b/4/0", "b/5/0")))
    assert not any("all class folders" in line for line in remarks(open_splits(HELD, tmp_path / "years", seed=0)))
    shutil.rmtree(tmp_path / "office")
    shutil.rmtree(tmp_path / "years")
    write(tmp_path, "fold1/0.png")
    assert not any("all class folders" in line for line in remarks(open_splits(HELD, tmp_path, seed=0)))


def test_images_that_come_out_black_are_named(tmp_path: Path) -> None:
    """A camera of 12 bits that stores them as the lowest of 16."""
    for folder, top in (("dark", 4095), ("whole", 65535)):
        for number in range(8):
            values = np.linspace(0, top, 64).reshape(8, 8).astype(np.uint16)
            (place := tmp_path / folder / ("cat", "dog")[number % 2]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(place / f"{number}.png")
    line, none = (
        [line for line in remarks(open_splits(HELD, tmp_path / name, seed=0)) if "16 bits" in line]
        for name in ("dark", "whole")
    )
    assert (
        "6 of 6 images that were looked at have 16 bits and come out nearly black, at most 16 of 255" in line[0]
        and not none
    )


def test_classes_that_differ_in_case_alone_are_said() -> None:
    assert alike(["cat", "dog"]) is None
    said = alike(["Cat", "cat", "a ", "dog"])
    assert said is not None and said.startswith("'Cat' and 'cat' are classes of their own, though they differ in case")
