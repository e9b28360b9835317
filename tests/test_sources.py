"""Every kind of source gives the same images as the folder they were packed from, in any process; what is refused."""

from __future__ import annotations

import io
import json
import multiprocessing
import pickle
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from conv2former.data.images import BadImage
from conv2former.data.sources import plain_names, remarks
from conv2former.engine.train import train
from conv2former.errors import UserError
from conv2former.tasks.classification.archives import ShardSource, TarSource
from conv2former.tasks.classification.layouts import open_eval_source, open_splits
from conv2former.tasks.classification.sources import FolderSource, HfdsSource, ImageSource
from digits import one_picture, tiny_recipe, write_digits

CLASSES = [f"digit-{i}" for i in range(4)]
SPLITS = ("train", "val")
KINDS = dict(tar="tar", tar_per_class="tar", tar_of_tars="tar", wds="wds", wds_json="wds", imagefolder="hfds")
KINDS["parquet"] = "hfds"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "huggingface"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"), train=8, val=2)


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that packs the folder in one way, once."""
    root = tmp_path_factory.mktemp("packed")

    def pack(kind: str) -> Path:
        out = root / kind
        if kind == "imagefolder":
            return folder
        if not out.exists():
            out.mkdir()
            for split in SPLITS:
                globals()[f"pack_{kind}"](folder / split, out, split)
        return out

    return pack


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def pack_tar(source: Path, out: Path, split: str) -> None:
    """As `tar cf` in the folder itself does, with a hidden file of macOS's."""
    with tarfile.open(out / f"{split}.tar", "w") as tar:
        tar.add(source, ".")
        add(tar, "./digit-1/._0001.png", b"x")


def pack_tar_per_class(source: Path, out: Path, split: str) -> None:
    (out / split).mkdir()
    for name in CLASSES:
        with tarfile.open(out / split / f"{name}.tar", "w") as tar:
            tar.add(source / name, ".")


def pack_tar_of_tars(source: Path, out: Path, split: str) -> None:
    """As ILSVRC2012_img_train.tar."""
    with tarfile.open(out / f"{split}.tar", "w") as tar:
        for name in CLASSES:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as part:
                part.add(source / name, ".")
            add(tar, f"{name}.tar", inner.getvalue())


def pack_wds(source: Path, out: Path, split: str) -> None:
    """Two shards named as timm's, with numbers and a list of names."""
    (out / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    word = {"train": "imagenet1k-train", "val": "imagenet1k-validation"}[split]
    for number in range(2):
        with tarfile.open(out / f"{word}-{number}.tar", "w") as tar:
            for label in (2 * number, 2 * number + 1):
                for image in sorted((source / CLASSES[label]).iterdir()):
                    add(tar, f"{image.stem}.png", image.read_bytes())
                    add(tar, f"{image.stem}.cls", f"{label}\n".encode())
                    add(tar, f"{image.stem}.json", b"{}")


def pack_wds_json(source: Path, out: Path, split: str) -> None:
    with tarfile.open(out / f"{split}-000000.tar", "w") as tar:
        for image in sorted(source.glob("*/*")):
            add(tar, f"a/{image.stem}.json", json.dumps({"label": image.parent.name}).encode())
            add(tar, f"a/{image.stem}.PNG", image.read_bytes())


def pack_parquet(source: Path, out: Path, split: str) -> None:
    images = sorted(source.glob("*/*"))
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=CLASSES))
    columns = dict(
        image=[dict(bytes=image.read_bytes(), path=None) for image in images],
        label=[CLASSES.index(image.parent.name) for image in images],
    )
    datasets.Dataset.from_dict(columns, features=features).to_parquet(out / f"{split}-00000-of-00001.parquet")


def pixels(source: ImageSource) -> np.ndarray:
    return np.stack([np.asarray(source.load(index)) for index in range(len(source))])


@pytest.mark.parametrize("layout", KINDS)
def test_it_gives_the_images_of_the_folder(folder: Path, packed: Callable[[str], Path], layout: str) -> None:
    root = packed(layout)
    splits = open_splits(tiny_recipe(f"data.source={KINDS[layout]}").data, root, seed=0)
    for split, source in zip(SPLITS, (splits.train, splits.val), strict=True):
        reference = FolderSource(folder / split)
        assert source.classes == reference.classes and source.targets == reference.targets
        assert np.array_equal(pixels(source), pixels(reference))
        assert len({source.name(index) for index in range(len(source))}) == len(source)
        assert np.array_equal(pixels(pickle.loads(pickle.dumps(source))), pixels(source))
    assert splits.digest() == open_splits(tiny_recipe(f"data.source={KINDS[layout]}").data, root, seed=0).digest()
    if KINDS[layout] == "tar":
        assert splits.digest() == open_splits(tiny_recipe().data, folder, seed=0).digest()
    evaluated = open_eval_source(root, CLASSES[::-1], kind=KINDS[layout])
    assert evaluated.targets == [3 - target for target in splits.val.targets]


@pytest.mark.parametrize(
    "layout",
    [  # what is read from each is compared above
        "wds",
        *(
            pytest.param(layout, marks=pytest.mark.slow)
            for layout in ("parquet", "tar", "tar_per_class", "imagefolder")
        ),
    ],
)
@pytest.mark.usefixtures("quick")
def test_it_trains(packed: Callable[[str], Path], tmp_path: Path, layout: str) -> None:
    settings = ["schedule.epochs=1", "schedule.warmup_epochs=0", "data.workers=2", "model.name=conv2former_test"]
    recipe = tiny_recipe(f"data.source={KINDS[layout]}", *settings, "model.args={}", "data.input_size=32")
    evaluation = train(recipe, data=packed(layout), out=tmp_path / "run")
    assert evaluation is not None and evaluation.details["images"] == 8


@pytest.mark.parametrize("layout", ["tar_per_class", "wds", "parquet"])
def test_forked_processes_read_at_once(packed: Callable[[str], Path], layout: str) -> None:
    """The set has been read from before the fork, so that open files are inherited."""
    global shared
    source = open_splits(tiny_recipe(f"data.source={KINDS[layout]}").data, packed(layout), seed=0).train
    shared, expected = source, pixels(source)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        again = pool.map(pixel_sum, [index for _ in range(8) for index in range(len(source))], chunksize=1)
    assert again == [int(image.sum()) for image in expected] * 8


shared: ImageSource


def pixel_sum(index: int) -> int:
    return int(np.asarray(shared.load(index)).sum())


def test_more_tar_files_than_may_stay_open(packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conv2former.tasks.classification.archives.MAX_OPEN", 2)
    source = TarSource(packed("tar_per_class") / "train")
    order = [index for start in range(8) for index in range(start, 32, 8)]
    assert [source.load(index).size for index in order] == [(8, 8)] * 32
    assert len(source._open) == 2


@pytest.mark.parametrize(
    ("kind", "layout", "part"), [("tar", "tar_per_class", "train"), ("wds", "wds", ""), ("hfds", "parquet", "")]
)
def test_a_share_is_held_out_where_there_is_no_validation_set(
    packed: Callable[[str], Path], tmp_path: Path, kind: str, layout: str, part: str
) -> None:
    for file in (packed(layout) / part).iterdir():
        if "val" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    splits = open_splits(tiny_recipe(f"data.source={kind}").data, tmp_path, seed=0)
    assert (len(splits.train), len(splits.val)) == (24, 8) and splits.val.targets == [0, 0, 1, 1, 2, 2, 3, 3]
    if kind != "tar":  # one set of tar files without a name can be evaluated on
        with pytest.raises(UserError, match="and no "):
            open_eval_source(tmp_path, CLASSES, kind=kind)
        with pytest.raises(UserError, match=r"no .*data.val_fraction=0.1"):
            open_splits(tiny_recipe(f"data.source={kind}", "data.val_fraction=0").data, tmp_path, seed=0)


def test_numbers_without_names_are_the_classes(packed: Callable[[str], Path], tmp_path: Path) -> None:
    """Some may have no validation image; a class that is validated must be trained."""
    for file in packed("wds").glob("*.tar"):
        if file.name != "imagenet1k-validation-0.tar":
            (tmp_path / file.name).symlink_to(file)
    splits = open_splits(tiny_recipe("data.source=wds").data, tmp_path, seed=0)
    assert splits.train.classes == splits.val.classes == ["0", "1", "2", "3"]
    assert splits.val.targets == [2, 2, 3, 3]
    (tmp_path / "imagenet1k-train-1.tar").unlink()
    with pytest.raises(UserError, match="only in val: 2, 3"):
        open_splits(tiny_recipe("data.source=wds").data, tmp_path, seed=0)


def picture(tmp_path: Path) -> bytes:
    return one_picture(tmp_path / "picture.png").read_bytes()


def test_a_broken_image_is_told_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a/1.png", "b/2.png"):
            add(tar, name, picture(tmp_path)[:60])
        add(tar, "b/3.png", b"")
    source = TarSource(path)
    for index, reason in enumerate(("damaged", "damaged", "empty")):
        with pytest.raises(BadImage, match=f"{path}/{source.name(index)}: it is .*{reason}"):
            source.load(index)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(BadImage, match="shorter"):
        source.load(1)
    path.unlink()
    with pytest.raises(BadImage, match="No such file"):
        TarSource.load(pickle.loads(pickle.dumps(source)), 0)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1700])


def end_between_members(path: Path) -> None:
    with tarfile.open(path) as tar:
        start = tar.getmembers()[3].offset
    path.write_bytes(path.read_bytes()[:start])


def overwrite_a_header(path: Path) -> None:
    with tarfile.open(path) as tar:
        start = tar.getmembers()[3].offset
    content = bytearray(path.read_bytes())
    content[start : start + 512] = b"\xff" * 512
    path.write_bytes(content)


def compress(path: Path) -> None:
    import gzip

    path.write_bytes(gzip.compress(path.read_bytes()))


@pytest.mark.parametrize(
    "spoil", [cut, end_between_members, overwrite_a_header, compress, lambda p: p.write_bytes(b"")]
)
@pytest.mark.parametrize("open_source", [TarSource, lambda path: ShardSource(path.parent, [path])])
def test_a_damaged_tar_file_is_refused(tmp_path: Path, spoil: Callable, open_source: Callable) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(4):
            add(tar, f"a/{number}.png", picture(tmp_path))
            add(tar, f"a/{number}.cls", b"1")
    open_source(path)
    spoil(path)
    with pytest.raises(UserError, match=r"a\.tar .*(uncompressed tar file|cut short)") as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("members", "tar", "wds"),
    [
        ({}, "no images in .*a.tar", "no images in .*a.tar: an empty shard"),
        ({"1.txt": "x"}, "no images in .*a.tar", "no images in .*a.tar"),
        ({"1.png": ""}, "1.png in .* lies in no class folder", "image 1.png in .*a.tar has no class: a .cls file"),
        ({"a/1.png": "", "./a/1.png": ""}, "a.tar holds a/1.png twice", "sample 'a/1' .* has two image files"),
        ({"1.a.png": "", "1.b.png": "", "1.cls": "1"}, "no class folder", "'1' .* two image files .*first dot"),
        ({"1.cls": "1"}, "no images", "sample '1' in .*a.tar has a class and no image"),
        ({"1.png": "", "1.cls": "-1"}, "no class folder", "1.png .* no class: its .cls file gives no number"),
        ({"1.png": "", "1.json": "[1]"}, "no class folder", "1.png .* no class: its .json file gives no number"),
        ({"1.png": "", "1.json": "{"}, "no class folder", "1.png .* no class: its .json file"),
    ],
)
def test_what_is_refused_in_a_tar_file(tmp_path: Path, members: dict[str, str], tar: str, wds: str) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            add(archive, name, content.encode())
    with pytest.raises(UserError, match=tar):
        TarSource(path)
    with pytest.raises(UserError, match=wds):
        ShardSource(tmp_path)


def test_links_in_shards_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("1.png")
        info.type, info.linkname = tarfile.SYMTYPE, "2.png"
        tar.addfile(info)
    with pytest.raises(UserError, match=r"1.png in .*a.tar is a link"):
        ShardSource(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("a\nb\na\n", "names 'a' twice"),
        ("\n", "is empty"),
        ("a\nb\n", "class 2 of a shard .* none of the 2 in classes"),
    ],
)
def test_lists_of_names_that_do_not_fit(
    packed: Callable[[str], Path], tmp_path: Path, names: str, message: str
) -> None:
    for file in packed("wds").glob("*.tar"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "classes.txt").write_text(names)
    with pytest.raises(UserError, match=message):
        ShardSource(tmp_path)


@pytest.mark.parametrize(("layout", "kind"), [("tar", "tar"), ("tar_per_class", "tar"), ("wds", "wds")])
def test_tar_files_in_place_of_folders_tell_the_setting(packed: Callable[[str], Path], layout: str, kind: str) -> None:
    with pytest.raises(UserError, match=f"no class folders: read them with --set data.source={kind}"):
        open_splits(tiny_recipe().data, packed(layout), seed=0)
    with pytest.raises(UserError, match=f"--set data.source={kind}"):
        open_eval_source(packed(layout), CLASSES)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("tar", "no tar files in .*train: class folders are read with --set data.source=folder"),
        ("wds", "no webdataset shards .* in .*"),
    ],
)
def test_folders_in_place_of_tar_files(folder: Path, kind: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_splits(tiny_recipe(f"data.source={kind}").data, folder, seed=0)
    with pytest.raises(UserError, match="no such folder"):
        open_splits(tiny_recipe(f"data.source={kind}").data, folder / "absent", seed=0)


def write_parquet(path: Path, **columns: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(path)
    return path.parent


def test_what_is_refused_of_a_hugging_face_dataset(packed: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Unknown split"):
        HfdsSource(packed("parquet"), "absent")
    image = dict(bytes=picture(tmp_path), path="x.png")
    secret = write_parquet(tmp_path / "secret" / "test.parquet", image=[image, image], label=[-1, -1])
    with pytest.raises(UserError, match="images without a class"):
        HfdsSource(secret, "test")
    other = write_parquet(tmp_path / "other" / "train.parquet", img=[image, image], label=[0, 1])
    with pytest.raises(UserError, match="must have the columns image and label"):
        HfdsSource(other, "train")
    broken = HfdsSource(
        write_parquet(
            tmp_path / "broken" / "train.parquet", image=[dict(bytes=b"GIF", path=None)] * 2, label=["b", "a"]
        ),
        "train",
    )
    assert (broken.classes, broken.targets, broken.name(1)) == (["a", "b"], [1, 0], "train/00000001-image")
    with pytest.raises(BadImage, match="cannot read train/00000001-image of"):
        broken.load(1)
    with pytest.raises(UserError, match="as a Hugging Face dataset"):
        open_eval_source(Path("somebody/nothing"), CLASSES, kind="hfds")
    with pytest.raises(UserError, match="no such folder"):
        open_eval_source(tmp_path / "absent", CLASSES, kind="hfds")


def test_without_the_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install datasets"):
        open_splits(tiny_recipe("data.source=hfds").data, folder, seed=0)


def test_folders_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: "digit-2" not in str(path))  # root may read everything
    with pytest.raises(UserError, match=r"may not be read: .*train/digit-2: change their permissions"):
        FolderSource(folder / "train")


@pytest.mark.parametrize(
    "text", ["__ignore__\n_background_\ncrack\n", "name,r,g,b\nroad,1,2,3\ncar,4,5,6\n", "- road\n- car\n"]
)
def test_lists_that_hold_more_than_names_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds more than names"):
        plain_names(text.split("\n")[:-1], tmp_path / "classes.txt")
    plain = ["road 66", "route 1, 2, 3", "a-b", "-"]
    assert plain_names(plain, tmp_path / "classes.txt") == plain


def test_versions_of_a_photo_in_both_parts_are_said(tmp_path: Path) -> None:
    names = [f"{name}/photo{n}_jpg.rf.{v}.png" for name in ("cat", "dog") for n in range(3) for v in "abc"]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name)
    splits = open_splits(tiny_recipe().data.model_copy(update=dict(val_fraction=0.3)), tmp_path, seed=0)
    assert any(line.startswith("versions of") and "are trained on" in line for line in remarks(splits))


def test_training_images_of_two_classes_are_said(tmp_path: Path) -> None:
    for number in range(8):
        for name in ("cat", "dog"):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (number, len(name) + 20 * (name == "dog") * (number > 1), 0)).save(
                tmp_path / name / f"{number}.png"
            )
    splits = open_splits(tiny_recipe().data.model_copy(update=dict(val_fraction=0.2)), tmp_path, seed=0)
    said = [line for line in remarks(splits) if "in two classes" in line]
    assert len(said) == 1 and said[0].endswith("keep each in one")
