"""The run folder: everything that one training leaves behind, and needs to go on.

recipe.yaml            the resolved recipe
run.json               data, classes, command, versions, machine, recipe hash
metrics.jsonl          a row per logged step and per evaluation
metrics.csv            a row per evaluation
tensorboard/           the same for TensorBoard
checkpoints/last.ckpt  weights, optimizer and step, to resume from
best/ last/            model.safetensors and config.json, for timm's local-dir:
evaluation.json        the best weights' counts, also per class
evaluations/           the same on other data, by ``conv2former evaluate``
samples/ predictions/  pictures to try, and what was made of them (quick start)
*.png                  learning curves, confusion matrix, predictions
"""

from __future__ import annotations

import csv
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from conv2former.errors import UserError, one_line, some
from conv2former.recipes.schema import Recipe, parse_recipe

# what a run and the commands on it write; nothing else is ever deleted
CONTENTS = {
    *("recipe.yaml", "run.json", "metrics.jsonl", "metrics.csv", "tensorboard", "checkpoints", "best", "last"),
    *("evaluation.json", "confusion_matrix.png", "predictions.png", "learning_curves.png"),
    *("evaluations", "samples", "predictions"),
}


class RunFolder:
    """Paths and files of one run.

    Args:
        path: The folder; ``create`` or ``open`` checks it first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoints" / "last.ckpt"
        self.best, self.last = path / "best", path / "last"
        self.metrics_jsonl, self.metrics_csv = path / "metrics.jsonl", path / "metrics.csv"

    @classmethod
    def create(cls, path: Path, recipe: Recipe, facts: dict[str, Any], *, overwrite: bool) -> RunFolder:
        """Makes the folder and writes what is known before the first step.

        Raises:
            UserError: The folder holds a run and ``overwrite`` is off, holds other things, or cannot be written.
        """
        run = cls(path)
        if run.exists():
            if not overwrite:
                raise UserError(
                    f"{path} already holds a run: continue it with --resume, or replace it with --overwrite"
                )
            run._remove()
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} exists and is not a run: give an empty or new folder with --out")
        facts = facts | dict(recipe_hash=recipe.digest()) | machine_facts()
        try:
            run.checkpoint.parent.mkdir(parents=True)
            replace_text(path / "recipe.yaml", recipe.to_yaml())
            run.write_json("run.json", facts)
        except OSError as error:
            raise UserError(f"cannot write the output folder {path}: {error.strerror}") from None
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run.

        Raises:
            UserError: The folder is not a run.
        """
        run = cls(path)
        if not run.exists():
            raise UserError(f"{path} is not a run folder (no recipe.yaml and run.json in it)")
        return run

    def exists(self) -> bool:
        """Whether the folder holds a run."""
        return (self.path / "recipe.yaml").is_file() and (self.path / "run.json").is_file()

    def _remove(self) -> None:
        # leftovers of a crash: half-written files and folders beside their places
        names = os.listdir(self.path)
        ours = {n for n in names if n.removesuffix(".partial") in CONTENTS or n.startswith((".best.", ".last."))}
        foreign = sorted(set(names) - ours)
        if foreign:
            raise UserError(f"{self.path} holds {some(foreign)}, which no run has written: it is not overwritten")
        if Path.cwd().is_relative_to(self.path.resolve()):
            raise UserError(f"{self.path} is the current folder or holds it: it is not overwritten")
        try:
            shutil.rmtree(self.path)
        except OSError as error:
            raise UserError(f"cannot remove {self.path}: {one_line(error)}") from None

    def recipe(self) -> Recipe:
        """The run's resolved recipe; raises UserError where the file is damaged."""
        path = self.path / "recipe.yaml"
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"cannot read {path}: {one_line(error)}") from None
        return parse_recipe(raw, str(path))

    def facts(self) -> dict[str, Any]:
        """What ``run.json`` says; raises UserError where the file is damaged."""
        path = self.path / "run.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {one_line(error)}") from None

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file of the run, whole or not at all."""
        replace_text(self.path / name, json.dumps(content, indent=2) + "\n")

    def add_row(self, row: dict[str, Any]) -> None:
        """Appends to ``metrics.jsonl``; a row that ends an epoch goes to ``metrics.csv`` too."""
        with self.metrics_jsonl.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if row["kind"] == "epoch":
            self._write_csv()

    def rows(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The rows written so far, oldest first; a last line that a crash cut short is passed over."""
        if not self.metrics_jsonl.exists():
            return []
        rows = []
        for line in self.metrics_jsonl.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return [row for row in rows if kind in (None, row["kind"])]

    def drop_rows_after(self, step: int) -> None:
        """Takes out the rows of steps that a resumed run is about to do again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        replace_text(self.metrics_jsonl, "".join(json.dumps(row) + "\n" for row in kept))
        self._write_csv()

    def _write_csv(self) -> None:
        rows = self.rows("epoch")
        if not rows:
            return
        with (partial := self.metrics_csv.with_name("metrics.csv.partial")).open(
            "w", newline="", encoding="utf-8"
        ) as file:
            writer = csv.DictWriter(file, fieldnames=[key for key in rows[0] if key != "kind"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(self.metrics_csv)


def replace_text(path: Path, text: str) -> None:
    """Writes a file next to its place, then moves it there: a reader never sees half of it."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def machine_facts() -> dict[str, Any]:
    """Command, versions, commit and machine, for whoever repeats the run."""
    packages = ("conv2former", "torch", "torchvision", "timm", "lightning", "numpy", "pillow")
    return dict(
        command=[Path(sys.argv[0]).name, *sys.argv[1:]],
        versions={name: version(name) for name in packages} | dict(python=platform.python_version()),
        commit=_commit(),
        machine=dict(
            system=f"{platform.system()} {platform.machine()}",
            cpus=os.cpu_count(),
            gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        ),
    )


def _commit() -> str | None:
    # only where the package runs from a checkout of its own; an installed wheel has its version
    git: Any = dict(cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True)
    try:
        # a file that git does not track lies in somebody else's repository, in a virtual environment there say
        subprocess.run(["git", "ls-files", "--error-unmatch", Path(__file__).name], **git)
        return subprocess.run(["git", "describe", "--always", "--dirty"], **git).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
