"""Model cards in the Hugging Face layout: what a model is for, what it was made of, what it reaches, how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from conv2former.checkpoints.hub import CARD_FILE, find_model, read_json
from conv2former.engine.run_dir import RunDir
from conv2former.errors import attempt, in_markdown, markdown_row, printable, some
from conv2former.files import replace_text
from conv2former.tasks import task_class
from conv2former.tasks.base import Reported, Task

PAPER = """```bibtex
@article{hou2022conv2former,
  title   = {Conv2Former: A Simple Transformer-Style ConvNet for Visual Recognition},
  author  = {Hou, Qibin and Lu, Cheng-Ze and Cheng, Ming-Ming and Feng, Jiashi},
  journal = {arXiv preprint arXiv:2211.11943},
  year    = {2022}
}
```"""
MAX_CLASSES = 50  # named in a card
EXAMPLES = {"timm": "onnx_classify.py", "object-detection": "onnx_detect.py"}  # by a tag of the task
MARK = "<!-- Written by conv2former. A card without this line is somebody's own and is left alone. -->"


def write_card(folder: Path, checkpoint: Path, run: RunDir | None, *, exported: Sequence[dict[str, Any]] = ()) -> None:
    """Writes the card of a saved model, or of files made from it; one that is there is replaced if it has ``MARK``.

    Args:
        folder: Where to.
        checkpoint: The model.
        run: Where it was trained; None where that is not known.
        exported: Rows of exported files, as ``Exported.to_json`` gives them; the card is then about them.

    Raises:
        UserError: It cannot be written.
    """
    path = folder / CARD_FILE
    with attempt(f"write {path}"):
        if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
            return
        text = card(read_json(find_model(checkpoint)[0]), run, exported=exported)
        replace_text(path, text.encode("utf-8", "backslashreplace").decode())  # names of classes may hold any bytes


def card(config: dict[str, Any], run: RunDir | None, *, exported: Sequence[dict[str, Any]] = ()) -> str:
    """The text; see ``write_card``. ``config`` is the model's ``config.json``."""
    task = task_class(config.get("task", "classification"))
    facts, metrics = (run.facts(), run.recorded(task.reported)) if run else ({}, [])
    data = printable(Path(str(facts["data"])).name) if facts.get("data") else None
    recipe = run.recipe() if run else None
    name = f"{config['architecture']}{f' on {data}' if data else ''}"
    parts = [
        _front_matter(task, name, data, metrics, exported),
        f"# {in_markdown(name)}",
        _intended(config, task),
        _use(task, exported),
        "## Training",
        _training(recipe, facts) if run and recipe else "Not recorded.",
        "## Metrics",
        _results(metrics, facts, exported) if metrics else "None recorded.",
        *([_files(exported)] if exported else []),
        "## Limits",
        _limits(task, facts),
        "## Licence",
        "The code is under Apache-2.0. The weights carry what the terms of the images and weights that they were made "
        "from allow; whoever publishes them says so here.",
        "## How to cite",
        PAPER,
        MARK,
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(
    task: type[Task],
    name: str,
    data: str | None,
    metrics: list[tuple[Reported, float]],
    exported: Sequence[dict[str, Any]],
) -> str:
    in_timm = "timm" in task.words.tags
    tags = [tag for tag in task.words.tags if not (exported and tag == "timm")]
    head: dict[str, Any] = dict(tags=[*tags, "conv2former"], pipeline_tag=tags[0])
    if not exported:
        head["library_name"] = "timm" if in_timm else "conv2former"
    if metrics and data and not exported:  # measured with the trained model, not with its files
        head["model_name"] = name
        head["eval_results"] = [
            EvalResult(
                task_type=tags[0],
                dataset_type=data,
                dataset_name=data,
                metric_type=metric.metric,
                metric_name=metric.title,
                metric_value=round(value, 2),
            )
            for metric, value in metrics
        ]
    return f"---\n{ModelCardData(**head).to_yaml()}\n---"


def _intended(config: dict[str, Any], task: type[Task]) -> str:
    classes = [str(label) for label in config.get("label_names") or []]
    known = f" Its classes: {in_markdown(some(classes, MAX_CLASSES))}." if classes and task.assumed_classes > 1 else ""
    name = in_markdown(config["architecture"])
    return (
        f"## Intended use\n\nA {name}, trained with the package conv2former {task.words.purpose}."
        f"{known} For images like those that it was trained on; not for decisions about people, and not where a "
        "mistake does harm."
    )


def _use(task: type[Task], exported: Sequence[dict[str, Any]]) -> str:
    if exported:
        text = (
            "## How to use\n\nThe files hold the size, mean, standard deviation, interpolation and class names under "
            "the metadata key `conv2former`."
        )
        commands = []
        for row in exported:
            program = "python -m conv2former_runtime" if row["format"].startswith("runtime") else "conv2former predict"
            commands += [f"{program} {Path(row['file']).name} photo.jpg"] * (not row["file"].endswith(".pt2"))
        if commands:  # a .pt2 may run code when it is opened
            text += "\n\n" + "\n".join(["```sh", "# a line of JSON for each image", *commands, "```"])
        examples = [name for tag, name in EXAMPLES.items() if tag in task.words.tags]
        if examples and any(row["format"] == "onnx" for row in exported):
            text += (
                f"\n\nFor `model.onnx` the project's `examples/{examples[0]}` shows the whole way with numpy, Pillow "
                "and onnxruntime alone."
            )
        return text
    if "timm" in task.words.tags:
        code = (
            "import conv2former  # registers the architecture\nimport timm\n\n"
            'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:OWNER/NAME"\n'
            "config = timm.data.resolve_model_data_config(model)\n"
            "transform = timm.data.create_transform(**config, is_training=False)"
        )
        return f"## How to use\n\n```python\n{code}\n```"
    module, option, note = task.__module__, "", ""
    if not module.startswith("conv2former."):
        module = "MODULE" if module == "__main__" else module
        option, note = f"--import {module} ", f"\n\nThe task {task.name} comes from the Python module `{module}`."
    return f"## How to use\n\n```sh\nconv2former {option}predict FOLDER photo.jpg --out annotated\n```{note}"


def _training(recipe: Any, facts: dict[str, Any]) -> str:
    images = facts.get("images", {})
    count = " and ".join(
        f"{number:,} {'training' if key == 'train' else 'validation'}" for key, number in images.items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
    machine = facts.get("machine", {})
    machine_words = ", ".join(machine.get("gpus", [])) or f"{machine.get('cpus', '?')} CPU cores"
    start = f"; started from {Path(recipe.model.weights).name}" if recipe.model.weights else "; from random weights"
    rows = [
        ("data", f"{Path(str(facts.get('data') or 'built in')).name}: {count} images"),
        ("recipe", f"{recipe.name} (settings {facts.get('recipe_hash')}, seed {recipe.engine.seed}){start}"),
        *_steps(recipe),
        ("precision", recipe.engine.precision),
        ("machine", machine_words),
        ("software", versions + (f"; commit {facts['commit']}" if facts.get("commit") else "")),
    ]
    return "\n".join(["| | |", "|---|---|", *map(markdown_row, rows)])


def _steps(recipe: Any) -> list[tuple[str, str]]:
    if recipe.model.fit_head == "only":
        return [("length", "none: the classifier alone was fitted to the features of the weights (a linear probe)")]
    rates = f"base learning rate {recipe.optim.base_lr:g}, weight decay {recipe.optim.weight_decay:g}"
    return [("length", recipe.schedule.length()), ("optimizer", f"{recipe.optim.name}, {rates}")]


def _results(metrics: list[tuple[Reported, float]], facts: dict[str, Any], exported: Sequence[Any]) -> str:
    lines = ["| metric | value |", "|---|---:|", *(f"| {m.title} | {value:.2f} |" for m, value in metrics)]
    count = facts.get("images", {}).get("val")
    on = f"on the {count:,} validation images" if count else "on the validation images"
    what = " Of the trained model in PyTorch, not of the files." if exported else ""
    return "\n".join([*lines, "", f"By `conv2former evaluate RUN`, {on}, whose results also chose the weights.{what}"])


def _files(exported: Sequence[dict[str, Any]]) -> str:
    counted = any("top1" in row for row in exported)
    head = ["file", "format", "MB", "largest difference to PyTorch", "on images"]
    head += ["top-1, %", "in PyTorch"] if counted else []
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for row in exported:
        line = [Path(row["file"]).name, row["format"], f"{row['bytes'] / 1e6:.1f}", f"{row['difference']:.1e}"]
        line.append(str(row["pictures"]))
        lines.append(line + [f"{row[key]:.2f}" if key in row else "" for key in ("top1", "top1_pytorch") if counted])
    note = "Differences as a fraction of the largest output; by `conv2former export`."
    return "\n".join(["## Files", "", *map(markdown_row, lines), "", note])


def _limits(task: type[Task], facts: dict[str, Any]) -> str:
    lines = [
        f"- What is on no training image is unknown to it, and nothing says so: {task.words.unknown}.",
        "- Other cameras, sizes, light and scenes than in training lower the metrics; by how much nobody has measured.",
        "- Balance over groups of people, and resistance to images made to mislead, were not examined.",
    ]
    train = facts.get("images", {}).get("train")
    if train and train < 10_000:
        lines.append(f"- It has seen {train:,} training images, which is few.")
    return "\n".join(lines)
