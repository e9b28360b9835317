"""How fast training images are read and augmented, against timm's own loader.

    python benchmarks/input_pipeline.py --data DIR [--workers 1 2] [--images 1024] [--rounds 5] [--json FILE]

DIR holds real photographs as ``conv2former train --data`` takes them: ``train/`` with one folder per class (ImageNet),
or class folders directly. Classes play no part here, so any JPEGs in a folder of DIR will do, COCO's for example; tar
files and other sources are not measured. Where there are fewer than ``--images``, they are taken several times. Files
are read once before the clock runs, so that disks do not count. Use a machine that does nothing else, and leave a core
to the training process.

The augmentation is the recipe imagenet1k_t's at 224 pixels: random crop, flip, RandAugment, normalisation, random
erasing; MixUp, which both sides leave to the training process, is not in it. Three pipelines take turns in every round:

- conv2former: ``conv2former.tasks.classification.data``, and what the task does with a batch before the network;
- timm: ``timm.data.create_loader`` as it comes, whose batches are normalised and erased in the training process;
- timm, floats: the same with ``use_prefetcher=False``, where all is done in the workers.

The table shows medians over the rounds, and the lowest and highest images/s; *ratio* is conv2former's images/s over the
pipeline's, round by round. What a worker spends on an image is split into *decode*, *augment* (with the seeding from
its key), *collate* and *rest*: passing batches on to the training process, and idling where that one is slower. *main*
is what the training process, here one thread on the CPU, spends on an image while the workers go on with the next. The
clock starts when every worker has delivered a batch. The shares need some hundred images to settle.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from conv2former.config import Recipe
from conv2former.data.images import MAX_PIXELS
from conv2former.data.loading import Normalizer, checked, keyed_loader
from conv2former.data.sampling import TrainSampler
from conv2former.engine.machine import machine_facts
from conv2former.errors import UserError
from conv2former.recipes.load import load_recipe
from conv2former.tasks.classification.data import ImageDataset, timm_options, train_transform
from conv2former.tasks.classification.sources import FolderSource, SubsetSource

CPU = torch.device("cpu")
STAGES = ("decode", "augment", "collate", "rest", "main")


class Clock:
    """Seconds and calls of the stages of a pipeline, added up over its processes.

    Attributes:
        sample: Making samples in the workers: decoding and augmenting.
        part: The one of these two that can be timed by itself.
        collate: Making batches of them.
        arrivals: When the training process got each batch.
        waited: How long it waited for each.
        before: What ``totals`` gave when the last worker delivered its first batch.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.sample, self.part, self.collate = (multiprocessing.Array("d", 2) for _ in range(3))
        self.arrivals: list[float] = []
        self.waited: list[float] = []

    def totals(self) -> np.ndarray:
        """Seconds and calls (3, 2) of ``sample``, ``part`` and ``collate``."""
        return np.array([list(total) for total in (self.sample, self.part, self.collate)])

    def arrived(self, waited: float) -> None:
        """Notes a batch."""
        self.arrivals.append(time.perf_counter())
        self.waited.append(waited)
        if len(self.arrivals) == self.workers:
            self.before = self.totals()


class Timed:
    """A function whose time is added to a total."""

    def __init__(self, function: Callable[..., Any], total: Any) -> None:
        self.function, self.total = function, total

    def __call__(self, *arguments: Any) -> Any:
        started = time.perf_counter()
        result = self.function(*arguments)
        seconds = time.perf_counter() - started
        with self.total.get_lock():
            self.total[0] += seconds
            self.total[1] += 1
        return result


class TimedSource(SubsetSource):
    """Images of a source, with the time that reading them takes."""

    def __init__(self, source: FolderSource, indices: list[int], total: Any) -> None:
        super().__init__(source, indices)
        self.timed = Timed(SubsetSource(source, indices).load, total)

    def load(self, index: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
        return self.timed(index, max_pixels)


class TimedDataset(Dataset):
    """A dataset with the time that its samples take; timm's loader sets the transform of the one inside."""

    def __init__(self, dataset: Any, total: Any) -> None:
        self.dataset, self.timed = dataset, Timed(dataset.__getitem__, total)
        self.collate = getattr(dataset, "collate", None)  # timm's loader brings its own

    @property
    def transform(self) -> Any:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Any:
        return self.timed(key)


class TimedLoader:
    """A loader that notes when batches arrive and how long they were waited for."""

    def __init__(self, loader: DataLoader, clock: Clock) -> None:
        loader.collate_fn = Timed(loader.collate_fn, clock.collate)
        self.loader, self.clock = loader, clock

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.clock.arrived(time.perf_counter() - started)
            yield batch


class Benchmark:
    """The pipelines over the same images.

    Args:
        recipe: Its augmentation.
        source: Real images.
        images: How many an epoch has.
        batch_size: Images of a batch.
    """

    def __init__(self, recipe: Recipe, source: FolderSource, *, images: int, batch_size: int) -> None:
        self.recipe, self.source, self.batch_size = recipe, source, batch_size
        self.batches = images // batch_size
        order = np.random.default_rng(0).permutation(len(source))
        self.indices = np.resize(order, self.batches * batch_size).tolist()
        self.pipelines = {"conv2former": self.ours, "timm": self.timm, "timm, floats": self.timm_floats}

    def read_files(self) -> None:
        """Brings the files into the page cache."""
        for index in set(self.indices):
            (self.source.root / self.source.name(index)).read_bytes()

    def ours(self, workers: int, seed: int, clock: Clock) -> Iterator[Tensor]:
        """This package's batches, as the network gets them."""
        data, augment = self.recipe.data, self.recipe.augment
        source = TimedSource(self.source, self.indices, clock.part)
        dataset = ImageDataset(source, train_transform(data, augment), seed=seed)
        sampler = TrainSampler(len(source), self.batch_size, seed=seed, steps=self.batches)
        # the sampler's keys and the loader's settings are those of a training, the dataset is timed
        loader: Any = keyed_loader(TimedDataset(dataset, clock.sample), batch_sampler=sampler, workers=workers)  # type: ignore[arg-type]
        normalise = Normalizer(data.mean, data.std)
        erase = RandomErasing(augment.random_erasing, mode="pixel", device=CPU)  # as in the task's training step
        for batch in TimedLoader(loader, clock):
            yield erase(normalise(checked(batch).images))

    def timm(self, workers: int, seed: int, clock: Clock) -> Iterator[Tensor]:
        """timm's batches of its prefetching loader: 8-bit from the workers, normalised and erased here."""
        loader = self._timm_loader(workers, seed, clock, use_prefetcher=True)
        loader.loader = TimedLoader(loader.loader, clock)
        for images, _ in loader:
            yield images

    def timm_floats(self, workers: int, seed: int, clock: Clock) -> Iterator[Tensor]:
        """timm's batches without its prefetching loader: finished in the workers."""
        for images, _ in TimedLoader(self._timm_loader(workers, seed, clock, use_prefetcher=False), clock):
            yield images

    def _timm_loader(self, workers: int, seed: int, clock: Clock, *, use_prefetcher: bool) -> Any:
        torch.manual_seed(seed)
        data, augment = self.recipe.data, self.recipe.augment
        inner: Any = timm.data.create_dataset("", root=str(self.source.root), search_split=False)
        paths = [str(self.source.root / self.source.name(index)) for index in self.indices]
        inner.reader.samples = [
            (path, self.source.targets[index]) for path, index in zip(paths, self.indices, strict=True)
        ]
        loader = timm.data.create_loader(
            TimedDataset(inner, clock.sample),  # type: ignore[arg-type]
            (3, data.input_size, data.input_size),
            self.batch_size,
            is_training=True,
            **timm_options(data, augment),
            re_prob=augment.random_erasing,
            re_mode="pixel",
            num_workers=workers,
            use_prefetcher=use_prefetcher,
            device=CPU,
        )
        inner.transform = Timed(inner.transform, clock.part)
        return loader

    def measure(self, name: str, workers: int, seed: int) -> dict[str, Any]:
        """One pass of a pipeline: images per second, and milliseconds per image of each stage."""
        clock = Clock(workers)
        for images in self.pipelines[name](workers, seed, clock):
            assert images.shape == (self.batch_size, 3, *2 * (self.recipe.data.input_size,))
            assert images.dtype == torch.float32
            finished = time.perf_counter()  # here, because the workers end with the pass
        # workers start while the first batches are waited for; after one of each they are all under way
        begun, counted = clock.arrivals[workers - 1], (self.batches - workers) * self.batch_size
        seconds = finished - begun
        spent = clock.totals() - clock.before
        sample, part, collate = spent[:, 0] / spent[:, 1] / (1, 1, self.batch_size)
        decode = part if name == "conv2former" else sample - part
        stages = dict(
            decode=decode,
            augment=sample - decode,
            collate=collate,
            rest=seconds * workers / counted - sample - collate,
            main=(seconds - sum(clock.waited[workers : self.batches])) / (counted + self.batch_size),
        )
        return dict(workers=workers, pipeline=name, images_per_second=counted / seconds) | {
            f"{stage}_ms": 1000 * float(value) for stage, value in stages.items()
        }


def table(rows: list[dict[str, Any]]) -> str:
    """Medians per pipeline and number of workers, in plain text."""
    lines = [
        f"{'workers':>7}  {'pipeline':<12}  {'images/s':>8}  {'lowest-highest':>15}  {'per worker':>10}  {'ratio':>5}"
        + "".join(f"  {stage + ', ms':>13}" for stage in STAGES)
    ]
    groups = dict.fromkeys((row["workers"], row["pipeline"]) for row in rows)
    for workers, name in groups:
        group = [row for row in rows if (row["workers"], row["pipeline"]) == (workers, name)]
        speeds = [row["images_per_second"] for row in group]
        middle = median(speeds)
        cells = []
        for stage in STAGES:
            value = median(row[f"{stage}_ms"] for row in group)
            share = "" if stage == "main" else f" ({value * middle / workers / 10:3.0f}%)"
            cells.append(f"  {value:.2f}{share}".rjust(15))
        ours = [
            row["images_per_second"] for row in rows if (row["workers"], row["pipeline"]) == (workers, "conv2former")
        ]
        ratio = median(own / speed for own, speed in zip(ours, speeds, strict=True))
        lines.append(
            f"{workers:>7}  {name:<12}  {middle:8.1f}  {f'{min(speeds):.1f}-{max(speeds):.1f}':>15}  "
            f"{middle / workers:10.1f}  {ratio:5.2f}" + "".join(cells)
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="class folders of photographs, or what holds train/")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers to measure")
    parser.add_argument("--images", type=int, default=1024, help="images per pipeline and round")
    parser.add_argument("--rounds", type=int, default=5, help="how often the pipelines take turns")
    parser.add_argument("--json", type=Path, help="file for the machine and the rows of all rounds")
    options = parser.parse_args(arguments)
    most = max(options.workers)
    if min(options.workers) < 1 or options.rounds < 1 or options.images < 8 * most:
        parser.error("--workers and --rounds must be at least 1, --images at least 8 per worker")
    torch.set_num_threads(1)  # the training process, like each worker: more would fight over the workers' cores
    # without the spread of the magnitude, whose highest value ends timm's own loader in an error (posterize to 0 bits)
    recipe = load_recipe("imagenet1k_t", overrides=["augment.auto_augment=rand-m9-inc1"])
    try:
        source = FolderSource(options.data / "train" if (options.data / "train").is_dir() else options.data)
    except UserError as error:
        sys.exit(f"error: {error}")
    # the recipe's batch, or what gives every worker eight of them
    batch_size = min(recipe.optim.batch_size, options.images // (8 * most))
    benchmark = Benchmark(recipe, source, images=options.images, batch_size=batch_size)
    benchmark.read_files()
    print(
        f"{benchmark.batches} batches of {batch_size} images of {len(source)} files, {options.rounds} rounds, "
        f"timm {timm.__version__}, torch {torch.__version__}"
    )
    rows = []
    for workers in options.workers:
        for number in range(options.rounds):
            for name in benchmark.pipelines:
                row = benchmark.measure(name, workers, number) | dict(round=number)
                rows.append(row)
                print(
                    f"{workers} workers, round {number + 1}, {name}: {row['images_per_second']:.1f} images/s",
                    flush=True,
                )
    print(table(rows))
    if options.json:
        facts = machine_facts() | dict(batch_size=batch_size, images=len(benchmark.indices), files=len(source))
        options.json.write_text(json.dumps(facts | dict(rows=rows), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
