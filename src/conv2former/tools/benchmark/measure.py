"""Workers in turn, statistics, rows.

All configurations of a group (dtype, batch size, image size) are alive at once, each in its process. In every round
each of them takes one step: whatever disturbs the machine meanwhile disturbs them all.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from conv2former.engine.machine import machine_facts
from conv2former.errors import UserError, attempt, say
from conv2former.tools.benchmark.modes import EXPORTED, Configuration
from conv2former.tools.benchmark.options import BenchmarkOptions, Plan, plan
from conv2former.tools.benchmark.worker import Operation, Worker

TRAINING_FACTOR = 3  # a backward pass takes two products for each of the forward pass


@dataclass(frozen=True)
class Row:
    """One configuration, measured or not. The names of the fields are the keys of ``benchmark.jsonl``."""

    model: str  # timm's name
    mode: str  # a key of MODES
    task: str  # 'inference' or 'training'
    dtype: str  # 'float32' or 'bfloat16' (autocast where training)
    batch_size: int
    image_size: int  # side, pixels
    fused: bool  # whether the model was re-parameterized where it can be
    ops: str  # what computed the package's own operations
    threads: int  # on the CPU
    device: str  # its name
    params: int
    macs: int  # multiply-adds of one image's forward pass
    rounds: int  # timed steps
    seconds: float | None = None  # median of a step; None, like all below, where nothing was measured
    quartiles: tuple[float, float] | None = None  # first and third of a step's seconds
    images_per_second: float | None = None  # at the median
    ratio: float | None = None  # that, over what the best mode of the group's first model reaches
    ratio_to: str | None = None  # the first model
    # peak of the steps, bytes: of the GPU's tensors, or of the process beyond what it held before the model was built,
    # which counts the compiler's or runtime's own code
    memory: int | None = None
    macs_per_second: float | None = None  # at the median; a training step counts as three forward passes
    peak: float | None = None  # the machine's multiply-adds per second in a product of large matrices of this dtype
    peak_share: float | None = None  # macs_per_second / peak
    error: str | None = None  # why nothing was measured
    versions: dict[str, str] = field(default_factory=dict)  # of Python, PyTorch, timm and the runtime
    commit: str | None = None  # of the package, where it runs from a git checkout
    date: str = ""  # UTC
    profile: list[Operation] | None = None  # the longest operations of a step, where asked for

    def to_json(self) -> dict[str, Any]:
        """The row as a dictionary."""
        operations = None if self.profile is None else [operation._asdict() for operation in self.profile]
        return asdict(self) | dict(profile=operations)


def benchmark(options: BenchmarkOptions, *, start: Callable[[Configuration], Worker] = Worker) -> list[Row]:
    """Measures what the options ask for; lines on standard error say how far it is.

    ``start`` makes a worker, which is ready when it returns. There is a row for each configuration; one that failed
    says why.

    Raises:
        UserError: A mistake in the options, or not one configuration that could be measured.
    """
    planned = plan(options)
    if options.out:
        with attempt(f"make the folder --out {options.out}"):
            options.out.mkdir(parents=True, exist_ok=True)
    common: dict[str, Any] = dict(
        rounds=options.rounds,
        device=_device_name(planned.device),
        commit=machine_facts()["commit"],
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    rows: list[Row] = []
    peaks: dict[str, float | None] = {}  # by dtype
    for _, group in groupby(planned.configurations, key=lambda c: c.group):
        workers: list[Worker] = []
        try:
            for c in group:  # one after the other: compilers take all cores
                say(f"preparing {c.label()}")
                workers.append(start(c))
            rows += with_ratios(_measured(workers, planned, peaks, profile=options.profile, **common))
        finally:
            for worker in workers:
                worker.close()
    if all(row.error for row in rows):
        raise UserError(f"nothing could be measured: {rows[0].error}")
    return rows


def _measured(
    workers: Sequence[Worker],
    planned: Plan,
    peaks: dict[str, float | None],
    *,
    rounds: int,
    profile: bool,
    **facts: Any,
) -> list[Row]:
    """The rows of a group's workers; the machine's peak is measured once for each dtype, by the first that can."""
    say(f"timing {rounds} rounds")
    times = take_turns(workers, rounds)
    memory = [worker.memory() for worker in workers]
    errors = [worker.error for worker in workers]  # what follows may fail without harm to what was measured
    dtype = workers[0].configuration.dtype
    peaks[dtype] = peaks.get(dtype) or next(filter(None, (worker.peak(dtype) for worker in workers)), None)
    rows = []
    for worker, seconds, held, error in zip(workers, times, memory, errors, strict=True):
        c, exported = worker.configuration, worker.configuration.mode in EXPORTED
        params, macs = planned.counts[c.model, c.image_size]
        row = Row(
            **{name: getattr(c, name) for name in ("model", "mode", "dtype", "batch_size", "image_size", "threads")},
            task="training" if c.training else "inference",
            fused=c.fuse,
            ops="reference" if exported else planned.ops,
            params=params,
            macs=macs,
            error=error,
            versions=worker.versions(),
            profile=worker.profile() if profile and not exported else None,
            rounds=rounds,
            **facts,
        )
        if error:
            say(f"failed: {c.label()}: {error}")
        rows.append(row if error else replace(row, memory=held, **statistics(row, seconds, peaks[dtype])))
    return rows


def take_turns(workers: Sequence[Worker], rounds: int) -> list[list[float]]:
    """One step of each worker in every round; the seconds of each worker's steps, as many as it could make."""
    times: list[list[float]] = [[] for _ in workers]
    for _ in range(rounds):
        for worker, seconds in zip(workers, times, strict=True):
            if (taken := worker.step()) is not None:
                seconds.append(taken)
    return times


def statistics(row: Row, seconds: list[float], peak: float | None) -> dict[str, Any]:
    """The measured fields of a row, from the seconds of its steps (one at least) and the machine's ``peak``."""
    middle = median(seconds)
    first, _, third = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    passes = TRAINING_FACTOR if row.task == "training" else 1
    rate = passes * row.macs * row.batch_size / middle
    return dict(
        seconds=middle,
        quartiles=(first, third),
        images_per_second=row.batch_size / middle,
        macs_per_second=rate,
        peak=peak,
        peak_share=rate / peak if peak else None,
    )


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows of a group with their speeds over that of the first model's best mode, where it could be measured."""
    first = rows[0].model
    best = max((row.images_per_second or 0 for row in rows if row.model == first), default=0)
    return [
        replace(row, ratio=row.images_per_second / best, ratio_to=first) if best and row.images_per_second else row
        for row in rows
    ]


def _device_name(device: torch.device) -> str:
    """What the maker calls the GPU or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
