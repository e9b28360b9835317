"""Evaluation: one loop, in training and afterwards, and the report of a trained model."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch.utils.data import DataLoader

from conv2former.config import EngineSection
from conv2former.data import activity
from conv2former.data.loading import Batches, checked, keyed_loader
from conv2former.data.sampling import EvalSampler
from conv2former.data.sources import Source, Splits, notes, repeated
from conv2former.engine.devices import for_inference
from conv2former.engine.distributed import Processes
from conv2former.engine.launch import make_fabric, place, world_size
from conv2former.engine.progress import Ticker
from conv2former.engine.resuming import recorded_data
from conv2former.engine.run_dir import HELD_OUT_LIST, RunDir
from conv2former.errors import UserError, attempt, is_first, or_left_out, say, say_once
from conv2former.files import replace_text
from conv2former.recipes.load import with_settings
from conv2former.tasks import load, set_options, task_class
from conv2former.tasks.base import Evaluation, Metric, Task

STALL = 60.0  # seconds after which a process that does not advance is named, of several
MOST_COMPARED = 20_000  # training images that those of an evaluation are compared with
BATCH = 64  # images of a forward pass, of a task that takes several


def evaluation_loop(
    task: Task, batches: Iterable[Any], metric: Metric, *, count: int, pace: activity.Pace
) -> Evaluation:
    """Every batch of ``task.eval_dataset`` once.

    Args:
        task: In evaluation mode, on the device of the batches.
        batches: Of this process.
        metric: A new one; to be called on all processes that share the images.
        count: The number of the batches.
        pace: How long they take, for the watchdog.
    """
    metric.to(task.normalizer.mean.device)
    for number, batch in enumerate(batches, 1):
        pace.begin(f"evaluating batch {number} of {count}")
        task.count(batch, lambda: metric)
        pace.end()
    activity.doing("computing the figures of the evaluation")
    return _checked(task, metric.result())


def _checked(task: Task, evaluation: Any) -> Evaluation:
    if not isinstance(evaluation, Evaluation):
        found = type(evaluation).__name__
        raise UserError(f"the evaluation of {task.name} is a {found}: result() of its metric must return an Evaluation")
    for name, there in ((task.monitor, evaluation.metrics), ("images", evaluation.details)):
        if name not in there:
            raise UserError(f"the evaluation of {task.name} lacks {name!r}; it has {', '.join(there)}")
    for name, value in evaluation.metrics.items():
        if not isinstance(value, int | float | None):
            found = type(value).__name__
            raise UserError(f"the evaluation of {task.name}: {name} is a {found}, a number or None is needed")
    return evaluation


@torch.inference_mode()
def evaluate_task(
    task: Task,
    source: Source,
    *,
    batch_size: int | None = None,
    workers: int = 0,
    on_bad_image: Literal["error", "skip"] = "error",
    max_pixels: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Evaluation:
    """Evaluates a model on all images of a source, on the device where it is.

    Args:
        task: The model.
        source: Images that the task knows to read.
        batch_size: Images of a forward pass (64); of one-at-a-time tasks 1. No metric depends on it.
        workers: Processes that read images.
        on_bad_image: 'skip' leaves out those that cannot be read, and says which.
        max_pixels: Larger images count as such; the recipe's ``data.max_pixels`` unless given.
        rank: This process.
        world: Processes that share the images; all get the result.

    Raises:
        UserError: An image that cannot be read, or none that can.
    """
    device = task.normalizer.mean.device
    dataset = task.eval().eval_dataset(
        source,
        on_bad_image="mask" if on_bad_image == "skip" else "error",
        max_pixels=max_pixels or task.recipe.data.max_pixels,
    )
    size = 1 if task.one_at_a_time else batch_size or BATCH
    sampler = EvalSampler(len(dataset), rank=rank, world=world)
    loader = keyed_loader(dataset, sampler=sampler, batch_size=size, workers=workers, device=device)
    done = [0]  # batches
    with Ticker(lambda: f"evaluating, {done[0]} of {len(loader)} batches done", enabled=not sys.stderr.isatty()):
        batches, pace = _announced(loader, device, done), activity.Pace()
        metric = task.metric(source, distributed=world > 1)
        evaluation = evaluation_loop(task, batches, metric, count=len(loader), pace=pace)
    if not evaluation.details["images"]:
        raise UserError("none of the images can be read, or none counts: nothing was evaluated")
    if evaluation.useless:
        say_once(f"warning: {evaluation.useless}: train longer, or start from pretrained weights")
    return evaluation


def _announced(loader: DataLoader, device: torch.device, done: list[int]) -> Iterator[Any]:
    """The batches of a loader on a device, counted in ``done``; images that are left out are named."""
    batches = Batches(loader, device)
    for _ in range(len(loader)):
        activity.doing(activity.WAITING, 1)
        batch = checked(next(batches))
        for error in batch.bad:
            say(f"skipping: {error}")
        yield batch
        done[0] += 1


def evaluate(
    checkpoint: Path | str,
    *,
    data: Path | str | None = None,
    out: Path | str | None = None,
    batch_size: int | None = None,
    workers: int = 2,
    device: str = "auto",
    fuse: bool = True,
    source: str | None = None,
    split: Literal["train", "val", "test"] | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
    multi_scale: bool = False,
    settings: Sequence[str] = (),
) -> tuple[Evaluation, Path | None]:
    """Evaluates a run (its best weights) or a saved model, and writes a report.

    Args:
        checkpoint: Run folder, folder with ``config.json`` and ``model.safetensors``, or the latter file.
        data: Folder of images; None for what the run itself was validated on.
        out: Where the report goes; None for the run folder (``evaluations/NAME`` in it where ``data`` is given), or
            nowhere for a saved model.
        batch_size: Images of a forward pass of a classifier (64).
        workers: Processes that read images.
        device: 'auto', 'cpu', 'cuda', ...
        fuse: Whether the network is re-parameterized first: faster, and equal to about 1e-5.
        source: How a classifier's ``data`` lies there: 'folder', 'tar', 'wds' or 'hfds'.
        split: Which part of the images: 'train', 'val' or 'test'; without ``data`` of what the run was trained on.
        on_bad_image: 'error', or 'skip' to leave out what cannot be read.
        multi_scale: Whether a segmentation model sees every image at six scales and mirrored.
        settings: Changes ``data.key=value`` to the recipe of a detector or segmentation model.

    Processes that torchrun or SLURM has started share the images; the first one writes the report.

    Returns:
        The evaluation, and the folder of its report if one was written.

    Raises:
        UserError: Anything wrong with what was given.
    """
    checkpoint, data, out = Path(checkpoint), None if data is None else Path(data), None if out is None else Path(out)
    task = load(checkpoint)
    set_options(task, batch_size=batch_size, source=source, split=split, multi_scale=multi_scale or None)
    if settings and (data is None or "settings" not in task.options):
        raise UserError("--set says how the --data of a detector or segmentation model lies: leave it out")
    if settings:
        task.recipe = with_settings(task.recipe, [*settings], section="data")
    run, max_pixels = RunDir(checkpoint), None
    if data is None and run.exists():
        images: Any = _own_images(run, task, split)
        max_pixels = run.recipe().data.max_pixels
    else:
        images = task.eval_source(data)
        if warning := _seen_in_training(run, data, images):
            say_once(f"warning: {warning}")
    for line in notes(images):
        say_once(line)
    fabric = _launched(task, device)
    for_inference(task, fabric.device if fabric else device, fuse=fuse)
    options: Any = dict(batch_size=batch_size, workers=workers, on_bad_image=on_bad_image, max_pixels=max_pixels)
    with Processes(fabric, patience=STALL) if fabric else contextlib.nullcontext():
        own: Any = dict(rank=fabric.global_rank, world=fabric.world_size) if fabric else {}
        evaluation = evaluate_task(task, images, **options, **own)
    if fabric and fabric.global_rank:
        return evaluation, None
    folder = out or _report_folder(run, data, split, multi_scale=multi_scale)
    if folder:
        facts = dict(checkpoint=str(checkpoint), data=str(data) if data else None)
        if fabric:
            say("no images are drawn: that needs all images in one process")
        write_report(task, evaluation, images, folder, draw=fabric is None, **facts)
    return evaluation, folder


def _seen_in_training(run: RunDir, data: Path | None, images: Source) -> str | None:
    """What to say where the run was trained on images that it is now evaluated on."""
    if data is None or not run.exists():
        return None
    facts, count = run.facts(), len(images)
    own, parts = recorded_data(facts), facts.get("images", {})
    whole = sum(parts.values())
    divided = count == whole or (count > whole and (run.path / HELD_OUT_LIST).is_file())  # some have no objects
    if own is None or own.resolve() != data.resolve() or not parts.get("train") or not divided:
        return _copied(run, own, images) if 0 < parts.get("train", 0) <= MOST_COMPARED and is_first() else None
    seen = f"the run was trained on {parts['train']:,} of these {count:,} images"
    return f"{seen}: leave --data out to evaluate the others alone"


def _copied(run: RunDir, data: Path | None, images: Source) -> str | None:
    """The line about images that are byte for byte those of the training, as far as that is still there."""
    with contextlib.suppress(UserError, OSError):
        return repeated(task_class(run.recipe().task).open_splits(run.recipe(), data).train, images, what="images")
    return None


def _launched(task: Task, device: str) -> L.Fabric | None:
    """The processes that torchrun or SLURM has started, connected; None for one. Raises UserError."""
    _, count, _ = place()
    if count == 1:
        return None
    accelerator: Any = device.partition(":")[0]  # each process takes its own GPU
    if accelerator not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device} is for one process: use auto, cpu or cuda")
    recipe = task.recipe.model_copy(update=dict(engine=EngineSection(accelerator=accelerator)))
    if world_size(recipe) != count:
        raise UserError(
            f"{count} processes were started that cannot be connected: start them by torchrun, or by "
            "srun in a job of sbatch (not in an interactive one)"
        )
    fabric = make_fabric(recipe)
    fabric.launch()
    return fabric


def write_report(
    task: Task, evaluation: Evaluation, source: Source, folder: Path, *, draw: bool = True, **facts: str | None
) -> None:
    """``evaluation.json`` (with ``facts``) and, with ``draw``, the task's images.

    Raises:
        UserError: They cannot be written.
    """
    with attempt(f"write the report to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "evaluation.json", json.dumps(facts | evaluation.details, indent=2) + "\n")
        if draw:
            with or_left_out("images of the report"):
                task.draw(evaluation, source, folder)


def _report_folder(run: RunDir, data: Path | None, split: str | None, *, multi_scale: bool) -> Path | None:
    if not run.exists():
        return None
    own = data is None and split == "val"  # what is evaluated without any option
    words = [data.resolve().name if data else "", "" if own else split or "", "multi_scale" if multi_scale else ""]
    name = "_".join(word for word in words if word)
    return run.path / "evaluations" / name if name else run.path


def _own_images(run: RunDir, task: Task, split: str | None) -> Any:
    """A part of what a run was trained on; raises UserError where there is no such part."""
    if split != "test":
        splits = validation_set(run)
        return splits.train if split == "train" else splits.val
    data = recorded_data(run.facts())
    if data is None:
        raise UserError(f"the images of {run.path} come with the recipe and have no test part: name some with --data")
    if "source" in task.options:
        set_options(task, source=run.recipe().data.source)  # type: ignore[attr-defined]
    return task.eval_source(data)


def validation_set(run: RunDir) -> Splits:
    """What the run was validated on, in ``val``; refuses data that have changed since, whose split would be another.

    Raises:
        UserError: They have.
    """
    recipe, facts = run.recipe(), run.facts()
    splits = task_class(recipe.task).open_splits(recipe, recorded_data(facts))
    if facts.get("images_hash") != splits.digest():
        raise UserError(f"the images in {facts['data']} are not those of the run: name a folder with --data")
    return splits
