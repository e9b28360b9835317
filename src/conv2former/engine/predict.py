"""Predictions on image files: one JSON object for each, and an annotated image if asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from conv2former.checkpoints.exported import fingerprint
from conv2former.data.folders import DRAWN
from conv2former.data.images import BadImage, decode, given_images
from conv2former.data.recognise import masked_part
from conv2former.engine.devices import for_inference
from conv2former.engine.launch import place
from conv2former.engine.progress import Ticker
from conv2former.engine.rows import Rows
from conv2former.errors import UserError, attempt, plural, printable, say, some
from conv2former.files import output_names
from conv2former.tasks import load, set_options
from conv2former.tasks.base import Prediction, Task
from conv2former_runtime.errors import json_line

BATCH = 16  # images of a forward pass, of a task that takes several


def predict(
    checkpoint: Path | str,
    inputs: Sequence[Path | str] | Path | str,
    *,
    top_k: int | None = None,
    threshold: float | None = None,
    batch_size: int | None = None,
    workers: int = 0,
    device: str = "auto",
    fuse: bool = True,
) -> Iterator[dict[str, Any]]:
    """One dictionary for each input file, in order: ``file``, ``ok`` and what the task gives, or ``error``.

    A classifier gives ``top``, a detector ``objects``, a segmentation model ``classes``.

    Args:
        checkpoint: Run folder, saved model folder, or its ``model.safetensors``.
        inputs: Image files, and folders that are searched for them; or one of these.
        top_k: Classes that a classifier names (5).
        threshold: Least score of what a detector gives out (0.3).
        batch_size: Images of a forward pass of a classifier (16).
        workers: Processes that read images.
        device: 'auto', 'cpu', 'cuda', ...
        fuse: Whether the network is re-parameterized first: faster, and equal to about 1e-5.

    Raises:
        UserError: The checkpoint cannot be used, an option is for another task, or there is no image in the inputs.
    """
    task = _opened(checkpoint, device=device, fuse=fuse, top_k=top_k, threshold=threshold, batch_size=batch_size)
    files = _given([Path(path) for path in ([inputs] if isinstance(inputs, str | Path) else inputs)])
    for file, found in _found(task, files, batch_size=batch_size, workers=workers):
        yield _row(file, found)


def run_predict(
    checkpoint: Path | str,
    inputs: Sequence[Path],
    *,
    out: Path | None = None,
    masks: Path | None = None,
    out_file: Path | None = None,
    top_k: int | None = None,
    threshold: float | None = None,
    batch_size: int | None = None,
    workers: int = 0,
    device: str = "auto",
    fuse: bool = True,
) -> int:
    """``predict`` for the command line: JSON lines, images drawn into ``out``; the exit status, 1 if a file failed.

    ``masks`` is a folder for the masks of a segmentation model.

    The lines are printed, or written into ``out_file``, where a call that was stopped goes on and processes that
    torchrun or SLURM has started share the files.

    Raises:
        UserError: As ``predict``, or something cannot be written.
    """
    rank, world, local = place()
    if world > 1 and out_file is None:
        raise UserError(f"{world} processes share the images: say with --out-file where their rows go")
    files = _given(inputs)
    files = list(dict.fromkeys(files)) if out_file else files
    # what is made of each image, by the keys of the rows
    made: dict[str, dict[Path, Path]] = {}
    for key, folder, ending in (("drawn_file", out, DRAWN), ("mask_file", masks, ".png")):
        if folder:
            made[key] = {file: folder / name for file, name in output_names(files, inputs, ending).items()}
    if masks:
        _check_masks(masks, out, inputs, files)
    rows = None
    if out_file:
        texts = [_text(file) for file in files]
        rows = Rows(out_file, texts, weights=fingerprint(checkpoint), keys=list(made), rank=rank, world=world)
    mine = files if rows is None else [files[i] for i in rows.left]
    try:
        if world > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{local % torch.cuda.device_count()}"
        task = _opened(checkpoint, device=device, fuse=fuse, top_k=top_k, threshold=threshold, batch_size=batch_size)
        if masks and task.layers != ("masks",):
            raise UserError(f"--masks is for segmentation models, this is a {task.name} model: leave it out")
        if masks:  # a call that was stopped may have left a mask without its row, of its next image
            rest = mine[1:] if rows and rows.continued else mine
            _refuse_to_replace([made["mask_file"][file] for file in rest])
    except UserError:
        if rows:
            rows.abandon()
        raise
    failed = empty = done = 0
    try:
        with Ticker(lambda: f"predicting, {done} of {len(mine)} images done", enabled=rows is not None):
            for file, found in _found(task, mine, batch_size=batch_size, workers=workers):
                row = _row(file, found)
                if isinstance(found, Prediction):
                    empty += not found.lines
                    row |= _write_made(task, file, found, {key: paths[file] for key, paths in made.items()})
                rows.add(row) if rows else print(json_line(row), flush=True)
                failed, done = failed + (not row["ok"]), done + 1
    except KeyboardInterrupt:
        if rows:
            say(f"stopped, {done} of {len(mine)} rows are written: the same command continues there")
        raise
    if done and empty == done:
        where = "the image" if done == 1 else f"any of the {done:,} images"
        say(f"nothing was found on {where}: a lower --threshold shows what the model is less sure of")
    if rows:
        there = rows.finish()
        if there is None:
            say(f"process {rank} of {world} has written its {len(mine)} rows; the other processes are not done yet")
            return 1 if failed else 0
        failed, mine = sum(not row["ok"] for row in there), files
        say(f"{len(files)} rows are in {out_file}")
    if failed:
        say(f"{failed} of {len(mine)} files could not be read")
    return 1 if failed else 0


def _given(inputs: Sequence[Path]) -> list[Path]:
    """The images; raises UserError where there are none, or masks among them."""
    for folder in (path for path in inputs if path.is_dir()):
        if found := masked_part(folder):
            part, (images, masks) = found
            what = f"{part} holds images and their masks: give {part / images}"
            raise UserError(printable(f"{what}, and {part / masks} beside it if that holds images, too"))
    return given_images(inputs)


def _opened(checkpoint: Path | str, *, device: str, fuse: bool, **options: Any) -> Task:
    task = load(checkpoint)
    set_options(task, **options)
    return for_inference(task, device, fuse=fuse)


def _write_made(task: Task, file: Path, found: Prediction, places: dict[str, Path]) -> dict[str, str]:
    """Writes what is made of an image, before the row after which it counts as done; the paths, as rows name them."""
    for key, path in places.items():
        if key == "drawn_file":
            _write(found.draw(decode(file, turn=_turned(task))), path)
        elif found.mask:
            _write(found.mask(), path)
    return {key: _text(path) for key, path in places.items()}


def _check_masks(folder: Path, out: Path | None, inputs: Sequence[Path], files: list[Path]) -> None:
    """Raises UserError where masks could replace images, or be taken for some by the next call."""
    own = folder.resolve()
    if out and out.resolve() == own:
        raise UserError(f"--masks and --out are one folder, {folder}: give each its own")
    if own in {file.parent.resolve() for file in files}:
        raise UserError(f"--masks {folder} holds images, which masks could replace: give another folder")
    if any(path.is_dir() and own.is_relative_to(path.resolve()) for path in inputs):
        raise UserError(
            f"--masks {folder} lies among the images, whose next reading finds the masks: give another folder"
        )


def _refuse_to_replace(targets: list[Path]) -> None:
    """Raises UserError where masks are there that nobody may want to lose."""
    if there := [str(target) for target in targets if target.exists()]:
        raise UserError(
            f"{plural(len(there), 'mask')} would be replaced ({some(there, 2)}): give another --masks folder, or "
            "remove them"
        )


def _turned(task: Task) -> bool:
    """Whether images are turned by EXIF: boxes and masks are in the pixels that the model was trained on."""
    return getattr(task.recipe.data, "exif", "turn") == "turn"


class _Files(Dataset):
    def __init__(self, files: list[Path], preprocess: Callable[[Image.Image], Any], *, turn: bool) -> None:
        self.files, self.preprocess, self.turn = files, preprocess, turn

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.preprocess(decode(self.files[index], turn=self.turn))
        except BadImage as error:
            return error


def _found(
    task: Task, files: list[Path], *, batch_size: int | None, workers: int
) -> Iterator[tuple[Path, Prediction | BadImage]]:
    """Every file, in order, with what was found on it or why it cannot be read."""
    size = 1 if task.one_at_a_time else batch_size or BATCH
    images = _Files(files, task.preprocess, turn=_turned(task))
    loader = DataLoader(images, batch_size=size, num_workers=workers, collate_fn=list)
    remaining = iter(files)
    for samples in loader:
        good = [sample for sample in samples if not isinstance(sample, BadImage)]
        found = iter(task.predict(good) if good else [])
        for sample in samples:
            yield next(remaining), sample if isinstance(sample, BadImage) else next(found)


def _row(file: Path, found: Prediction | BadImage) -> dict[str, Any]:
    if isinstance(found, BadImage):
        return dict(file=_text(file), ok=False, error=found.reason)
    return dict(file=_text(file), ok=True) | found.fields


def _text(file: Path) -> str:
    """A path as rows name it: names are UTF-8 nearly everywhere, whatever the locale of this process."""
    try:
        return os.fsencode(file).decode("utf-8")
    except UnicodeDecodeError:
        return str(file)


def _write(image: Image.Image, path: Path) -> None:
    with attempt(f"write the output folder {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with attempt(f"write {path}"):
        image.save(path)
