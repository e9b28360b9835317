"""A new head is fitted to the features of the pretrained network before anything else is trained."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from conv2former.data.loading import checked, eval_loader
from conv2former.data.sampling import EvalSampler
from conv2former.data.sources import Source
from conv2former.engine.distributed import Processes, agreed
from conv2former.engine.progress import Ticker
from conv2former.engine.signals import Interrupted, StopRequest
from conv2former.engine.torch_settings import cudnn_benchmark
from conv2former.errors import say_once
from conv2former.tasks.base import Task


@torch.no_grad()
def fit_head(
    task: Task, source: Source, out: Path, *, fabric: L.Fabric, processes: Processes, stop: StopRequest
) -> None:
    """Fits the head of a task, still on the CPU, to images of a source; to be called on all processes.

    The images are prepared as in evaluation; each process computes the features of its own, and all end with the same
    head, the first one's.

    Raises:
        UserError: The task has no head that can be fitted, or an image cannot be read.
        Interrupted: By a signal.
    """
    data, device = task.recipe.data, fabric.device
    skipping = data.on_bad_image == "skip"
    dataset = task.eval_dataset(source, on_bad_image="mask" if skipping else "error", max_pixels=data.max_pixels)
    sampler = EvalSampler(len(dataset), rank=fabric.global_rank, world=fabric.world_size)
    size = task.recipe.optim.batch_size
    found: list[tuple[Tensor, Tensor]] = []
    task.to(device).eval()
    total = len(sampler)
    ticker = Ticker(lambda: f"features of {len(found) * size} of {total} images", enabled=fabric.is_global_zero)
    with ticker, fabric.autocast(), cudnn_benchmark(False):
        for batch in eval_loader(dataset, sampler, batch_size=size, workers=data.workers, device=device):
            (signum,) = processes.all_reduce_max(stop.signum or 0)
            if signum:
                raise agreed(Interrupted(out, None, int(signum)))
            features, targets = task.head_features(fabric.to_device(checked(batch)))
            found.append((features.float().cpu(), targets.cpu()))
    parts = processes.all_gather([torch.cat(column) for column in zip(*found, strict=True)])
    features, targets = (torch.cat(column) for column in zip(*parts, strict=True))
    line, state = "", {}
    if fabric.is_global_zero:
        with torch.enable_grad():
            line = task.fit_head(features.to(device), targets.to(device))
        state = {name: tensor.cpu() for name, tensor in task.model.state_dict().items() if task.in_head(name)}
    task.cpu().train()
    line, state = processes.all_gather((line, state))[0]
    task.model.load_state_dict(state, strict=False)
    say_once(line)
