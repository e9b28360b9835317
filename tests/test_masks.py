"""What the values of masks mean: looked at before the first step, said by the recipe; how masks are named."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from command import run_command
from conv2former.data.images import BadImage
from conv2former.data.rle import decode_mask
from conv2former.data.sources import remarks
from conv2former.errors import UserError
from conv2former.recipes.load import with_settings
from conv2former.tasks.segmentation.config import SegmentationDataSection
from conv2former.tasks.segmentation.folders import open_eval_pairs, open_pairs
from conv2former.tasks.segmentation.task import SegmentationTask
from conv2former.tasks.segmentation.values import canonical, class_values
from scenes import small_segmenter, write_pairs

PAIRS = SegmentationDataSection(source="pairs", val_fraction=0.25)


def write(
    root: Path, mask: np.ndarray, *, classes: str = "background\nobject\n", name: str = "{}.png", parts: str = "."
) -> Path:
    """Images with a mask each."""
    (root / parts / "images").mkdir(parents=True)
    (root / parts / "masks").mkdir()
    for number in range(4):
        Image.new("RGB", mask.shape[1::-1], (90, number, 90)).save(root / parts / "images" / f"{number}.jpg")
        Image.fromarray(mask).save(root / parts / "masks" / name.format(number), quality=95)
    if classes:
        (root / "classes.txt").write_text(classes)
    return root


def grey(*values: int) -> np.ndarray:
    """A mask of equal stripes."""
    return np.repeat(np.array(values, np.uint8), 8)[None].repeat(24, axis=0)


def pasted(message: str) -> SegmentationDataSection:
    """The recipe's data with the option that a message ends with."""
    words = shlex.split(message[message.index("--set") :])
    recipe = small_segmenter("data.source=pairs", "data.val_fraction=0.25")
    return with_settings(recipe, [words[1].replace("CLASS", "object")]).data  # type: ignore[return-value]


def refused(data: SegmentationDataSection, root: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_pairs(data, root, seed=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_masks_of_0_and_255_are_no_training_on_nothing(tmp_path: Path) -> None:
    root = write(tmp_path, grey(0, 255, 0, 0))
    message = refused(PAIRS, root)
    assert "25.0% of the pixels in 4 masks" in message and "class 'background' alone occurs" in message
    data = pasted(message)
    assert data.mask_values == {"0": "background", "255": "object"}
    _, classes = open_pairs(data, root, seed=0).train.load(0)
    assert np.bincount(classes.ravel()).tolist() == [24 * 24, 24 * 8]
    (root / "classes.txt").unlink()
    assert open_pairs(data, root, seed=0).val.classes == ["background", "object"]
    assert open_eval_pairs(data, root, ["object", "background"]).load(0)[1][0, 0] == 1
    recipe = small_segmenter()
    assert with_settings(recipe, ["data.mask_values={0: a, 255: b}"]).digest() != recipe.digest()
    assert with_settings(recipe, ["data.exif=turn", "data.mask_values=null"]).digest() == recipe.digest()


def test_values_that_contradict_the_classes_are_said(tmp_path: Path) -> None:
    root = write(tmp_path / "a", grey(0, 1, 255), classes="a\nb\nc\n")
    line = next(line for line in remarks(open_pairs(PAIRS, root, seed=0)) if "no pixel" in line)
    assert line.startswith(f"class 'c' has no pixel in 4 masks of {root / 'masks'}; ") and "hold 255" in line
    assert pasted(line).mask_values == {"0": "a", "1": "b", "255": "c"}
    root = write(tmp_path / "b", grey(0, 128, 200), classes="a\nb\nc\n")
    values = refused(PAIRS, root)
    assert "hold 0, 128, 200, the 3 classes are 0 to 2" in values
    table = pasted(values)
    assert table.mask_values == {"0": "a", "128": "b", "200": "c"}
    assert set(np.unique(open_pairs(table, root, seed=0).train.load(0)[1])) == {0, 1, 2}
    assert not open_pairs(table, root, seed=0).train.notes
    partial = PAIRS.model_copy(update=dict(mask_values={"0": "a", "128": "b"}))
    assert "it holds 200, which data.mask_values does not name" in refused(partial, root)
    assert "'z', which is none of the classes" in refused(PAIRS.model_copy(update=dict(mask_values={"0": "z"})), root)


def test_masks_in_colour(tmp_path: Path) -> None:
    colours = np.zeros((24, 32, 3), np.uint8)
    colours[:, 8:16], colours[:, 16:] = (255, 0, 0), (0, 0, 255)
    root = write(tmp_path / "a", colours, classes="road\nsky\ncar\n")
    message = refused(PAIRS, root)
    assert "3 colours" in message
    assert "{0 0 0: CLASS, 0 0 255: CLASS, 255 0 0: CLASS}" in message  # nothing says which is which
    for name in ("road", "sky", "car"):
        message = message.replace("CLASS", name, 1)
    data = pasted(message)
    _, classes = open_pairs(data, root, seed=0).train.load(0)
    assert np.bincount(classes.ravel()).tolist() == [24 * 8, 24 * 16, 24 * 8]
    for keys in ("#000000", "(0, 0, 0)", "0,0,0"):
        spelled = SegmentationDataSection(source="pairs", mask_values={keys: "road", "#FF0000": "car", "0 0 255": None})
        assert list(spelled.mask_values or {}) == ["0 0 0", "255 0 0", "0 0 255"]
    palette = Image.fromarray(np.repeat(np.arange(3, dtype=np.uint8), 8)[None].repeat(24, 0), mode="P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
    for file in (root / "masks").iterdir():
        palette.resize((32, 24), Image.Resampling.NEAREST).save(file)
    assert set(np.unique(open_pairs(PAIRS, root, seed=0).train.load(0)[1])) == {0, 1, 2}
    assert set(np.unique(open_pairs(data, root, seed=0).train.load(0)[1])) == {0, 1, 2}
    grey_rgb = write(tmp_path / "b", np.stack([grey(0, 1, 1)] * 3, axis=2))
    assert set(np.unique(open_pairs(PAIRS, grey_rgb, seed=0).train.load(0)[1])) == {0, 1}


@pytest.mark.parametrize("keys", [{}, {"x": "a"}, {"0": "a", "0 0 0": "b"}, {"70000": "a"}, {"0 0 300": "a"}])
def test_tables_that_are_none(keys: dict[str, str]) -> None:
    with pytest.raises(UserError, match="mask_values"):
        small_segmenter(f"data.mask_values={keys}")


@pytest.mark.parametrize("name", ["{}_mask.png", "mask_{}.png", "{}.tiff", "{}-labels.bmp"])
def test_masks_of_other_names(tmp_path: Path, name: str) -> None:
    split = open_pairs(PAIRS, write(tmp_path, grey(0, 1, 0), name=name), seed=0)
    assert all(name.format(pair.image.stem) == pair.labels.name for pair in split.train.pairs)
    assert ("the masks are called" in str(split.train.notes)) == (name != "{}.tiff")


@pytest.mark.parametrize(("image", "mask"), [("image_{}", "mask_{}"), ("{}_sat", "{}_mask"), ("img{}", "{}")])
def test_images_and_masks_of_two_names(tmp_path: Path, image: str, mask: str) -> None:
    root = write(tmp_path, grey(0, 1, 0), name=f"{mask}.png")
    for number in range(4):
        (root / "images" / f"{number}.jpg").rename(root / "images" / f"{image.format(number)}.jpg")
    split = open_pairs(PAIRS, root, seed=0)
    for pair in split.train.pairs:
        number = "".join(filter(str.isdigit, pair.image.stem))
        assert pair.labels.stem == mask.format(number)


def test_masks_of_jpeg_need_a_table_and_take_the_nearest_value(tmp_path: Path) -> None:
    root = write(tmp_path / "a", grey(0, 255, 0, 0), name="{}.jpg")
    message = refused(PAIRS, root)
    assert ".jpg files, whose values are not exact" in message
    _, classes = open_pairs(pasted(message), root, seed=0).train.load(0)
    assert np.bincount(classes.ravel()).tolist() == [24 * 24, 24 * 8]
    wrong = write(tmp_path / "b", grey(0, 1), name="other{}.png")
    (wrong / "masks" / "other3.png").unlink()
    assert "(there: other0.png, other1.png, other2.png)" in refused(PAIRS, wrong)


@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
def test_the_parts_of_pairs(tmp_path: Path, val: str) -> None:
    data = PAIRS.model_copy(update=dict(val_fraction=0.0))
    for part in ("train", val, "test", "more"):
        write(tmp_path / "a", grey(0, 1), parts=part)
    split = open_pairs(data, tmp_path / "a", seed=0)
    assert split.val.name(0) == f"{val}/images/0.jpg" and len(split.train) == len(split.val) == 4
    assert "not read: more, test; evaluate" in remarks(split)[0]
    assert open_eval_pairs(data, tmp_path / "a", split.val.classes, "test").name(0).startswith("test/")
    assert remarks(split)[1].split(";")[0] == "2 classes: background, object"
    for kind in ("images", "masks"):
        for part in ("train", val):
            (tmp_path / "b" / kind).mkdir(parents=True, exist_ok=True)
            (tmp_path / "a" / part / kind).rename(tmp_path / "b" / kind / part)
    (tmp_path / "b" / "classes.txt").write_text("a\nb\n")
    assert open_pairs(data, tmp_path / "b", seed=0).val.name(0) == f"images/{val}/0.jpg"


def test_exif_turns_images_and_not_masks_that_have_none(tmp_path: Path) -> None:
    root = write(tmp_path, grey(0, 1))
    exif = Image.Exif()
    exif[0x112] = 6
    for number in range(4):
        Image.new("RGB", (16, 24)).save(root / "images" / f"{number}.jpg", exif=exif)
    split = open_pairs(PAIRS, root, seed=0)
    assert "4 of 4 images are turned by their EXIF orientation: masks are taken" in remarks(split)[1]
    with pytest.raises(UserError, match=r"16 x 24 pixels, its image 24 x 16; .* add --set data.exif=ignore"):
        split.train.load(0)
    stored = open_pairs(PAIRS.model_copy(update=dict(exif="ignore")), root, seed=0)
    assert stored.train.load(0)[0].size == (16, 24) and len(remarks(stored)) == 2  # the images are all the same
    for number in range(4):  # a mask that has the image's EXIF is turned as well
        Image.fromarray(grey(0, 1)).save(root / "masks" / f"{number}.png", exif=exif)
    assert split.train.load(0)[1].shape == (16, 24)


def test_predicted_masks_have_the_values_of_the_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["ground", "block", "disc"]
    assert class_values(None, names, first=1).tolist() == [1, 2, 3]
    assert class_values(canonical({0: "ground", 7: "disc", 200: "block"}), names).tolist() == [0, 200, 7]
    assert class_values(canonical({0: "ground", 700: "disc", 200: "block"}), names).tolist() == [0, 200, 700]
    assert class_values(canonical({0: "ground", 200: "block"}), names).tolist() == [0, 1, 2]
    assert "has no value for disc: masks are written with numbers of classes" in capsys.readouterr().err
    colours = canonical({"#000000": "ground", "#ff0000": "block", "0 0 255": "disc"})
    assert class_values(colours, names).tolist() == [[0, 0, 0], [255, 0, 0], [0, 0, 255]]

    data = write_pairs(tmp_path / "data")
    image = sorted((data / "images").rglob("*.png"))[0]
    recipe = small_segmenter("data.mask_values={0: ground, 200: block, 100: disc}")
    torch.manual_seed(0)
    task = SegmentationTask.build(recipe, names)
    task.save(tmp_path / "model", state=task.model.state_dict(), note={})
    words = ["predict", str(tmp_path / "model"), str(image), "--masks", str(tmp_path / "masks")]
    assert run_command(monkeypatch, *words) == 0
    (line,) = capsys.readouterr().out.splitlines()
    mask = np.asarray(Image.open(tmp_path / "masks" / f"{image.stem}.png"))
    for row in json.loads(line)["classes"]:
        assert np.array_equal(mask == {"ground": 0, "block": 200, "disc": 100}[row["label"]], decode_mask(row["mask"]))
    assert run_command(monkeypatch, *words) == 1
    assert "1 mask would be replaced" in capsys.readouterr().err
    rows = [*words, "--out-file", str(tmp_path / "rows.jsonl")]
    for _ in range(2):  # a call that is refused leaves nothing behind that the next one would go on with
        assert run_command(monkeypatch, *rows) == 1
        assert "1 mask would be replaced" in capsys.readouterr().err and not (tmp_path / "rows.jsonl").exists()
    several = [*words[:2], *map(str, sorted(image.parent.glob("*.png"))[:3]), "--masks", str(tmp_path / "three")]
    several += ["--out-file", str(tmp_path / "three.jsonl")]
    assert run_command(monkeypatch, *several) == 0
    first, *_ = (tmp_path / "three.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "three.jsonl").write_text(first)  # as if it had been stopped, with the other masks of somebody else
    assert run_command(monkeypatch, *several) == 1
    assert "1 mask would be replaced" in capsys.readouterr().err
    assert run_command(monkeypatch, *words, "--out", str(tmp_path / "masks")) == 1
    assert "--masks and --out are one folder" in capsys.readouterr().err
    assert run_command(monkeypatch, *words[:-1], str(image.parent)) == 1
    assert "masks could replace: give another folder" in capsys.readouterr().err
    assert run_command(monkeypatch, *words[:2], str(image.parent), "--masks", str(image.parent / "masks")) == 1
    assert "lies among the images" in capsys.readouterr().err


CLASSES = "background\na\nb\n"


def replaced(root: Path, ending: str, *masks: Image.Image) -> Path:
    """Masks in the place of those that are there, in turn."""
    for number in range(4):
        (root / "masks" / f"{number}.png").unlink()
        masks[number % len(masks)].save(root / "masks" / f"{number}.{ending}")
    return root


def test_palettes_that_differ_are_colours(tmp_path: Path) -> None:
    """A program that gives each file a palette of its own numbers the colours anew in each."""
    one, two = (Image.fromarray(np.repeat(grey(0, value)[..., None], 3, axis=2)) for value in (100, 200))
    tinted = [Image.composite(image, Image.new("RGB", image.size, "red"), image.convert("L")) for image in (one, two)]
    root = replaced(write(tmp_path / "own", grey(0, 1), classes=CLASSES), "png", *(i.quantize(4) for i in tinted))
    message = refused(PAIRS, root)
    assert "palettes of their own (number 0 is" in message and pasted(message.replace("CLASS", "b")).mask_values
    numbers = PAIRS.model_copy(update=dict(mask_values={"0": "background", "1": "a", "2": "b"}))
    open_pairs(numbers, root, seed=0)  # a table of numbers is the user's word
    fixed = [image.quantize(palette=tinted[0].quantize(4)) for image in tinted]
    open_pairs(PAIRS, replaced(write(tmp_path / "fixed", grey(0, 1), classes=CLASSES), "png", *fixed), seed=0)


def test_gifs_in_grey_hold_values(tmp_path: Path) -> None:
    """Pillow numbers the values of each file anew in its palette."""
    masks = [Image.fromarray(grey(0, value)) for value in (1, 2)]
    source = open_pairs(PAIRS, replaced(write(tmp_path / "a", grey(0, 1), classes=CLASSES), "gif", *masks), seed=0)
    found = {pair.name: set(np.unique(source.train.load(n)[1])) for n, pair in enumerate(source.train.pairs)}
    assert all(classes == {0, 1 + int(Path(name).stem) % 2} for name, classes in found.items())
    many = replaced(
        write(tmp_path / "c", grey(0, 1), classes=CLASSES), "gif", *(i.point(lambda v: 100 * v) for i in masks)
    )
    data = pasted(refused(PAIRS, many))
    assert {*np.unique(open_pairs(data, many, seed=0).train.load(0)[1])} < {0, 1, 2}
    tinted = [
        Image.merge("RGB", [i.point(lambda v: 255 * (v > 0))] * (1 + 2 * k) + [i.point(lambda v: 0)] * (2 - 2 * k))
        for k, i in enumerate(masks)
    ]
    red = replaced(write(tmp_path / "d", grey(0, 1)), "gif", *(i.quantize(2) for i in tinted))
    assert "palettes of their own" in refused(PAIRS, red)
    for path in sorted((red / "masks").iterdir())[:1]:  # whichever is looked at first
        Image.fromarray(grey(0, 1)).save(path)
    assert "palettes of their own" in refused(PAIRS, red)
    black_and_white = replaced(write(tmp_path / "e", grey(0, 1)), "gif", Image.fromarray(grey(0, 255)))
    table = PAIRS.model_copy(update=dict(mask_values={"0": "background", "1": "object"}))  # its numbers, not its greys
    assert set(np.unique(open_pairs(table, black_and_white, seed=0).train.load(0)[1])) == {0, 1}
    ignored = Image.fromarray(grey(0, 1, 255)[:, 4:20])  # whose numbers are 0, 1 and 2
    source = open_pairs(PAIRS, replaced(write(tmp_path / "b", grey(0, 1), classes=CLASSES), "gif", ignored), seed=0)
    assert set(np.unique(source.train.load(0)[1])) == {0, 1, 255} == set(np.unique(source.val.load(0)[1]))


@pytest.mark.parametrize(
    ("mask", "ending", "reason"),
    [
        (Image.fromarray(np.dstack([grey(0, 0)] * 3 + [grey(0, 255)])), "png", "shape in the alpha channel"),
        (Image.fromarray(grey(0, 1).astype(np.float32) / 255), "tif", "classes are whole numbers"),
    ],
)
def test_masks_that_hold_something_else(mask: Image.Image, ending: str, reason: str, tmp_path: Path) -> None:
    source = open_pairs(PAIRS, replaced(write(tmp_path, grey(0, 1)), ending, mask), seed=0)
    with pytest.raises(UserError, match=reason):
        source.train.load(0)


def test_soft_edges(tmp_path: Path) -> None:
    """The setting that the message prints takes the nearest value; numbers with a point may be a little off."""
    root = write(tmp_path / "soft", grey(0, 0, 30, 220, 255, 255))
    message = refused(PAIRS, root)
    assert message.endswith("--set data.mask_nearest=true")
    data = with_settings(
        small_segmenter("data.source=pairs", "data.val_fraction=0.25"), shlex.split(message)[-3::2]
    ).data
    _, classes = open_pairs(data, root, seed=0).train.load(0)  # type: ignore[arg-type]
    assert classes[0].tolist() == [0] * 24 + [1] * 24
    void = data.model_copy(update=dict(mask_values={"0": "background", "1": "object"}))  # type: ignore[union-attr]
    _, classes = open_pairs(void, write(tmp_path / "void", grey(0, 1, 255)), seed=0).train.load(0)  # type: ignore[arg-type]
    assert set(np.unique(classes)) == {0, 1, 255}
    floats = Image.fromarray(grey(0, 1).astype(np.float32) * np.float32(0.9999))
    found = open_pairs(PAIRS, replaced(write(tmp_path / "floats", grey(0, 1)), "tif", floats), seed=0)
    assert set(np.unique(found.train.load(0)[1])) == {0, 1}


def test_masks_that_no_image_has(tmp_path: Path) -> None:
    root = write(tmp_path, grey(0, 1), name="{}_mask.png")
    Image.fromarray(grey(0, 1)).save(root / "masks" / "other_mask.png")
    assert any("1 mask of no image: other_mask.png" in note for note in open_pairs(PAIRS, root, seed=0).train.notes)
    for number in (1, 2):
        Image.fromarray(grey(1, 0)).save(root / "masks" / f"{number}_mask_1.png")
    assert "several masks of one image, 1_mask.png and 1_mask_1.png" in refused(PAIRS, root)
    root = write(tmp_path / "labels", grey(0, 1), name="{}-crack-0.png")
    for path in sorted((root / "masks").iterdir()):
        shutil.copy(path, path.with_name(path.name.replace("crack", "rust")))
    assert "several masks of one image, " in refused(PAIRS, root)
    root = write(tmp_path / "before", grey(0, 1), name="crack_{}.png")
    for path in sorted((root / "masks").iterdir()):
        shutil.copy(path, path.with_name(path.name.replace("crack", "rust")))
    assert "several masks of one image, crack_0.png and rust_0.png" in refused(PAIRS, root)
    for folder in ("images", "masks"):
        (root / folder / "a").mkdir()
        for path in sorted((root / folder).glob("*.*")):
            path.rename(root / folder / "a" / path.name)
    assert "several masks of one image, crack_0.png and rust_0.png" in refused(PAIRS, root)
    root = write(tmp_path / "others", grey(0, 1))  # the masks of another film are no further masks of this one
    for path in sorted((root / "masks").iterdir()):
        shutil.copy(path, path.with_name(f"film2_{path.name}"))
    assert any("4 masks of no image: " in note for note in open_pairs(PAIRS, root, seed=0).train.notes)


def test_masks_of_two_kinds_in_one_folder(tmp_path: Path) -> None:
    """0 and 1 in some, 0 and 255 in others: what is lost there is said. One bit is as the table says, whatever tool."""
    root = write(tmp_path, grey(0, 1), classes="background\ncrack\n")
    paths = sorted((root / "masks").iterdir())
    for path in paths[::2]:
        Image.fromarray(grey(0, 255)).save(path)
    said = open_pairs(PAIRS, root, seed=0).train.notes
    assert any("hold 0 and 255 alone, others hold classes" in line for line in said)
    numbers = PAIRS.model_copy(update=dict(mask_values={"0": "background", "1": "crack"}))
    said = open_pairs(numbers, root, seed=0).train.notes
    assert any("hold 0 and 255 alone, others hold classes" in line for line in said)
    for path in paths[::2]:
        Image.fromarray(grey(0, 255)).convert("1").save(path)
    for path in paths[1::2]:
        Image.fromarray(grey(0, 255)).save(path)
    table = PAIRS.model_copy(update=dict(mask_values={"0": "background", "255": "crack"}))
    source = open_pairs(table, root, seed=0).train
    assert all(set(np.unique(source.load(index)[1])) == {0, 1} for index in range(len(source)))


def test_masks_of_an_evaluation_are_looked_at(tmp_path: Path) -> None:
    """A model of 0 and 1 on masks of 0 and 255 counts the background alone, and its figures look perfect."""
    root = write(tmp_path / "a", grey(0, 255), classes="")
    with pytest.raises(UserError, match="hold 255, which means no class, and class 'background' alone occurs"):
        open_eval_pairs(PAIRS, root, ["background", "object"])
    table = PAIRS.model_copy(update=dict(mask_values={"0": "background", "255": "object"}))
    source = open_eval_pairs(table, write(tmp_path / "b", grey(0, 1), classes=""), ["background", "object"])
    with pytest.raises(BadImage, match=r"it holds 1, which data.mask_values does not name: [^:]*\)$"):
        source.load(0)  # the nearest value is not proposed: all would be background
    one_class = write(tmp_path / "c", grey(1, 255), classes="")  # an evaluation of one class beside what is ignored
    assert len(open_eval_pairs(PAIRS, one_class, ["background", "object"])) == 4


def test_tables_for_numbers_name_them_all(tmp_path: Path) -> None:
    message = refused(PAIRS, write(tmp_path, grey(0, 1, 2, 3, 4)))
    assert "{0: CLASS, 1: CLASS, 2: CLASS, 3: CLASS, 4: CLASS}" in message and "nearest" not in message


@pytest.mark.parametrize("text", ["# names\nroad\ncar\n", "1 car\n0 road\n", "id,name\n0,road\n1,car\n"])
def test_what_is_more_than_names_is_refused(tmp_path: Path, text: str) -> None:
    root = write(tmp_path, grey(0, 1), classes=text)
    assert "leave the names alone in it" in refused(PAIRS, root)
    for names in (["1 euro", "2 euro"], ["16:9", "4:3"], ["#ff0000", "#00ff00"], ["2,4-D", "3,5-T"]):
        (root / "classes.txt").write_text("\n".join(names))
        assert open_pairs(PAIRS, root, seed=0).train.classes == names


def test_a_mask_of_several_pages_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path, grey(0, 1))
    source = open_pairs(PAIRS, root, seed=0).train
    file = source.pairs[0].labels
    Image.fromarray(grey(0, 1)).save(file, "TIFF", save_all=True, append_images=[Image.fromarray(grey(1, 0))])
    with pytest.raises(BadImage, match="it has 2 pages or frames: a mask is one image"):
        source.load(0)
    Image.fromarray(grey(0, 1)).save(file, "TIFF", save_all=True, append_images=[Image.fromarray(grey(0))])
    assert set(np.unique(source.load(0)[1])) == {0, 1}  # a smaller page is an overview


def test_numbers_beyond_the_classes_are_no_soft_edges(tmp_path: Path) -> None:
    """All values of data sets with more classes than are named: an error to be pasted, and nothing merged by it."""
    names = "".join(f"class {number}\n" for number in range(19))
    city = write(tmp_path / "city", np.arange(64, dtype=np.uint8).reshape(8, 8) % 34, classes=names)
    with pytest.raises(UserError, match=r"hold 0, 1, 2, 3, 4 and 29 more, the 19 classes are 0 to 18"):
        open_pairs(PAIRS, city, seed=0)
    wide = np.array([[0, 1, 1000] * 4] * 8, np.uint16)
    with pytest.raises(UserError, match=r"hold 0, 1, 1000") as caught:
        open_pairs(PAIRS, write(tmp_path / "wide", wide), seed=0)
    assert "mask_nearest" not in str(caught.value)
