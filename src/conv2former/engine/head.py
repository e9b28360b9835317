"""A new head is fitted to the features of the pretrained network before anything else is trained."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from conv2former.data.loading import Batches, checked, keyed_loader
from conv2former.data.sampling import EvalSampler, Purpose, SampleKey, derive_seed
from conv2former.data.sources import Source
from conv2former.engine.distributed import Processes, agreed
from conv2former.engine.progress import Ticker
from conv2former.engine.signals import Interrupted, StopRequest
from conv2former.engine.torch_settings import cudnn_benchmark
from conv2former.errors import UserError, say_once
from conv2former.tasks.base import Task

MOST_IMAGES = 20_000  # whose features are looked at: a linear layer needs no more


def fits_head(task: Task) -> bool:
    """Whether the head of a task is fitted; says why not, where the recipe asks for it.

    Raises:
        UserError: Nothing but the head is to be fitted, and it cannot be.
    """
    asked = task.recipe.model.fit_head
    if not asked:
        return False
    why = task.cannot_fit_head()
    if why and asked == "only":
        raise UserError(f"--probe-only fits the head alone: {why}; leave it out")
    if why:
        say_once(f"the head is not fitted before training: {why}")
    return not why


@torch.no_grad()
def fit_head(
    task: Task, source: Source, out: Path, *, fabric: L.Fabric, processes: Processes, stop: StopRequest
) -> None:
    """Fits the head of a task, still on the CPU, to images of a source; to be called on all processes.

    The images are prepared as in evaluation; each process computes the features of its own, and all end with the same
    head, the first one's.

    Raises:
        UserError: An image cannot be read, or none can.
        Interrupted: By a signal.
    """
    data, device = task.recipe.data, fabric.device
    skipping = data.on_bad_image == "skip"
    dataset = task.eval_dataset(source, on_bad_image="mask" if skipping else "error", max_pixels=data.max_pixels)
    keys = _keys(len(dataset), task.recipe.engine.seed, fabric)
    size, total = task.recipe.optim.batch_size, len(keys) * fabric.world_size
    found: list[tuple[Tensor, Tensor]] = []
    loader = keyed_loader(dataset, sampler=keys, batch_size=size, workers=data.workers, device=device)

    def progress() -> str:
        done = min(len(found) * size * fabric.world_size, total)
        return f"features of {done:,} of {total:,} images" if done < total else "fitting the head to the features"

    def agree() -> None:
        (signum,) = processes.all_reduce_max(stop.signum or 0)
        if signum:
            raise agreed(Interrupted(out, None, int(signum)))

    task.to(device).eval()
    with Ticker(progress, enabled=fabric.is_global_zero):
        with fabric.autocast(), cudnn_benchmark(False):
            for batch in Batches(loader, device):
                agree()
                features, targets = task.head_features(checked(batch))
                found.append((features.float().cpu(), targets.cpu()))
        parts = processes.all_gather([torch.cat(column) for column in zip(*found, strict=True)])
        features, targets = (torch.cat(column) for column in zip(*parts, strict=True))
        if not len(targets):
            raise agreed(UserError("none of the training images can be read: there is nothing to fit a head to"))
        line, state = "", {}
        if fabric.is_global_zero:
            with torch.enable_grad():
                line = task.fit_head(features.to(device), targets.to(device), stopped=lambda: stop.signum is not None)
            state = {name: tensor.cpu() for name, tensor in task.model.state_dict().items() if task.in_head(name)}
        line, state = processes.all_gather((line, state))[0]
        agree()
    task.cpu().train()
    task.model.load_state_dict(state, strict=False)
    say_once(line)


def _keys(images: int, seed: int, fabric: L.Fabric) -> list[SampleKey]:
    """The images of this process, of at most ``MOST_IMAGES`` over all."""
    order = torch.randperm(images, generator=torch.Generator().manual_seed(derive_seed(Purpose.SPLIT, seed)))
    sampler = EvalSampler(min(images, MOST_IMAGES), rank=fabric.global_rank, world=fabric.world_size)
    return [key if key.padding else SampleKey(0, int(order[key.image])) for key in sampler]
