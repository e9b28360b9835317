"""The dry run: what a training would do, worked out without data and without a run folder."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from conv2former.checkpoints.hub import MissingWeights
from conv2former.config import OptimSection, Recipe
from conv2former.data.sampling import steps_per_epoch
from conv2former.data.sources import Splits, remarks
from conv2former.engine import trial
from conv2former.engine.automatic import checked_weights, choices, settled
from conv2former.engine.batch import BatchPlan, fitting_worlds, plan_batch
from conv2former.engine.launch import on_nvidia_gpu
from conv2former.engine.optim import build_optimizer, build_schedule, scaled_lr
from conv2former.engine.progress import duration
from conv2former.engine.torch_settings import slow_precision
from conv2former.errors import UserError, attempt, plural, printable, say_once, some
from conv2former.models.meta import SkipFilling
from conv2former.tasks import task_class
from conv2former.tasks.base import Task
from conv2former.viz import plots

OTHER_WORLDS = (1, 8, 32)
POINTS = 1000  # of the drawn curves
ASSUMED_IMAGES = 1000  # where their number is unknown, for settings that follow from it
TIMED_IMAGES = 4  # of a step on a CPU
LEFT_OUT = (
    "An estimate; it leaves out what the backward pass holds for a moment, DDP's buckets (as much as the gradients),\n"
    "with gradient checkpointing the block that is recomputed, the libraries' workspaces, fragmentation and the CUDA "
    "context."
)


@dataclass(frozen=True)
class Images:
    """The training set.

    Attributes:
        count: Training images; None where nobody has said.
        classes: Classes; None likewise.
        origin: A sentence that says where the numbers are from.
        remarks: What is to be said of the images.
    """

    count: int | None
    classes: int | None
    origin: str
    remarks: Sequence[str] = ()


def dry_run(recipe: Recipe, *, data: Path | None, out: Path | None, verbose: bool = False) -> str:
    """Works out what training ``recipe`` would do.

    The weights to start from are looked at; that they do not exist yet is a line, as they may come from a run that has
    not happened.

    Args:
        recipe: What would be trained.
        data: Folder of images to count; None for the numbers of the recipe's claim.
        out: Image (.png) of learning rate and weight decay to write; with any other, a run folder, nothing is written.
        verbose: Whether to describe the recipe, the groups of parameters and the memory in full.

    Returns:
        The text to print.

    Raises:
        UserError: Anything that would stop the training before its first step, as far as it can be seen here.
    """
    recipe, images, start = _decided(recipe, data)
    batch = plan_batch(recipe, world=recipe.claim.processes)
    task = build_without_memory(recipe, classes=images.classes or task_class(recipe.task).assumed_classes)
    lr = scaled_lr(recipe.optim, batch)
    optimizer = build_optimizer(task.model, recipe.optim, lr=lr, head=task.in_head)
    per_epoch = None if images.count is None else _steps_per_epoch(images.count, batch)
    network, groups = _network(task), _groups(optimizer)
    memory = _memory(task, batch)
    chart = out if out and out.suffix.lower() == ".png" else None
    if chart:
        # where the images are unknown the curve is drawn with enough steps to be smooth
        schedule = build_schedule(optimizer, recipe.schedule, steps_per_epoch=per_epoch or POINTS)
        _draw(recipe, optimizer, schedule, per_epoch, chart)
    steps = _steps(recipe, images.count, batch, per_epoch)
    head = f"Dry run of {recipe.name}: nothing is trained."
    drawn = f"{chart} shows the learning rate" if chart else "--out FILE.png draws the learning rate"
    summary = [
        head,
        *network[:1],
        f"starts from {start}",
        *images.origin.splitlines(),
        *images.remarks,
        *_batch(recipe, batch),
        *steps,
        f"memory: {memory[-1].split(maxsplit=1)[1]} of tensors for each process, estimated; libraries come on top",
        f"time: {_time(recipe, images, batch, per_epoch)}",
        *filter(None, [slow_precision(recipe, torch.device("cuda" if on_nvidia_gpu(recipe) else "cpu"))]),
        drawn + ("" if verbose else "; --verbose shows the recipe and all numbers"),
    ]
    said = "\n".join(map(printable, summary))
    if not verbose:
        return said
    parts = [
        ["recipe", recipe.to_yaml().rstrip(), f"hash {recipe.digest()}"],
        ["data", images.origin],
        ["batch", *_batch(recipe, batch), *_worlds(recipe, images.count)],
        ["steps", *steps, _going_on(recipe, batch)],
        ["parameter groups", *groups],
        ["network", *network],
        ["memory per process", *memory, LEFT_OUT],
    ]
    return "\n\n".join([said, *("\n".join([f"== {title}", *lines]) for title, *lines in parts)])


def _decided(recipe: Recipe, data: Path | None) -> tuple[Recipe, Images, str]:
    """The recipe with nothing left open, its images, and what it starts from."""
    recipe = recipe.decided(on_nvidia_gpu(recipe))
    named = recipe.model.weights
    try:
        weights = checked_weights(recipe)
        start = f"{named} ({weights.architecture})" if weights else "random weights"
        args = weights.args if weights else {}
    except MissingWeights as error:
        start, args = f"{named}, which is not there yet: {error}", {}
        without = recipe.model.model_copy(update=dict(weights=None))
        recipe, weights = recipe.model_copy(update=dict(model=without)), None
    if data is not None or recipe.brings_data:
        recipe, splits = settled(recipe, data, weights)
        images = _counted(splits, data, recipe)
    else:
        images = _claimed(recipe)
        found = choices(recipe, weights, images.count or ASSUMED_IMAGES)
        if images.count is None and set(recipe.auto) - {*recipe.left_open}:
            images = replace(images, origin=f"{images.origin}; settings as for {ASSUMED_IMAGES:,} images")
        recipe = recipe.settled({key: value for key, (value, _) in found.items()})
    section = recipe.model.model_copy(update=dict(args=args | recipe.model.args))
    return recipe.model_copy(update=dict(model=section)), images, start


def _time(recipe: Recipe, images: Images, batch: BatchPlan, per_epoch: int | None) -> str:
    """How long the steps would take on this machine: a step is timed, where the recipe is meant for such a machine."""
    claim, gpu = recipe.claim, on_nvidia_gpu(recipe)
    if per_epoch is None:
        return "unknown without --data"
    if batch.world > 1 or ("GPU" in claim.hardware and not gpu):
        known = "nobody has measured it" if claim.time == "not run" else f"{claim.time} there"
        return f"not measured here; the recipe is meant for {claim.hardware} ({known})"
    busy = False
    with contextlib.suppress(AttributeError, OSError):  # what not every system knows
        busy = not gpu and os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1)
    try:
        count, seconds = _timed(recipe, images, batch, torch.device("cuda" if gpu else "cpu"))
    except torch.OutOfMemoryError:
        return "the batch does not fit into the memory of the GPU: lower optim.batch_size"
    total = seconds / count * batch.total * recipe.schedule.total(per_epoch)
    return f"about {duration(total)} of training here ({count} images took {seconds:.2g} s), evaluation not counted" + (
        "; the processor was busy in the last minute: on an idle one it may be much faster" if busy else ""
    )


def _timed(recipe: Recipe, images: Images, batch: BatchPlan, device: torch.device) -> tuple[int, float]:
    """The images of a real forward and backward pass, and its seconds."""
    names = [str(index) for index in range(images.classes or task_class(recipe.task).assumed_classes)]
    task = task_class(recipe.task).build(recipe, names).to(device).train()
    count = batch.per_process if device.type == "cuda" else min(batch.per_process, TIMED_IMAGES)
    example = move_data_to_device(task.example_batch(count), device)
    half = recipe.engine.precision != "32"
    say_once(f"timing a step of {count} images")
    took = []
    for _ in range(4):  # the first warms up, the others may be disturbed
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = task.training_step(example)
        loss.backward()
        loss.item()
        took.append(time.perf_counter() - began)
    return count, min(took[1:])


def build_without_memory(recipe: Recipe, *, classes: int) -> Task:
    """The task on the meta device, whatever its ``model.weights``.

    Raises:
        UserError: Unknown model or argument.
    """
    section = recipe.model.model_copy(update=dict(weights=None))
    names, build = [str(index) for index in range(classes)], task_class(recipe.task).build
    try:
        with torch.device("meta"), SkipFilling():
            return build(recipe, names, section=section)
    except (UserError, NotImplementedError, RuntimeError):
        # the user's mistake, which comes again below, or a network that looks at values meanwhile
        return build(recipe, names, section=section).to("meta")


def saved_bytes(module: nn.Module, step: Callable[[], Any], *, half: bool) -> int:
    """Bytes that a forward pass with its loss keeps for the backward pass, each storage counted once.

    Parameters and buffers are not counted, autocast's copies of them are. The tensors may be fake: autocast on the
    CPU then stands for the GPU's, whose lists of operations differ in little that these networks use.

    Args:
        module: Whose parameters and buffers are not counted.
        step: Computes the loss.
        half: Whether autocast computes in 16 bits.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that its address is not given to another
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        step()
    return sum(storage.nbytes() for storage in kept.values())


@dataclass(frozen=True)
class Activations:
    """What training keeps for the backward pass.

    Attributes:
        fixed: Bytes, whatever the batch.
        per_image: Bytes for each image of it.
        whole: Whether they are those of the whole network; else of its trunk.
    """

    fixed: int
    per_image: int
    whole: bool


def activations(task: Task) -> Activations:
    """What training a task keeps, found by training steps on fake tensors.

    Args:
        task: On the meta device; its tensors are replaced by fake ones.

    Raises:
        UserError: The network does not take images of that size.
    """
    half = task.recipe.engine.precision != "32"
    with trial.refusals(task), FakeTensorMode(allow_non_fake_inputs=True):
        if task.recipe.engine.grad_checkpointing:
            task.model.set_grad_checkpointing()
        task.to_empty(device="cpu").train()
        # one image would be too few for batch norm on a map of one position, and for mixing in pairs
        whole = trial.step(task, 2) is not None
        compute = trial.step if whole else trial.stand_in
        two, four = (saved_bytes(task, partial(compute, task, count), half=half) for count in (2, 4))
    per_image = (four - two) // 2
    return Activations(two - 2 * per_image, per_image, whole)


def state_bytes(optim: OptimSection) -> dict[int, float] | None:
    """Bytes of optimizer state for each value of a parameter, by the parameter's dimensions.

    Found by a step on a network of a few weights, because optimizers differ even between matrices and vectors (muon).
    Those that store rows and columns in place of matrices come out too large.

    Returns:
        For 1, 2 and 4 dimensions; None where the optimizer needs more than gradients to step.
    """
    tiny = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 16))
    optimizer = build_optimizer(tiny, optim.model_copy(update=dict(layer_decay=None)), lr=1e-3)
    try:
        tiny(torch.ones(2, 4, 3, 3)).square().mean().backward()
        optimizer.step()
    except (RuntimeError, TypeError, ValueError):
        return None
    found = {}
    for parameter in tiny.parameters():
        tensors = [value for value in optimizer.state[parameter].values() if torch.is_tensor(value)]
        # what is not as large as a vector is a step counter
        held = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.numel() > 1)
        found[parameter.ndim] = held / parameter.numel()
    return found


def _counted(splits: Splits, data: Path | None, recipe: Recipe) -> Images:
    train, val, classes = len(splits.train), len(splits.val), len(splits.train.classes)
    where = data or "the recipe's own images"
    counts = f"{train:,} training and {val:,} validation images"
    said = [line for line in remarks(splits, recipe.data) if not line.endswith(counts)]
    return Images(train, classes, f"{counts} of {classes:,} classes: {where}", said)


def _claimed(recipe: Recipe) -> Images:
    kind, claim = task_class(recipe.task), recipe.claim
    fraction = getattr(recipe.data, "val_fraction", 0.0)
    if claim.images is None:
        known = f"{claim.classes:,} classes" if claim.classes else f"{kind.assumed_classes:,} classes are assumed"
        return Images(None, claim.classes, f"number of images unknown ({known}): --data DIR tells it")
    held = round(claim.images * fraction)
    classes = claim.classes or kind.assumed_classes
    text = f"{claim.images:,} images of {classes:,} classes, by the recipe's claim; --data DIR counts"
    text += f"\nabout {held:,} of them are held out (data.val_fraction={fraction})" if held else ""
    return Images(claim.images - held, claim.classes, text)


def _steps_per_epoch(images: int, batch: BatchPlan) -> int:
    steps = steps_per_epoch(images, batch.total)
    if not steps:
        raise UserError(
            f"{images} training images are fewer than one batch of {batch.total}: lower optim.batch_size, "
            "optim.accumulate or optim.global_batch"
        )
    return steps


def _batch(recipe: Recipe, batch: BatchPlan) -> list[str]:
    optim = recipe.optim
    return [
        f"{batch.per_process} images per process x {plural(batch.world, 'process', 'processes')} (claim.processes) x "
        f"{plural(batch.accumulate, 'micro-batch', 'micro-batches')} = effective batch {batch.total:,}",
        f"learning rate: {optim.base_lr:g} x {batch.total:,} / {optim.base_batch:,} = {scaled_lr(optim, batch):g}",
    ]


def _going_on(recipe: Recipe, batch: BatchPlan) -> str:
    counts, reason = fitting_worlds(recipe, batch)
    return f"resumes unchanged on {some([*map(str, counts)], 12)} processes: {reason}"


def _worlds(recipe: Recipe, images: int | None) -> list[str]:
    rows = []
    for world in OTHER_WORLDS:
        try:
            batch = plan_batch(recipe, world=world)
        except UserError as error:
            rows.append([str(world), str(error)])
            continue
        steps = "?" if images is None else f"{steps_per_epoch(images, batch.total):,}"
        rate = f"{scaled_lr(recipe.optim, batch):g}"
        rows.append(
            [str(world), str(batch.per_process), str(batch.accumulate), f"{batch.total:,}", rate, steps],
        )
    return _table(
        ["processes", "per process", "accumulate", "effective batch", "learning rate", "steps per epoch"], rows
    )


def _steps(recipe: Recipe, images: int | None, batch: BatchPlan, per_epoch: int | None) -> list[str]:
    schedule = recipe.schedule
    if images is None or per_epoch is None:
        counted = schedule.warmup_steps is not None
        rise = f"{schedule.warmup_steps:,} steps" if counted else f"{schedule.warmup_epochs:g} epochs"
        return [f"{schedule.length()}, {rise} of them warm-up; steps unknown without --data"]
    steps, warmup = schedule.total(per_epoch), schedule.warmup(per_epoch)
    return [
        f"{images:,} images / {batch.total:,} = {per_epoch:,} steps per epoch (the rest of an epoch is left out)",
        f"{warmup:,} steps of warm-up ({warmup / per_epoch:.3g} epochs)",
        f"{steps:,} steps in all ({steps / per_epoch:.4g} epochs), evaluated every {schedule.interval(per_epoch):,}",
    ]


def _groups(optimizer: torch.optim.Optimizer) -> list[str]:
    scales = sorted({group.get("lr_scale", 1.0) for group in optimizer.param_groups})
    rows = []
    for group in optimizer.param_groups:
        scale, decay = group.get("lr_scale", 1.0), group["weight_decay"]
        name = "decayed" if decay else "not decayed"
        name = f"layer {scales.index(scale)}, {name}" if len(scales) > 1 else name
        count = sum(parameter.numel() for parameter in group["params"])
        rows.append([name, str(len(group["params"])), f"{count:,}", f"{decay:g}", f"{scale:.4g}"])
    return _table(["group", "tensors", "parameters", "weight decay", "lr scale"], rows)


def _network(task: Task) -> list[str]:
    """Parameters of each part, and multiply-adds of the part that can be exported."""
    section, model = task.recipe.model, task.model
    sizes = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    total = sum(p.numel() for p in model.parameters())
    own = ", ".join(f"{name} {size:,}" for name, size in sizes.items() if size)
    lines = [f"{section.name}: {total:,} parameters ({own})"]
    with trial.refusals(task), contextlib.suppress(UserError):  # a task may have nothing that can be exported
        part = task.exportable()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            part.network.eval()(torch.empty(1, 3, *part.size, device="meta"))
        macs, (height, width) = counter.get_total_flops() / 2e9, part.size
        of = f" in {part.part}" if part.part else ""
        lines.append(f"{macs:.3f} G multiply-adds{of} for an image of {height} x {width} pixels")
    return lines


def _memory(task: Task, batch: BatchPlan) -> list[str]:
    recipe, model = task.recipe, task.model
    parameters = list(model.parameters())
    weights = sum(tensor.nbytes for tensor in (*parameters, *model.buffers()))
    gradients = sum(parameter.nbytes for parameter in parameters)
    per_value = state_bytes(recipe.optim)
    state = sum(p.numel() * (per_value.get(p.ndim) or max(per_value.values())) for p in parameters) if per_value else 0
    found = activations(task)
    shards = batch.world if recipe.engine.strategy == "fsdp" else 1
    sharded = f", 1/{shards} of it by FSDP" if shards > 1 else ""
    width = "32 bits" if recipe.engine.precision == "32" else "16 bits under autocast"
    width += ", of checkpointed blocks the inputs" if recipe.engine.grad_checkpointing else ""
    held = f"{batch.per_process} images x {found.per_image / 2**20:.1f} MiB + {found.fixed / 2**20:.0f} MiB; {width}"
    held += "" if found.whole else "; of the backbone alone, the rest depends on values"
    rows = [
        ("weights", weights / shards, f"32 bits{sharded}"),
        ("gradients", gradients / shards, f"32 bits{sharded}"),
        ("optimizer state", state / shards, recipe.optim.name + (sharded if per_value else ": unknown, not counted")),
        ("averaged weights", weights if recipe.optim.ema_decay else 0, "" if recipe.optim.ema_decay else "none"),
        ("activations", found.fixed + found.per_image * batch.per_process, held),
    ]
    rows.append(("sum", sum(size for _, size, _ in rows), ""))
    return _table(["what", "size", ""], [[name, _size(size), note] for name, size, note in rows])


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _draw(recipe: Recipe, optimizer: torch.optim.Optimizer, schedule: Any, per_epoch: int | None, chart: Path) -> None:
    scale = per_epoch or POINTS
    steps = np.unique(np.linspace(0, recipe.schedule.total(scale) - 1, POINTS).round().astype(int))
    rates, decay = [], []
    for step in steps:
        schedule.step_update(int(step))
        rates.append([group["lr"] for group in optimizer.param_groups])
        decay.append(max(group["weight_decay"] for group in optimizer.param_groups))
    highest, lowest = np.max(rates, axis=1), np.min(rates, axis=1)
    curves: dict[str, Any] = {"learning rate": highest}
    if (lowest < highest).any():
        curves = {"last layer": highest, "first layer": lowest}
    with attempt(f"write {chart}"):
        chart.parent.mkdir(parents=True, exist_ok=True)
        plots.schedule((steps / scale).tolist(), curves, decay, chart, steps_per_epoch=per_epoch)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned lines; a row may be shorter than the columns, its last cell then runs on."""
    full = [row for row in (columns, *rows) if len(row) == len(columns)]
    widths = [max(len(row[i]) for row in full) for i in range(len(columns))]
    lines = (zip(row, widths, strict=False) for row in (columns, *rows))
    return ["  ".join(cell.ljust(width) for cell, width in line).rstrip() for line in lines]
