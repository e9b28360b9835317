"""The run folder: everything that one training leaves behind, and needs to go on.

recipe.yaml            the resolved recipe
recipes/               those that the run was made with before, where it was forced to go on with another
run.json               data, classes, command, versions, machine, recipe hash
held_out.txt           the validation images, where a fraction of the images was held out
metrics.jsonl          a row per logged step and per evaluation
metrics.csv            a row per evaluation
tensorboard/ loggers/  the same for TensorBoard, and for other loggers that the recipe names
history.jsonl          when the run was started, resumed, stopped: command, versions, commit, step
bad_images.jsonl       images that were skipped because they cannot be read
skipped_steps.jsonl    steps that were skipped because their loss was not finite, with their images
checkpoints/           the last two of weights, optimizer and step, to resume from
best/ last/            model.safetensors and config.json, for timm's local-dir:; in best/ the model card, README.md
evaluation.json        the best weights' counts, also per class
evaluations/           the same on other data, by ``conv2former evaluate``
samples/ predictions/  images to try, and what was made of them (quick start)
detections.json        a detector's results in COCO's form
mistakes.csv           the images that a classifier got wrong
*.png                  learning curves, confusion matrix, predictions
"""

from __future__ import annotations

import contextlib
import csv
import errno
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from conv2former.config import Recipe
from conv2former.engine.machine import machine_facts
from conv2former.engine.run_files import read_facts, read_raw_recipe, read_report, read_rows
from conv2former.errors import UserError, attempt, some
from conv2former.files import append_line, read_lines, replace_bytes, replace_text
from conv2former.recipes.load import parse_recipe
from conv2former.tasks.base import Reported

HELD_OUT_LIST = "held_out.txt"  # names of the images that were held out of a set
# what a run and the commands on it write; nothing else is ever deleted
CONTENTS = {
    *("recipe.yaml", "run.json", "metrics.jsonl", "metrics.csv", "tensorboard", "checkpoints", "best", "last"),
    *("evaluation.json", "confusion_matrix.png", "predictions.png", "learning_curves.png", "detections.json"),
    *("mistakes.csv", HELD_OUT_LIST),
    *("evaluations", "samples", "predictions", "loggers", "recipes", "schedule.png"),
    *("history.jsonl", "bad_images.jsonl", "skipped_steps.jsonl", ".lock"),
}


# what is there if the making of a run was interrupted
LEFTOVERS = {"recipe.yaml", "recipe.yaml.partial", "run.json.partial", "checkpoints", "schedule.png", ".lock"}


class RunDir:
    """Paths and files of one run.

    Args:
        path: The folder; ``create`` or ``open`` checks it first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.locked: int | None = None
        self.checkpoints = path / "checkpoints"
        self.best, self.last = path / "best", path / "last"
        self.metrics_jsonl, self.metrics_csv = path / "metrics.jsonl", path / "metrics.csv"
        self.bad_images_jsonl, self.skipped_steps_jsonl = path / "bad_images.jsonl", path / "skipped_steps.jsonl"

    @classmethod
    def create(cls, path: Path, recipe: Recipe, facts: dict[str, Any], *, overwrite: bool) -> RunDir:
        """Makes the folder and writes what is known before the first step.

        Raises:
            UserError: The folder holds a run and ``overwrite`` is off, holds other things, or cannot be written.
        """
        cls.check_free(path, overwrite=overwrite)
        run = cls(path)
        if run.exists():
            run.lock()
            run._remove()
        facts = facts | dict(recipe_hash=recipe.digest(), seed=recipe.engine.seed) | machine_facts()
        with attempt(f"write the output folder {path}"):
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            run.lock()
            replace_text(path / "recipe.yaml", recipe.to_yaml())
            run.write_json("run.json", facts)
        return run

    @classmethod
    def check_free(cls, path: Path, *, overwrite: bool) -> None:
        """Refuses a folder that holds a run, unless ``overwrite``, or other things; raises UserError."""
        if cls(path).exists():
            if not overwrite:
                raise UserError(
                    f"{path} already holds a run: continue it with --resume, or replace it with --overwrite"
                )
        elif path.exists() and (
            not path.is_dir() or set(os.listdir(path)) - LEFTOVERS or any(cls(path).checkpoints.glob("*"))
        ):
            raise UserError(f"{path} exists and is not a run: give an empty or new folder with --out")

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """An existing run.

        Raises:
            UserError: The folder is not a run.
        """
        run = cls(path)
        if not path.exists():
            raise UserError(f"{path} is not a run folder: it does not exist")
        if not run.exists():
            raise UserError(f"{path} is not a run folder (no recipe.yaml and run.json in it)")
        return run

    def lock(self) -> None:
        """Keeps other processes from training in the folder, until ``unlock`` or the end of this one.

        Raises:
            UserError: Another one does, or this system has no such locks.
        """
        try:
            import fcntl
        except ImportError:
            raise UserError("training needs Linux or macOS: on Windows use the Windows Subsystem for Linux") from None
        self.unlock()
        # a record lock, which the processes that read images do not inherit
        self.locked = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
                return
            raise UserError(f"another process is training in {self.path}: wait for its end, or stop it") from None

    def unlock(self) -> None:
        """Lets others train in the folder."""
        if self.locked is not None:
            os.close(self.locked)
            self.locked = None

    def tidy(self) -> None:
        """Removes what a killed export has left."""
        for name in ("best", "last"):
            for leftover in self.path.glob(f".{name}.*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def change(self, recipe: Recipe, facts: dict[str, Any]) -> None:
        """Goes on with another recipe, images or processes; a recipe of before is kept beside the new one.

        ``run.json`` is written last: until then the run has the recipe of before (see ``recipe``).
        """
        text = (self.path / "recipe.yaml").read_text(encoding="utf-8")
        if text != recipe.to_yaml():
            *_, before = self._recipes_before()
            before.parent.mkdir(exist_ok=True)
            replace_text(before, text)
            replace_text(self.path / "recipe.yaml", recipe.to_yaml())
        self.write_json("run.json", facts | dict(recipe_hash=recipe.digest(), seed=recipe.engine.seed))

    def exists(self) -> bool:
        """Whether the folder holds a run."""
        return (self.path / "recipe.yaml").is_file() and (self.path / "run.json").is_file()

    def traces(self) -> list[str]:
        """What shows, beside checkpoints that can be read, that the run has been trained."""
        found = ["metrics.jsonl"] * bool(self.rows())
        found += [folder.name for folder in (self.best, self.last) if folder.exists()]
        return found + sorted(path.name for path in self.checkpoints.glob("*.damaged"))

    def events(self) -> list[dict[str, Any]]:
        """The rows of ``history.jsonl``."""
        return read_lines(self.path / "history.jsonl")

    def _remove(self) -> None:
        # leftovers of a crash: half-written files and folders beside their places
        names = os.listdir(self.path)
        ours = {n for n in names if n.removesuffix(".partial") in CONTENTS or n.startswith((".best.", ".last."))}
        foreign = sorted(set(names) - ours)
        if foreign:
            raise UserError(f"{self.path} holds {some(foreign)}, which no run has written: it is not overwritten")
        if Path.cwd().is_relative_to(self.path.resolve()):
            raise UserError(f"{self.path} is the current folder or holds it: it is not overwritten")
        removed = self.path.with_name(f".{self.path.name}.{os.getpid()}.removed")
        with attempt(f"remove {self.path}"):
            self.path.rename(removed)  # at once: whoever is killed meanwhile leaves no half of a run in its place
            shutil.rmtree(removed)

    def recipe(self) -> Recipe:
        """The run's resolved recipe: the one that ``run.json`` names; raises UserError where a file is damaged."""
        found, (*earlier, _) = _parsed(self.path / "recipe.yaml"), self._recipes_before()
        if not earlier or (named := self.facts().get("recipe_hash")) == found.digest():
            return found
        with contextlib.suppress(UserError):  # an older version's
            if (kept := _parsed(earlier[-1])).digest() == named:  # a change was interrupted
                return kept
        return found

    def _recipes_before(self) -> Iterator[Path]:
        """The recipes that the run had before this one, and then the place of the next."""
        for number in itertools.count(1):
            yield (path := self.path / "recipes" / f"recipe.{number}.yaml")
            if not path.exists():
                return

    def facts(self) -> dict[str, Any]:
        """What ``run.json`` says; raises UserError where the file is damaged."""
        return read_facts(self.path / "run.json")

    def title(self) -> str:
        """Name, network and data, as far as they can be read, for the head of a figure."""
        title = self.path.absolute().name
        with contextlib.suppress(UserError):
            title += f": {self.recipe().model.name}"
            if data := self.facts().get("data"):
                title += f" on {Path(str(data)).name}"
        return title

    def recorded(self, reported: Sequence[Reported]) -> list[tuple[Reported, float]]:
        """What the report says, the first metric first; none where there is no report.

        Raises:
            UserError: The report is damaged.
        """
        path = self.path / "evaluation.json"
        if not path.is_file():
            return []
        found: Any = read_report(path)
        rows = []
        for metric in reported:
            value = found
            for key in metric.keys:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, (int, float)):
                rows.append((metric, float(value)))
        return rows

    def list_held_out(self, source: Any) -> None:
        """Writes ``held_out.txt``: the name of a validation image per line."""
        names = "".join(f"{source.name(index)}\n" for index in range(len(source)))
        replace_bytes(self.path / HELD_OUT_LIST, os.fsencode(names))

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file of the run, whole or not at all."""
        replace_text(self.path / name, json.dumps(content, indent=2) + "\n")

    def add_event(self, kind: str, **facts: Any) -> None:
        """Appends to ``history.jsonl`` what happens to the run."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        append_line(self.path / "history.jsonl", dict(event=kind, time=now) | facts)

    def add_row(self, row: dict[str, Any]) -> None:
        """Appends to ``metrics.jsonl``; a row that ends an epoch goes to ``metrics.csv`` too."""
        append_line(self.metrics_jsonl, row)
        if row["kind"] == "epoch":
            self._write_csv()

    def rows(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The rows written so far, oldest first; a last line that a crash cut short is passed over."""
        return [row for row in read_rows(self.metrics_jsonl) if "kind" in row and kind in (None, row["kind"])]

    def drop_rows_after(self, step: int, *, evaluated: int) -> None:
        """Takes out the rows of steps, and of evaluations, that a resumed run is about to do again."""
        last = {"epoch": evaluated}
        for path in (self.metrics_jsonl, self.skipped_steps_jsonl):
            if path.exists():
                kept = [row for row in read_rows(path) if row["step"] <= last.get(row.get("kind", ""), step)]
                replace_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._write_csv()

    def renumber_rows(self, steps_per_epoch: int) -> None:
        """Gives the rows the steps that they have now that an epoch has another number of them."""
        rows = [row | dict(step=round(row["epoch"] * steps_per_epoch)) for row in self.rows()]
        replace_text(self.metrics_jsonl, "".join(json.dumps(row) + "\n" for row in rows))
        self._write_csv()

    def _write_csv(self) -> None:
        rows = self.rows("epoch")
        if not rows:
            self.metrics_csv.unlink(missing_ok=True)
            return
        with (partial := self.metrics_csv.with_name("metrics.csv.partial")).open(
            "w", newline="", encoding="utf-8"
        ) as file:
            writer = csv.DictWriter(file, fieldnames=[key for key in rows[0] if key != "kind"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(self.metrics_csv)


def _parsed(path: Path) -> Recipe:
    return parse_recipe(read_raw_recipe(path), str(path))
