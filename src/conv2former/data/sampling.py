"""Keyed randomness: every random choice is a function of a key, so that nothing but the step has to be saved.

The order of an epoch comes from (seed, epoch), an image's augmentation from (seed, epoch, index), drop path and MixUp
from (seed, step, micro-batch, rank). A run that stops anywhere therefore continues with the very numbers it would have
drawn.
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler


class Purpose(IntEnum):
    """The first part of every key, so that two purposes never share a stream of numbers."""

    ORDER = 1
    AUGMENT = 2
    STEP = 3
    SPLIT = 4
    INIT = 5


class SampleKey(NamedTuple):
    """One image in one epoch."""

    epoch: int
    image: int
    padding: bool = False  # only there so that all processes have equally many images; it does not count


def derive_seed(purpose: Purpose, *key: int) -> int:
    """A 64-bit seed for a key; different keys give independent streams."""
    # a cryptographic hash costs two microseconds, NumPy's SeedSequence fifty: this is done for every image
    words = struct.pack(f"<{len(key) + 1}q", purpose, *key)
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")


def seed_all(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch (all devices) in this process."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


def seed_cpu(purpose: Purpose, *key: int) -> None:
    """Seeds Python, NumPy and PyTorch's CPU generator from a key, for an image's augmentation."""
    seed = derive_seed(purpose, *key)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


@dataclass(eq=False)
class TrainSampler(Sampler[list[SampleKey]]):
    """Batches of keys for one process, from optimizer step ``start`` to ``steps``, over as many epochs as that takes.

    An optimizer step takes the next ``batch_size * world * accumulate`` images of the epoch's permutation, however many
    processes there are; what is left at the end of an epoch is dropped.

    """

    size: int  # images in the training set
    batch_size: int  # images per process and forward pass
    _: KW_ONLY
    seed: int  # of the run
    steps: int  # optimizer steps of the whole run
    start: int = 0  # first optimizer step to give
    accumulate: int = 1  # forward passes per optimizer step
    rank: int = 0  # this process
    world: int = 1  # how many processes

    def __post_init__(self) -> None:
        self.steps_per_epoch = steps_per_epoch(self.size, self.batch_size * self.world * self.accumulate)

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, order = -1, np.empty(0, np.int64)
        for step in range(self.start, self.steps):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = np.random.default_rng(derive_seed(Purpose.ORDER, self.seed, epoch)).permutation(self.size)
            first = step % self.steps_per_epoch * self.accumulate * self.world
            for micro_batch in range(self.accumulate):
                at = (first + micro_batch * self.world + self.rank) * self.batch_size
                yield [SampleKey(epoch, int(index)) for index in order[at : at + self.batch_size]]


def steps_per_epoch(size: int, global_batch: int) -> int:
    """Full optimizer steps in one pass over ``size`` images."""
    return size // global_batch


@dataclass(eq=False)
class EvalSampler(Sampler[SampleKey]):
    """This process's images, in order; over all processes each image exactly once.

    All processes get equally many, since they work together on every batch; the images added for that are ``padding``.
    """

    size: int
    _: KW_ONLY
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        return -(-self.size // self.world)

    def __iter__(self) -> Iterator[SampleKey]:
        for index in range(self.rank, len(self) * self.world, self.world):
            yield SampleKey(0, index) if index < self.size else SampleKey(0, 0, padding=True)
