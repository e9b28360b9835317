"""Trained models as files for other runtimes, each held against PyTorch on real pictures."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from conv2former import ops
from conv2former.cards import write_card
from conv2former.errors import UserError, nearest, one_line
from conv2former.export.check import Comparison, compare, pictures_in, read, top1, validated_on
from conv2former.export.formats import FORMATS, trace
from conv2former.export.subjects import Subject, open_subject
from conv2former.run import RunFolder

__all__ = ["FORMATS", "ExportOptions", "Exported", "export"]


@dataclass(frozen=True)
class ExportOptions:
    """What the user asks for.

    Attributes:
        formats: Keys of ``FORMATS``.
        pictures: Files and folders to compare on; none for what the run was validated on.
        count: How many of them.
        data: Folder of classes on which top-1 is counted in PyTorch and in every runtime.
        calibration: Folder of pictures for int8; None for those that are compared on.
        calibration_count: How many of them.
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
    calibration_count: int = 300
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
        comparison: With PyTorch.
        limit: For its difference.
        top1: Percent in PyTorch and in the file's runtime, and images; None where no folder was given.
    """

    format: str
    files: list[Path]
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
        size = sum(file.stat().st_size for file in self.files if file.exists())
        own = dict(format=self.format, file=str(self.files[0]), bytes=size, limit=self.limit, ok=self.ok)
        return own | vars(self.comparison) | top


def export(source: str, out: Path, options: ExportOptions, *, say: Callable[[str], None] = print) -> list[Exported]:
    """Writes a checkpoint in one or more formats and holds each against PyTorch.

    A file whose difference is above its limit is removed. A model card is written beside the others.

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
        subject = open_subject(source, size=options.size, fuse=options.fuse, dynamic_size=options.dynamic_size)
        if subject.note:
            say(f"note: {subject.note}")
        if options.data and subject.task != "classification":
            raise UserError(f"--data counts top-1, {source} holds a {subject.task} model: leave it out")
        pictures = _pictures(source, options, subject)
        calibration: list[np.ndarray] = []
        if any(format.name.endswith("int8") for format in formats):
            folder = options.calibration
            files = pictures_in([folder], options.calibration_count) if folder else []
            calibration = [picture[None] for picture in (read(files, subject) if files else pictures)]
        traced = trace(subject, dynamic_size=options.dynamic_size, calibration=calibration)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write the output folder {out}: {error.strerror}") from None
        found, runtimes = [], []
        for format in formats:
            files = format.files(out)
            try:
                with contextlib.redirect_stdout(sys.stderr):  # some report their progress
                    format.write(traced, files[0])
                runtime = format.load(files[0])
                comparison = compare(runtime, subject, pictures)
            except UserError:
                raise
            except Exception as error:  # each exporter has its own
                raise UserError(f"--format {format.name} failed: {one_line(error)[:300]}") from error
            limit = format.limit if options.limit is None else options.limit
            found.append(Exported(format.name, files, comparison, limit))
            runtimes.append(runtime)
        if options.data:
            images, (own, *others) = top1([subject.reference, *runtimes], subject, options.data)
            found = [
                replace(exported, top1=(100 * own / images, 100 * other / images, images))
                for exported, other in zip(found, others, strict=True)
            ]
    good = {file for exported in found if exported.ok for file in exported.files}
    for file in {file for exported in found for file in exported.files} - good:
        file.unlink(missing_ok=True)
    if good and Path(source).exists():
        run = RunFolder(Path(source))
        rows = [exported.to_json() for exported in found if exported.ok]
        write_card(out, Path(source), run if run.exists() else None, exported=rows)
    return found


def _pictures(source: str, options: ExportOptions, subject: Subject) -> list[np.ndarray]:
    """What to compare on: the files given, else those of the labelled folder, else what the run was validated on."""
    chosen = options.pictures or ([options.data] if options.data else [])
    if chosen:
        return read(pictures_in(chosen, options.count), subject)
    run = RunFolder(Path(source))
    if not run.exists():
        raise UserError("name pictures to compare the exported file on with --pictures (files or folders)")
    return validated_on(run, options.count, subject)
