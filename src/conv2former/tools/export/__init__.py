"""Trained models as files for other runtimes, each compared with PyTorch on real images."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from conv2former import ops
from conv2former.checkpoints.exported import Runtime, fingerprint
from conv2former.checkpoints.hub import CONFIG_FILE
from conv2former.engine.model_card import write_card
from conv2former.engine.run_dir import RunDir
from conv2former.errors import UserError, attempt, failing, nearest_or_all
from conv2former.files import parse_json, read_within, replace_text
from conv2former.tools.export.check import Comparison, compare, images_in, latency, top1, validated_on
from conv2former.tools.export.formats import FORMATS, Format, Program, trace
from conv2former.tools.export.subjects import Subject, open_subject
from conv2former.tools.naming import read_name

__all__ = ["FORMATS", "ExportOptions", "Exported", "export"]

CALIBRATION_IMAGES = 300  # of a folder
RECORD = "export.json"  # what was exported into a folder


@dataclass(frozen=True)
class ExportOptions:
    """What the user asks for.

    Attributes:
        formats: Keys of ``FORMATS``.
        images: Files and folders to compare on; none for what the run was validated on.
        count: How many of them.
        data: Folder of classes on which top-1 is counted in PyTorch and in every runtime.
        calibration: Folder of images for int8; None for those that are compared on.
        size: (H, W) of the images; None for the network's own.
        dynamic_size: Whether the file takes any size.
        fuse: Whether the network is re-parameterized before.
        tolerance: Largest difference that is no error; None for the format's.
        agreement: Least fraction of images with the same top class, or of a detector's objects that both find, that is
            no error; None for the format's.
    """

    formats: Sequence[str] = ("onnx",)
    images: Sequence[Path] = ()
    count: int = 16
    data: Path | None = None
    calibration: Path | None = None
    size: tuple[int, int] | None = None
    dynamic_size: bool = False
    fuse: bool = True
    tolerance: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        format: Key of ``FORMATS``.
        files: The file, and what belongs to it.
        size: Bytes of all.
        seconds: For one image in the file's runtime, see ``latency``.
        comparison: With PyTorch.
        tolerance: For its difference.
        agreement: Least fraction of equal classes or objects, as above; 0 where the weights are random.
        top1: Percent in PyTorch and in the file's runtime, and images; None where no folder was given.
    """

    format: str
    files: list[Path]
    size: int
    seconds: float
    comparison: Comparison
    tolerance: float
    agreement: float
    top1: tuple[float, float, int] | None = None

    @property
    def ok(self) -> bool:
        """Whether the difference and the top classes are within the tolerances."""
        return not self.wrong

    @property
    def wrong(self) -> str:
        """What is beyond a tolerance, and what to do; '' where all is well."""
        difference, agreement = self.comparison.difference, self.comparison.agreement
        if not difference <= self.tolerance:
            said = f"differs by {difference:.1e} of the largest output, the tolerance is {self.tolerance:g}"
            return f"{self.format} {said}: the file is not kept; raise --tolerance where that is good enough"
        if agreement is not None and agreement < self.agreement:
            said = (
                f"finds {agreement:.1%} of the classes or objects that PyTorch finds, the least is {self.agreement:.0%}"
            )
            return f"{self.format} {said}: the file is not kept; lower --agreement where that is good enough"
        return ""

    def to_json(self) -> dict[str, Any]:
        """All numbers; an infinite difference, for which JSON has no word, is None."""
        own = dict(
            format=self.format,
            file=str(self.files[0]),
            bytes=self.size,
            seconds=self.seconds,
            limit=self.tolerance,
            ok=self.ok,
        )
        own |= vars(self.comparison)
        own |= dict(zip(("top1_pytorch", "top1", "images"), self.top1 or (), strict=False))
        return own if np.isfinite(self.comparison.difference) else own | dict(difference=None)


def export(source: str, out: Path, options: ExportOptions, *, say: Callable[[str], None] = print) -> list[Exported]:
    """Writes a checkpoint in one or more formats and compares each with PyTorch.

    Only files that are within the tolerances come into ``out``, and none where anything fails. A model card
    is written beside them.

    Args:
        source: Run folder, saved model, or a timm model's name for one with random weights.
        out: Folder for the files.
        options: See there.
        say: Gets a line on what the user should know.

    Raises:
        UserError: Anything wrong with what was given, an exporter that fails, a missing package.
    """
    unknown = [name for name in options.formats if name not in FORMATS]
    if unknown:
        hint = nearest_or_all(unknown[0], list(FORMATS))
        raise UserError(f"unknown --format {unknown[0]!r}{hint}")
    formats = [FORMATS[name] for name in dict.fromkeys(options.formats)]
    for format in formats:
        if missing := [name for name in format.needs if importlib.util.find_spec(name) is None]:
            raise UserError(f"--format {format.name} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    with ops.use_backend("reference"):  # our own operators are known to no other runtime
        named = read_name(source)
        subject = open_subject(named, source, size=options.size, fuse=options.fuse, dynamic_size=options.dynamic_size)
        if options.data and subject.task.one_at_a_time:
            raise UserError(f"--data counts top-1, {source} holds a {subject.task.name} model: leave it out")
        if subject.task.one_at_a_time and subject.part.any_size and not options.dynamic_size:
            height, width = subject.part.size
            say(f"note: the file refuses images that are not {height} x {width}; --dynamic-size makes one for any")
        subjects = {format.name: subject.in_onnx if format.onnx else subject for format in formats}
        for each in {id(each): each for each in subjects.values()}.values():
            if each.note:
                say(f"note: {each.note}")
            each.images = _images(named, options, each)
        if options.calibration and any(format.name.endswith("int8") for format in formats):
            subject.calibration = images_in([options.calibration], CALIBRATION_IMAGES, subject)
        labelled: Any = subject.task.eval_source(options.data) if options.data else None
        programs: dict[tuple[int, bool], Any] = {}  # by what is traced, and its form
        with _workshop(out) as folder:
            found, runtimes = [], []
            for format in formats:
                each, first = subjects[format.name], format.channels_first
                program = programs.setdefault(
                    (id(each), first), functools.cache(functools.partial(trace, each, first=first))
                )
                exported, runtime = _exported(format, each, program, folder)
                if each.part.one and exported.comparison.agreement is None:
                    say("note: nothing was found on the images, so little was compared: name others with --images")
                tolerance = exported.tolerance if options.tolerance is None else options.tolerance
                least = 0.0 if subject.random else exported.agreement
                least = least if options.agreement is None else options.agreement
                found.append(replace(exported, files=format.files(out), tolerance=tolerance, agreement=least))
                runtimes.append(runtime)
            if labelled is not None:
                own, *others = (
                    100 * n / len(labelled) for n in top1([subject.reference, *runtimes], subject, labelled)
                )
                for number, other in enumerate(others):
                    found[number] = replace(found[number], top1=(own, other, len(labelled)))
            for exported in found:
                for file in exported.files if exported.ok else []:
                    (folder / file.name).replace(file)
    rows = [exported.to_json() for exported in found if exported.ok]
    if rows and isinstance(named, Path):
        run = RunDir(named)
        write_card(out, named, run if run.exists() else None, exported=_recorded(out, named, rows))
    return found


def _recorded(out: Path, model: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Writes ``export.json``, where rows of earlier calls with the same weights stay; all of them. Raises UserError."""
    path, weights = out / RECORD, fingerprint(model)
    rows = [row | dict(file=Path(row["file"]).name) for row in rows]
    with attempt(f"write {path}"):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # none there, or no record of ours
            before = parse_json(read_within(path))
            new = {row["format"] for row in rows}
            kept = [row for row in before["files"] if row["format"] in FORMATS and row["format"] not in new]
            kept = [row for row in kept if (out / row["file"]).exists()]
            rows = [*kept, *rows] if before["weights"] == weights else rows
        replace_text(path, json.dumps(dict(weights=weights, files=rows), indent=2) + "\n")
    return rows


def _exported(format: Format, subject: Subject, program: Program, folder: Path) -> tuple[Exported, Runtime]:
    """A file in a folder, compared with PyTorch, and its runtime; raises UserError."""
    files = format.files(folder)
    with failing(f"--format {format.name} failed"):
        with contextlib.redirect_stdout(sys.stderr):  # some report their progress
            format.write(subject, program, files[0])
        runtime = format.load(files[0])
        comparison = compare(runtime, subject, subject.images)
        seconds = latency(runtime, subject, subject.images)
    size = sum(file.stat().st_size for file in files)
    return Exported(format.name, files, size, seconds, comparison, format.tolerance, format.agreement), runtime


@contextlib.contextmanager
def _workshop(out: Path) -> Iterator[Path]:
    """A folder inside ``out`` for what has not been compared yet; nothing of it stays. Raises UserError."""
    if (out / CONFIG_FILE).exists():
        raise UserError(f"{out} holds a saved model: give a folder of its own to the exported files")
    with attempt(f"write the output folder {out}"):
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".export-", dir=out) as folder:
            yield Path(folder)


def _images(named: Any, options: ExportOptions, subject: Subject) -> list[np.ndarray]:
    """What to compare on: the files given, else those of the labelled folder, else what the run was validated on."""
    chosen = options.images or ([options.data] if options.data else [])
    if chosen:
        return images_in(chosen, options.count, subject)
    run = RunDir(named) if isinstance(named, Path) else None
    if run is None or not run.exists():
        raise UserError("name images to compare the exported file on with --images (files or folders)")
    return validated_on(run, options.count, subject)
