"""Trained models as files for other runtimes, each held against PyTorch on real pictures."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from conv2former import ops
from conv2former.checkpoints.hub import CONFIG_FILE
from conv2former.engine.model_card import write_card
from conv2former.engine.run_dir import RunDir
from conv2former.errors import UserError, nearest, one_line
from conv2former.tools.export.check import Comparison, compare, pictures_in, read, top1, validated_on
from conv2former.tools.export.formats import FORMATS, trace
from conv2former.tools.export.subjects import Subject, open_subject
from conv2former.tools.naming import read_name

__all__ = ["FORMATS", "ExportOptions", "Exported", "export"]

CALIBRATION_PICTURES = 300  # of a folder


@dataclass(frozen=True)
class ExportOptions:
    """What the user asks for.

    Attributes:
        formats: Keys of ``FORMATS``.
        pictures: Files and folders to compare on; none for what the run was validated on.
        count: How many of them.
        data: Folder of classes on which top-1 is counted in PyTorch and in every runtime.
        calibration: Folder of pictures for int8; None for those that are compared on.
        size: (H, W) of the images; None for the network's own.
        dynamic_size: Whether the file takes any size.
        fuse: Whether the network is re-parameterized before.
        limit: Largest difference that is no error; None for the format's.
    """

    formats: Sequence[str] = ("onnx",)
    pictures: Sequence[Path] = ()
    count: int = 16
    data: Path | None = None
    calibration: Path | None = None
    size: tuple[int, int] | None = None
    dynamic_size: bool = False
    fuse: bool = True
    limit: float | None = None


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        format: Key of ``FORMATS``.
        files: The file, and what belongs to it.
        size: Bytes of all.
        comparison: With PyTorch.
        limit: For its difference.
        top1: Percent in PyTorch and in the file's runtime, and images; None where no folder was given.
    """

    format: str
    files: list[Path]
    size: int
    comparison: Comparison
    limit: float
    top1: tuple[float, float, int] | None = None

    @property
    def ok(self) -> bool:
        """Whether the difference is within its limit."""
        return self.comparison.difference <= self.limit

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        top = dict(zip(("top1_pytorch", "top1", "images"), self.top1, strict=True)) if self.top1 else {}
        own = dict(format=self.format, file=str(self.files[0]), bytes=self.size, limit=self.limit, ok=self.ok)
        compared = vars(self.comparison)
        if not np.isfinite(self.comparison.difference):  # which JSON has no word for
            compared = compared | dict(difference=None)
        return own | compared | top


def export(source: str, out: Path, options: ExportOptions, *, say: Callable[[str], None] = print) -> list[Exported]:
    """Writes a checkpoint in one or more formats and holds each against PyTorch.

    Only files whose difference is within the limit come into ``out``, and none where anything fails. A model card is
    written beside them.

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
        hint = nearest(unknown[0], list(FORMATS)) or f"; there are: {', '.join(FORMATS)}"
        raise UserError(f"unknown --format {unknown[0]!r}{hint}")
    formats = [FORMATS[name] for name in dict.fromkeys(options.formats)]
    for format in formats:
        format.check()
    with ops.use_backend("reference"):  # our own operators are known to no other runtime
        named = read_name(source)
        subject = open_subject(named, source, size=options.size, fuse=options.fuse, dynamic_size=options.dynamic_size)
        if subject.note:
            say(f"note: {subject.note}")
        if options.data and subject.task.one_at_a_time:
            raise UserError(f"--data counts top-1, {source} holds a {subject.task.name} model: leave it out")
        pictures = _pictures(named, options, subject)
        calibration: list[np.ndarray] = []
        if any(format.name.endswith("int8") for format in formats):
            folder = options.calibration
            files = pictures_in([folder], CALIBRATION_PICTURES) if folder else []
            calibration = [picture[None] for picture in (read(files, subject) if files else pictures)]
        images: Any = subject.task.eval_source(options.data) if options.data else None
        traced = trace(subject, dynamic_size=options.dynamic_size, calibration=calibration)
        with _workshop(out) as folder:
            found, runtimes = [], []
            for format in formats:
                files = format.files(folder)
                try:
                    with contextlib.redirect_stdout(sys.stderr):  # some report their progress
                        format.write(traced, files[0])
                    runtime = format.load(files[0])
                    comparison = compare(runtime, subject, pictures, dynamic_size=options.dynamic_size)
                except UserError:
                    raise
                except Exception as error:  # each exporter has its own
                    raise UserError(f"--format {format.name} failed: {one_line(error)[:300]}") from error
                limit = format.limit if options.limit is None else options.limit
                size = sum(file.stat().st_size for file in files)
                found.append(Exported(format.name, format.files(out), size, comparison, limit))
                runtimes.append(runtime)
            if images is not None:
                own, *others = top1([subject.reference, *runtimes], subject, images)
                share = 100 / len(images)
                found = [
                    replace(exported, top1=(share * own, share * other, len(images)))
                    for exported, other in zip(found, others, strict=True)
                ]
            for exported in found:
                for file in exported.files if exported.ok else []:
                    (folder / file.name).replace(file)
    rows = [exported.to_json() for exported in found if exported.ok]
    if rows and isinstance(named, Path):
        run = RunDir(named)
        write_card(out, named, run if run.exists() else None, exported=rows)
    return found


@contextlib.contextmanager
def _workshop(out: Path) -> Iterator[Path]:
    """A folder inside ``out`` for what has not been compared yet; nothing of it stays.

    Raises:
        UserError: It cannot be written, or ``out`` holds a saved model.
    """
    if (out / CONFIG_FILE).exists():
        raise UserError(f"{out} holds a saved model: give a folder of its own to the exported files")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".export-", dir=out) as folder:
            yield Path(folder)
    except OSError as error:
        raise UserError(f"cannot write the output folder {out}: {error.strerror or one_line(error)}") from None


def _pictures(named: Any, options: ExportOptions, subject: Subject) -> list[np.ndarray]:
    """What to compare on: the files given, else those of the labelled folder, else what the run was validated on."""
    chosen = options.pictures or ([options.data] if options.data else [])
    if chosen:
        return read(pictures_in(chosen, options.count), subject)
    run = RunDir(named) if isinstance(named, Path) else None
    if run is None or not run.exists():
        raise UserError("name pictures to compare the exported file on with --pictures (files or folders)")
    return validated_on(run, options.count, subject)
