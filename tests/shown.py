"""The commands that the documents show, and the small files that stand in for those that they name."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import typer.main

import conv2former_cli
from authors import authors_state_dict
from conv2former.checkpoints import convert, save_pretrained
from conv2former.engine.train import train
from conv2former.recipes import load_recipe, recipe_names
from conv2former.recipes.load import parse_yaml
from conv2former.tools.samples import write_samples
from digits import one_picture, tiny_recipe, write_digits
from runs import stopped_run
from scenes import scene, small_detector, small_segmenter, write_ade20k, write_coco, write_pairs

CLASSES = ("cat", "dog")  # as the documents call them
ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
# stand for documents: the examples of --help, and the commands that recipes say they are run by
HELP, CLAIMS = "--help", "recipes"
COMMENT = re.compile(r"(?:^|\s)#\s?(?P<text>.*)$")
INLINE = re.compile(r"`((?:conv2former|make|python|pytest) [^`]*[ =./][^`]*|make [^`]+)`")
EXAMPLE = re.compile(r"Example: (conv2former .+)")
MARK = re.compile(r"\bneeds: (?P<what>\S.*)$")


@dataclass(frozen=True)
class Shown:
    """A command of a document.

    Attributes:
        document: Where it stands.
        text: Without its comment, on one line.
        needs: What it needs that an ordinary machine lacks; empty if nothing.
    """

    document: str
    text: str
    needs: str = ""

    @property
    def words(self) -> list[str]:
        """As a shell splits it."""
        return shlex.split(self.text)


def shown_commands() -> list[Shown]:
    """All of them, in order; of those of --help and of the recipes the ones that no document shows."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```sh\n(.*?)```", document.read_text(), re.S):
            found += list(_read_block(str(document.relative_to(ROOT)), block))
    known = {command.text for command in found}
    examples = [example for command in programs().values() for example in EXAMPLE.findall(command.help or "")]
    found += [Shown(HELP, example) for example in examples if example not in known]
    claims = [load_recipe(name).claim for name in recipe_names()]
    needs = {claim.command: claim.hardware if "GPU" in claim.hardware else "" for claim in claims}
    return [*found, *(Shown(CLAIMS, *pair) for pair in needs.items() if pair[0] not in known)]


def programs(group: Any = None, *above: str) -> dict[tuple[str, ...], Any]:
    """All commands of the program by their words, those of groups included."""
    group = group or typer.main.get_command(conv2former_cli.app)
    found: dict[tuple[str, ...], Any] = {}
    for name, command in group.commands.items():
        found |= programs(command, *above, name) if hasattr(command, "commands") else {(*above, name): command}
    return found


def commands_in_the_text() -> list[Shown]:
    """Those between backticks that say more than a program's or a command's name; the log's are history."""
    found = []
    for document in DOCUMENTS:
        if document.name != "log.md":
            text = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
            found += [Shown(document.name, " ".join(words.split())) for words in INLINE.findall(text)]
    return found


def _read_block(document: str, block: str) -> Iterator[Shown]:
    """A mark stands behind a command, or above it and then goes for all to the next empty line."""
    above = ""
    for line in block.replace("\\\n", " ").splitlines():
        comment = COMMENT.search(line)
        mark = MARK.search(comment["text"]) if comment else None
        text = " ".join(line[: comment.start() if comment else None].split())
        if text:
            assert shlex.split(text) == shlex.split(line, comments=True), f"{document}: {line}"
            yield Shown(document, text, mark["what"] if mark else above)
        elif mark or not comment:
            above = mark["what"] if mark else ""


def write_own_recipes(root: Path) -> None:
    """The YAML blocks of the documents as files, which the commands name."""
    for document in DOCUMENTS:
        for block in re.findall(r"```yaml\n(.*?)```", document.read_text(), re.S):
            (root / f"{parse_yaml(block)['name']}.yaml").write_text(block)


def write_files(root: Path, *, runs: bool = True) -> None:
    """Small forms of the data, images, checkpoints and runs that the documents name.

    The last two take some ten seconds, and are left out without ``runs``.
    """
    write_own_recipes(root)
    for name in ("benchmarks", "examples", "tests", "Makefile", "constraints.txt"):
        (root / name).symlink_to(ROOT / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    _write_data(root)
    if runs:
        _write_checkpoints(root)
        _write_runs(root)


def _write_data(root: Path) -> None:
    write_digits(root / "cifar10", classes=2, train=8, val=4)
    for name in ("photos", "other_photos", "DIR"):  # class folders
        write_digits(root / name, classes=2, train=4, val=1)
    for name in ("cifar10", "photos", "other_photos", "DIR"):
        for split in ("train", "val"):
            for old, new in zip(("digit-0", "digit-1"), CLASSES, strict=True):
                (root / name / split / old).rename(root / name / split / new)
    for name in ("photos", "DIR"):  # and images with masks
        write_pairs(root / name, count=3)
    write_ade20k(root / "camvid", train=2, val=1)
    (root / "camvid" / "objectInfo150.txt").unlink()
    (root / "camvid" / "classes.txt").write_text("Car\nRoad\nSky\n")
    for name in ("coco", "DIR"):
        write_coco(root / name, train=3, val=1)
    for name, split in (("train", "train2017"), ("val", "val2017")):
        rows = json.loads((root / "coco" / "annotations" / f"instances_{split}.json").read_text())
        for row in rows["images"]:
            row["file_name"] = f"{CLASSES[0]}/{row['file_name']}"
        for photos in (root / "photos", root / "other_photos"):
            shutil.copytree(root / "coco" / split, photos / name / CLASSES[0], dirs_exist_ok=True)
            (photos / f"{name}.json").write_text(json.dumps(rows))
    for kind, name in (("classification", "parts"), ("segmentation", "cracks"), ("detection", "bench")):
        write_samples(kind, root / "data" / name, count=10)
    shutil.copytree(root / "coco" / "val2017", root / "coco" / "test")
    shutil.copy(root / "coco" / "annotations" / "instances_val2017.json", root / "coco" / "test.json")
    for number, name in enumerate(("holiday", "new_photos", "few_photos", "street")):
        (root / name).mkdir()
        for index in range(2):
            scene(10 * number + index)[0].save(root / name / f"{index}.jpg")
    for number, name in enumerate(("photo.jpg", "street.jpg", "photos/buses.jpg", "photos/rider.jpg")):
        scene(number)[0].save(root / name)
    (root / "imagenet_shards").mkdir()
    (root / "imagenet_shards" / "classes.txt").write_text("\n".join(CLASSES))
    with tarfile.open(root / "imagenet_shards" / "val-0000.tar", "w") as shard:
        picture = one_picture(root / "one.png").read_bytes()
        for number in range(2):
            for ending, content in (("png", picture), ("cls", str(number).encode())):
                entry = tarfile.TarInfo(f"{number}.{ending}")
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))


def _write_checkpoints(root: Path) -> None:
    authors = root / "authors_t.pth.tar"
    torch.save(authors_state_dict(timm.create_model("conv2former_t").state_dict()), authors)
    (root / "conv2former_t.pth.tar").symlink_to(authors.name)
    convert(authors, root / "weights" / "t", model="conv2former_t")
    save_pretrained(timm.create_model("resnet50"), root / "weights" / "resnet50")
    save_pretrained(timm.create_model("conv2former_test"), root / "WEIGHTS")


def _write_runs(root: Path) -> None:
    runs = root / "runs"
    # recipe cifar's network, but narrow
    atto = ["model.name=conv2former_atto", "model.args={stem_stride: 2, dims: [8, 8, 8, 8], depths: [1, 1, 1, 1]}"]
    args = ["schedule.epochs=2", "schedule.warmup_epochs=0", "optim.batch_size=4", "data.input_size=32"]
    train(tiny_recipe(*atto, *args), data=root / "cifar10", out=runs / "cifar")
    with pytest.MonkeyPatch.context() as patch:  # the run that training.md goes on with
        stopped_run(tiny_recipe(*atto, *args), root / "cifar10", runs / "t", patch, step=6)
    short = ["schedule.epochs=1", "schedule.warmup_epochs=0", "data.workers=0", "engine.accelerator=cpu"]
    train(load_recipe("quickstart", overrides=short), data=None, out=runs / "quickstart")
    train(small_detector("schedule.epochs=1"), data=root / "coco", out=runs / "objects")
    train(small_segmenter("schedule.epochs=1"), data=root / "photos", out=runs / "regions")
    as_ade20k = ("data.source=ade20k", "data.reduce_zero_label=true", "schedule.epochs=1")
    train(small_segmenter(*as_ade20k), data=root / "camvid", out=runs / "camvid")
    for run, others in (
        ("cifar", ("other", "convnext_tiny", "photos")),
        ("objects", ("detector", "coco_mask_rcnn_t")),
        ("regions", ("ade20k_upernet_t",)),
        ("camvid", ("camvid_conv2former", "camvid_convnext")),
    ):
        for other in others:
            shutil.copytree(runs / run, runs / other)


def copied(files: Path, root: Path) -> Path:
    """The files once more, to be changed; what is large and only read is linked."""
    shutil.copytree(files, root, symlinks=True, dirs_exist_ok=True, copy_function=_copy)
    return root


def _copy(source: str, target: str) -> None:
    if source.endswith((".pth.tar", ".safetensors")):
        os.link(source, target)
    else:
        shutil.copy2(source, target, follow_symlinks=False)
