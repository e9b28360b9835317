"""Keyed randomness: every random choice is a function of a key, so that nothing but the step has to be saved.

The order of an epoch comes from (seed, epoch), an image's augmentation from (seed, epoch, index), drop path and MixUp
from (seed, step, part of the step, rank). A run that stops anywhere therefore continues with the very numbers it would
have drawn.
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterator
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
    """One image in one epoch; ``padding`` for one that only fills up a process's share and does not count."""

    epoch: int
    image: int
    padding: bool = False


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
    """Seeds Python, NumPy and PyTorch's CPU generator from a key: what an image's augmentation draws from."""
    seed = derive_seed(purpose, *key)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


class TrainSampler(Sampler[list[SampleKey]]):
    """Batches of keys for one process, from optimizer step ``start`` to ``steps``, over as many epochs as that takes.

    An optimizer step takes ``batch_size * world * accumulate`` images off the epoch's permutation, whichever way they
    are dealt out; what is left at the end of an epoch is dropped.

    Args:
        size: Images in the training set.
        batch_size: Images per process and forward pass.
        seed: Of the run.
        steps: Optimizer steps of the whole run.
        start: First optimizer step to give.
        accumulate: Forward passes per optimizer step.
        rank: This process.
        world: All processes.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int,
        steps: int,
        start: int = 0,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.steps, self.start, self.accumulate = steps, start, accumulate
        self.rank, self.world = rank, world
        self.steps_per_epoch = steps_per_epoch(size, batch_size * world * accumulate)

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, order = -1, np.empty(0, np.int64)
        for step in range(self.start, self.steps):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = np.random.default_rng(derive_seed(Purpose.ORDER, self.seed, epoch)).permutation(self.size)
            first = step % self.steps_per_epoch * self.accumulate * self.world
            for part in range(self.accumulate):
                at = (first + part * self.world + self.rank) * self.batch_size
                yield [SampleKey(epoch, int(index)) for index in order[at : at + self.batch_size]]


def steps_per_epoch(size: int, global_batch: int) -> int:
    """Full optimizer steps in one pass over ``size`` images."""
    return size // global_batch


class EvalSampler(Sampler[SampleKey]):
    """This process's share of the images, each exactly once over all processes, in order.

    All shares are of one length, so that processes that work together on every batch stay together; what fills a share
    up is marked as padding.
    """

    def __init__(self, size: int, *, rank: int = 0, world: int = 1) -> None:
        self.size, self.rank, self.world = size, rank, world

    def __len__(self) -> int:
        return -(-self.size // self.world)

    def __iter__(self) -> Iterator[SampleKey]:
        for index in range(self.rank, len(self) * self.world, self.world):
            yield SampleKey(0, index) if index < self.size else SampleKey(0, 0, padding=True)
