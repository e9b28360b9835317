"""Keyed randomness: what it must not depend on."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from conv2former.data.sampling import EvalSampler, Purpose, SampleKey, TrainSampler, derive_seed, seed_cpu


def batches(**options: int) -> list[list[SampleKey]]:
    return list(
        TrainSampler(options.pop("size", 23), options.pop("batch_size", 4), **({"seed": 1, "steps": 15} | options))
    )


def test_an_epoch_gives_each_image_at_most_once_and_drops_the_rest() -> None:
    epoch = [key for batch in batches()[:5] for key in batch]
    assert {key.epoch for key in epoch} == {0}
    assert len({key.image for key in epoch}) == 20


def test_epochs_differ_and_seeds_differ() -> None:
    first, second = batches()[:5], batches()[5:10]
    assert {key.epoch for batch in second for key in batch} == {1}
    assert [[k.image for k in batch] for batch in first] != [[k.image for k in batch] for batch in second]
    assert batches() == batches() != batches(seed=2)


@pytest.mark.parametrize("start", [0, 1, 5, 7, 14, 15])
def test_a_stream_that_starts_later_is_the_rest_of_the_whole(start: int) -> None:
    assert batches(start=start) == batches()[start:]


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2)])
def test_a_step_takes_the_same_images_however_they_are_dealt_out(world: int, accumulate: int) -> None:
    parts = world * accumulate
    large = batches(size=40, batch_size=4 * parts, steps=6)
    ranks = [batches(size=40, batch_size=4, steps=6, world=world, accumulate=accumulate, rank=r) for r in range(world)]
    for step, batch in enumerate(large):
        dealt = [key for rank in ranks for part in rank[step * accumulate : (step + 1) * accumulate] for key in part]
        assert sorted(dealt) == sorted(batch)


def test_length() -> None:
    sampler = TrainSampler(23, 4, seed=0, steps=15, start=3, accumulate=2)
    assert len(sampler) == len(list(sampler)) == 24


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_evaluation_sees_every_image_once(world: int) -> None:
    shares = [list(EvalSampler(17, rank=rank, world=world)) for rank in range(world)]
    assert sorted(key.image for share in shares for key in share if not key.padding) == list(range(17))
    assert len({len(share) for share in shares}) == 1  # together on every batch
    assert [len(EvalSampler(17, rank=rank, world=world)) for rank in range(world)] == [len(s) for s in shares]


def test_keys_and_purposes_have_streams_of_their_own() -> None:
    keys = [(purpose, *key) for purpose in Purpose for key in [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]]
    assert len({derive_seed(*key) for key in keys}) == len(keys)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_key_says_what_is_drawn_whatever_came_before() -> None:
    seed_cpu(Purpose.AUGMENT, 1, 2)
    first = draw(), draw()
    seed_cpu(Purpose.AUGMENT, 1, 2)
    assert (draw(), draw()) == first
    seed_cpu(Purpose.AUGMENT, 1, 3)
    assert all(a != b for a, b in zip(draw(), first[0], strict=True))
