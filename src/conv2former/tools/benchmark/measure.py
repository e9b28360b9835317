"""Workers in turn, statistics, rows.

All configurations of a group (dtype, batch size, image size) are alive at once, each in its process, and take one step
each in every round: whatever disturbs the machine meanwhile disturbs them all.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Protocol

import torch

from conv2former.engine.machine import machine_facts
from conv2former.errors import UserError
from conv2former.tools.benchmark.modes import EXPORTED, Configuration
from conv2former.tools.benchmark.options import BenchmarkOptions, Plan, plan
from conv2former.tools.benchmark.profiling import Operation
from conv2former.tools.benchmark.worker import Worker

TRAINING_FACTOR = 3  # a backward pass takes two products for each of the forward pass


@dataclass(frozen=True)
class Row:
    """One configuration, measured or not.

    Attributes:
        model: timm's name.
        mode: 'eager', 'compile', 'onnxruntime' or 'openvino'.
        task: 'inference' or 'training'.
        dtype: 'float32' or 'bfloat16' (autocast where training).
        batch_size: Images of a step.
        image_size: Their side, pixels.
        fused: Whether the model was re-parameterized where it can be.
        ops: What computed the package's own operations.
        threads: On the CPU.
        device: Its name.
        params: Parameters.
        macs: Multiply-adds of one image's forward pass.
        rounds: Timed steps.
        seconds: Median of a step; None, like all below, where nothing was measured.
        quartiles: First and third quartile of a step's seconds.
        images_per_second: At the median.
        ratio: That, over what the best mode of the first model of the group reaches.
        ratio_to: The first model.
        memory: Peak of the steps, bytes: of the GPU's tensors, or of the process beyond what it held before the model
            was built, which counts the compiler's or runtime's own code.
        macs_per_second: Multiply-adds at the median, those of a training step being three forward passes'.
        peak: The machine's multiply-adds per second in a product of large matrices of this dtype.
        peak_share: The former over the latter.
        error: Why nothing was measured; None where it was.
        versions: Of Python, PyTorch, timm and the runtime.
        commit: Of the package, where it runs from a git checkout.
        date: When it was measured, UTC.
        profile: The longest operations of a step, where asked for.
    """

    model: str
    mode: str
    task: str
    dtype: str
    batch_size: int
    image_size: int
    fused: bool
    ops: str
    threads: int
    device: str
    params: int
    macs: int
    rounds: int
    seconds: float | None = None
    quartiles: tuple[float, float] | None = None
    images_per_second: float | None = None
    ratio: float | None = None
    ratio_to: str | None = None
    memory: int | None = None
    macs_per_second: float | None = None
    peak: float | None = None
    peak_share: float | None = None
    error: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    date: str = ""
    profile: list[Operation] | None = None

    def to_json(self) -> dict[str, Any]:
        """The row as a dictionary."""
        operations = None if self.profile is None else [operation._asdict() for operation in self.profile]
        return asdict(replace(self, profile=None)) | dict(profile=operations)


class Turn(Protocol):
    """What takes turns: a ``Worker``."""

    def step(self) -> float | None:
        """Seconds of a step; None where it failed."""
        ...


def benchmark(options: BenchmarkOptions, *, start: Callable[[Configuration], Worker] = Worker) -> list[Row]:
    """Measures what the options ask for; lines on standard error say how far it is.

    Args:
        options: Of the user.
        start: Makes a worker, which is ready when it returns.

    Returns:
        A row for each configuration; one that failed says why.

    Raises:
        UserError: A mistake in the options, or not one configuration that could be measured.
    """
    planned = plan(options)
    if options.out:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder --out {options.out}: {error.strerror}") from None
    bench = Bench(planned, rounds=options.rounds, profile=options.profile, start=start)
    rows: list[Row] = []
    for _, group in groupby(planned.configurations, key=lambda c: c.group):
        rows += bench.measure(list(group))
    if all(row.error for row in rows):
        raise UserError(f"nothing could be measured: {rows[0].error}")
    return rows


class Bench:
    """Measures one group after the other.

    Args:
        planned: What is measured.
        rounds: Timed steps of each configuration.
        profile: Whether one more is profiled, where PyTorch computes.
        start: Makes a worker.
    """

    def __init__(
        self, planned: Plan, *, rounds: int, profile: bool, start: Callable[[Configuration], Worker] = Worker
    ) -> None:
        self._planned, self._rounds, self._profile, self._start = planned, rounds, profile, start
        self._peaks: dict[str, float] = {}  # by dtype
        self._common: dict[str, Any] = dict(
            rounds=rounds,
            device=device_name(planned.device),
            commit=machine_facts()["commit"],
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def measure(self, group: Sequence[Configuration]) -> list[Row]:
        """Rows of the configurations of a group."""
        workers: list[Worker] = []
        try:
            for c in group:  # one after the other: compilers take all cores
                _say(f"preparing {c.label()}")
                workers.append(self._start(c))
            _say(f"timing {self._rounds} rounds")
            times = take_turns(workers, self._rounds)
            memory = [worker.memory() for worker in workers]
            errors = [worker.error for worker in workers]  # what follows may fail without harm to what was measured
            peak = self._peak(group[0].dtype, workers)
            rows = []
            for worker, seconds, held, error in zip(workers, times, memory, errors, strict=True):
                row = self._row(worker)
                measured = {} if error else statistics(row, seconds, peak) | dict(memory=held)
                rows.append(replace(row, error=error, **measured))
                if error:
                    _say(f"failed: {worker.configuration.label()}: {error}")
            return with_ratios(rows)
        finally:
            for worker in workers:
                worker.close()

    def _peak(self, dtype: str, workers: Sequence[Worker]) -> float | None:
        """The machine's, measured once for each dtype by the first worker that can."""
        for worker in workers:
            if dtype not in self._peaks and (peak := worker.peak(dtype)):
                self._peaks[dtype] = peak
        return self._peaks.get(dtype)

    def _row(self, worker: Worker) -> Row:
        c = worker.configuration
        params, macs = self._planned.counts[c.model, c.image_size]
        return Row(
            model=c.model,
            mode=c.mode,
            task="training" if c.training else "inference",
            dtype=c.dtype,
            batch_size=c.batch_size,
            image_size=c.image_size,
            fused=c.fuse,
            ops="reference" if c.mode in EXPORTED else self._planned.ops,
            threads=c.threads,
            params=params,
            macs=macs,
            versions=worker.versions(),
            profile=worker.profile() if self._profile and c.mode not in EXPORTED else None,
            **self._common,
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def take_turns(workers: Sequence[Turn], rounds: int) -> list[list[float]]:
    """One step of each in every round.

    Returns:
        The seconds of each worker's steps, as many as it could make.
    """
    times: list[list[float]] = [[] for _ in workers]
    for _ in range(rounds):
        for worker, seconds in zip(workers, times, strict=True):
            if (taken := worker.step()) is not None:
                seconds.append(taken)
    return times


def statistics(row: Row, seconds: list[float], peak: float | None) -> dict[str, Any]:
    """The measured fields of a row.

    Args:
        row: Says what was computed.
        seconds: Of its steps, one at least.
        peak: The machine's multiply-adds per second; None where they are not known.
    """
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


def device_name(device: torch.device) -> str:
    """What the maker calls the GPU or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
