"""What a model is: for the title of the page, its examples, and the lines of Python that do the same."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageNetInfo

from conv2former.checkpoints.hub import CARD_FILE, RUN_FOLDERS, find_model
from conv2former.data.images import BadImage, decode, find_images
from conv2former.engine.run_dir import RunDir
from conv2former.errors import UserError, printable, some
from conv2former.files import parse_yaml, read_within
from conv2former.tasks.base import Task
from conv2former.tools.naming import read_name

CLASSES = 5  # that the title names
EXAMPLES, EXAMPLE_SIDE, EXAMPLE_BYTES = 8, 512, 20_000_000
PIXELS = 96  # images up to this side are kept exactly, and shown with their pixels visible
SYNSET = re.compile(r"n\d{8}")  # ImageNet's label of a class


@dataclass(frozen=True)
class About:
    """What is known of a model.

    Attributes:
        facts: Task, network, classes, data and metrics, in a few words each.
        random: Whether its weights are random.
        examples: Names and data URLs of images that its run keeps.
    """

    facts: list[str]
    random: bool
    examples: list[tuple[str, str]]


def about(task: Task, source: Path | str, *, random: bool) -> About:
    """A model that was read from ``source``, a path or timm's name; files that are missing or damaged say nothing."""
    classes = [readable(label) for label in task.classes]
    facts = [task.name.capitalize(), _network(task)]
    if len(classes) > 1:
        facts.append(f"{len(classes)} classes: {some(classes, CLASSES)}")
    examples: list[tuple[str, str]] = []
    if isinstance(source, Path):
        folder = None
        with contextlib.suppress(UserError):  # an exported file has no folder of its own
            folder, _ = find_model(source)
        run = RunDir(folder.parent) if folder and folder.name in RUN_FOLDERS else None
        if run and run.exists():
            facts += _of_run(run, task, best=folder is not None and folder.name == "best")
            examples = _examples(run.path / "samples")
        elif folder:
            facts += _of_card(folder / CARD_FILE)
    elif not random:
        facts.append("weights from timm")
    return About(facts, random, examples)


def _network(task: Task) -> str:
    config = getattr(task.backbone, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(task.backbone).__name__)


def _of_run(run: RunDir, task: Task, *, best: bool) -> list[str]:
    """Data and metrics; those of the report are the best weights'."""
    found = []
    with contextlib.suppress(UserError):
        facts = run.facts()
        data = Path(str(facts["data"])).name if facts.get("data") else getattr(run.recipe().data, "source", "its data")
        images = facts.get("images", {})
        count = f"{images['train']:,} images of " if "train" in images else ""
        found.append(f"trained on {count}{data}")
        on = f" on {images['val']:,} validation images" if "val" in images else ""
        metrics = [_metric(metric.title, value) for metric, value in run.recorded(task.reported)] if best else []
        found += [", ".join(metrics) + on] if metrics else []
    return found


def _metric(title: str, value: float) -> str:
    """In a card a title ends with its unit, as in "top-1, %"."""
    name, comma, unit = title.rpartition(", ")
    return f"{name} {value:.1f}{unit}" if comma else f"{title} {value:.1f}"


def _of_card(path: Path) -> list[str]:
    """The same from a model card's front matter, in the Hugging Face layout; whatever else it holds is passed over."""
    try:
        front = parse_yaml(read_within(path).decode().split("---\n")[1])
        results = front["model-index"][0]["results"]
        data = str(results[0]["dataset"]["name"])
        metrics = [metric for result in results for metric in result["metrics"]]
        words = [_metric(str(metric["name"]), float(metric["value"])) for metric in metrics]
        return [f"trained on {data}", ", ".join(words)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []


def _examples(folder: Path) -> list[tuple[str, str]]:
    """Images of a folder; a link that leads out of it is passed over, because the page would show what lies there."""
    found: list[tuple[str, str]] = []
    for file in find_images([folder]) if folder.is_dir() else []:
        with contextlib.suppress(OSError, BadImage):
            if file.resolve().is_relative_to(folder.resolve()) and file.stat().st_size <= EXAMPLE_BYTES:
                found.append((printable(file.name), data_url(decode(file.read_bytes()), EXAMPLE_SIDE)))
        if len(found) == EXAMPLES:
            break
    return found


def data_url(image: Image.Image, side: int) -> str:
    """An image of at most ``side`` pixels as a data URL: exact where it is small, else as JPEG."""
    shown, stream = image.copy(), io.BytesIO()
    shown.thumbnail((side, side))
    coding = "png" if max(shown.size) <= PIXELS else "jpeg"
    shown.save(stream, coding, quality=88)
    return f"data:image/{coding};base64,{base64.b64encode(stream.getvalue()).decode()}"


@functools.cache
def _imagenet() -> ImageNetInfo:
    return ImageNetInfo()  # it knows the words of all of ImageNet's classes, not of its 1000 alone


def readable(label: str) -> str:
    """A class's name; for an ImageNet id such as n01440764 the first of its words, "tench"."""
    if SYNSET.fullmatch(label):
        with contextlib.suppress(KeyError):
            return _imagenet().label_name_to_description(label).split(",")[0]
    return label


def in_python(name: str, source: Path | str, task: Task, options: dict[str, Any]) -> str:
    """Lines of Python that do the same: ``options`` are those of ``conv2former.predict``.

    A path is written as the page writes it, which shows no folders of the server.
    """
    if isinstance(source, Path):
        module = task.__module__.partition(".")[0]
        own = "" if module == "conv2former" else f"import {module}  # the task {task.name}\n"
        given = "".join(f", {key}={value!r}" for key, value in options.items())
        return (
            f"from pathlib import Path\n\nimport conv2former\n{own}\n"
            f"model = {name!r}  # the path of its folder\n"
            f'for found in conv2former.predict(model, [Path("photo.jpg")]{given}):\n    print(found)\n'
        )
    return _timm_in_python(source, options.get("top_k", 1))


def _timm_in_python(name: str, top_k: int) -> str:
    model_name, args = read_name(name)  # type: ignore[misc]  # it is no path
    given = "".join(f", {key}={value!r}" for key, value in args.items())
    return (
        "import conv2former  # registers its models with timm\nimport timm\nimport torch\nfrom PIL import Image\n\n"
        f"model = timm.create_model({model_name!r}{given}).eval()\n"
        "config = timm.data.resolve_model_data_config(model)\n"
        "transform = timm.data.create_transform(**config, is_training=False)\n"
        'image = transform(Image.open("photo.jpg").convert("RGB"))\n'
        "with torch.inference_mode():\n"
        f"    print(model(image[None]).softmax(dim=1).topk({top_k}))\n"
    )
