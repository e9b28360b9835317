"""What the training step costs beyond a bare loop: same network, same images in memory, forward, backward, step.

    python benchmarks/step_overhead.py --model conv2former_n --size 224 --batch 8 --steps 20

The engine's own loop runs (keyed seeds, 8-bit pictures made to floats, checks for losses that are not finite,
agreement, schedule, figures), with images that lie in memory instead of a loader; before each of its steps a bare step
of a copy of the network is taken on the same images, already normalised. So both are timed in turn in one process, and
the medians are compared. MixUp and erasing are off, since a bare loop has none.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conv2former.engine.distributed import Processes
from conv2former.engine.launch import make_fabric
from conv2former.engine.optim import build_optimizer
from conv2former.engine.run_dir import RunDir
from conv2former.engine.signals import StopRequest
from conv2former.engine.trainer import Trainer
from conv2former.errors import UserError
from conv2former.recipes import Recipe, load_recipe
from conv2former.tasks.classification.data import Batch
from conv2former.tasks.classification.layouts import open_splits
from conv2former.tasks.classification.network import build_model
from conv2former.tasks.classification.task import ClassificationTask


class Enough(Exception):
    """All steps are measured."""


class TimedLoop(Trainer):
    """The engine's loop on one batch in memory, with a bare step before each of its own."""

    def prepare(self, bare: nn.Module, size: int, steps: int) -> None:
        """Makes the batch and the bare loop's optimizer."""
        count, pixels = self.batch.per_process, torch.randint(256, (self.batch.per_process, size, size, 3))
        images = pixels.to(torch.uint8).permute(0, 3, 1, 2).to(self.fabric.device)
        targets = (torch.arange(count) % 10).to(self.fabric.device)
        self.memory, self.steps_wanted = Batch(images, targets, targets), steps
        self.bare = bare.to(self.fabric.device).to(memory_format=torch.channels_last).train()
        self.floats = self.task.normalizer(images)
        self.bare_optimizer = build_optimizer(bare, self.recipe.optim, lr=self.lr)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=self.recipe.augment.label_smoothing)
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.began = 0.0

    def _wait(self) -> float:
        if self.fabric.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _fetch(self, batches: Iterator[Any], count: int | None = None) -> tuple[list[Batch], UserError | None]:
        now = self._wait()
        if self.began:
            self.ours.append(now - self.began)
        if len(self.ours) == self.steps_wanted:
            raise Enough
        now = self._wait()
        with self.fabric.autocast():
            loss = self.criterion(self.bare(self.floats), self.memory.targets)
        loss.backward()
        self.bare_optimizer.step()
        self.bare_optimizer.zero_grad(set_to_none=True)
        self.theirs.append(self._wait() - now)
        self.began = self._wait()
        return [self.memory], None


def measure(recipe: Recipe, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of each step: ours, the bare loop's."""
    splits = open_splits(recipe.data, None, seed=0)
    task = ClassificationTask.build(recipe, splits.train.classes)
    bare, *_ = build_model(recipe.model, classes=splits.train.classes)
    bare.load_state_dict(task.model.state_dict())
    fabric = make_fabric(recipe)
    fabric.launch()
    with tempfile.TemporaryDirectory() as folder, StopRequest() as stop, Processes(fabric) as processes:
        run = RunDir.create(Path(folder) / "run", recipe, {}, overwrite=False)
        loop = TimedLoop(task, splits, fabric, processes, stop)
        loop.prepare(bare, recipe.data.input_size, steps)
        with contextlib.suppress(Enough):
            loop.fit(run)
    return loop.ours, loop.theirs


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="conv2former_n")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--precision", default="32")
    parser.add_argument("--json", type=Path, help="append the result to this file")
    given = parser.parse_args()
    off = ["augment.mixup=0", "augment.cutmix=0", "augment.random_erasing=0", "model.drop_path_rate=0"]
    data = ["data.source=digits", "data.val_fraction=0.2", "data.workers=0", f"data.input_size={given.size}"]
    size = [f"optim.batch_size={given.batch}", f"optim.global_batch={given.batch}", "engine.checkpoint_minutes=1000"]
    name = [f"model.name={given.model}", f"engine.precision={given.precision}", "schedule.warmup_epochs=1"]
    recipe = load_recipe("imagenet1k_n", overrides=[*off, *data, *size, *name])
    ours, theirs = (times[given.warmup :] for times in measure(recipe, given.steps + given.warmup))
    ratios = [a / b for a, b in zip(ours, theirs, strict=False)]
    row = dict(
        model=given.model,
        size=given.size,
        batch=given.batch,
        precision=given.precision,
        threads=torch.get_num_threads(),
        device=str(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"),
        steps=len(ours),
        engine_ms=round(1e3 * statistics.median(ours), 1),
        bare_ms=round(1e3 * statistics.median(theirs), 1),
        overhead_percent=round(100 * (statistics.median(ratios) - 1), 2),
    )
    print(f"engine {row['engine_ms']} ms, bare loop {row['bare_ms']} ms (medians of {row['steps']} steps)")
    quartiles = statistics.quantiles(ratios, n=4)
    print(
        f"overhead {row['overhead_percent']}% (median of ratios; quartiles {100 * quartiles[0] - 100:.2f}% and "
        f"{100 * quartiles[2] - 100:.2f}%)"
    )
    if given.json:
        with given.json.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
