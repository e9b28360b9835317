"""Third call: whole networks in bfloat16, one process each, beside ConvNeXt-T. 280 seconds.

The processes of a group build and compile at the same time. Then they take turns, 20 steps each without a
synchronisation between them, five rounds: a row for each turn, then one for each network with its median. Images are
in memory. Profiles of the 40 longest kernels follow.
"""

from __future__ import annotations

import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import timm
import torch
from common import Archive, parser

import conv2former  # noqa: F401  registers the names
from conv2former.tools.benchmark.modes import Configuration
from conv2former.tools.benchmark.worker import Worker

ROUNDS = 5
STEPS = 20
TOP = 40
OURS, THEIRS = "conv2former_t", "convnext_tiny"
BASE = Configuration(
    model=OURS, model_args={}, mode="compile", training=True, dtype="bfloat16", batch_size=128, image_size=224,
    threads=4, device="cuda", ops="auto", fuse=False,
)  # fmt: skip
INFERENCE = replace(BASE, training=False, fuse=True)
GROUPS: dict[str, list[Configuration]] = {
    "training": [BASE, replace(BASE, model=THEIRS), replace(BASE, ops="reference"), replace(BASE, mode="cudagraphs")],
    "inference": [
        replace(INFERENCE, model=model, batch_size=batch, mode=mode)
        for batch, mode in ((256, "compile"), (1, "cudagraphs"))
        for model in (OURS, THEIRS)
    ],
    "training, batch 256": [replace(BASE, batch_size=256), replace(BASE, model=THEIRS, batch_size=256)],
    "eager": [replace(BASE, mode="eager"), replace(INFERENCE, mode="eager", batch_size=1)],
}


def named(c: Configuration) -> dict[str, Any]:
    """What tells a row's configuration."""
    return dict(
        model=c.model, mode=c.mode, task="training" if c.training else "inference", batch=c.batch_size,
        size=c.image_size, dtype=c.dtype, ops=c.ops, fused=c.fuse,
    )  # fmt: skip


def measure(archive: Archive, name: str, group: list[Configuration]) -> None:
    """The rows of a group."""
    with ThreadPoolExecutor(len(group)) as pool:  # a worker is there when its constructor returns
        workers = list(pool.map(Worker, group))
    archive.add(group=name, what="ready", errors=[worker.error for worker in workers if worker.error])
    try:
        turns(archive, workers)
        for worker in workers:
            if worker.error is None and worker.configuration.mode != "cudagraphs" and archive.left() > 10:
                rows = worker.profile(TOP) or []
                archive.add(**named(worker.configuration), profile=[row._asdict() for row in rows])
    finally:
        for worker in workers:
            worker.close()


def turns(archive: Archive, workers: list[Worker]) -> None:
    """Five rounds. Then a row for each network, compared with the first one of its task and batch."""
    times: list[list[tuple[float, float]]] = [[] for _ in workers]
    for turn in range(ROUNDS):
        if archive.left() < 5:
            break
        for worker, found in zip(workers, times, strict=True):
            if burst := worker.burst(STEPS):
                found.append(burst)
                archive.add(**named(worker.configuration), round=turn, ms=1e3 * burst[0], host_ms=1e3 * burst[1])
    first: dict[Any, float] = {}
    for worker, found in zip(workers, times, strict=True):
        c = worker.configuration
        if worker.error or not found:
            archive.add(**named(c), error=worker.error or "no time was left")
            continue
        seconds, host = (statistics.median(values) for values in zip(*found, strict=True))
        kind = c.training, c.batch_size
        first.setdefault(kind, seconds)
        archive.add(
            **named(c), what="result", ms=1e3 * seconds, host_ms=1e3 * host, images_per_s=c.batch_size / seconds,
            speedup_over_first=first[kind] / seconds, memory_gb=(worker.memory() or 0) / 1e9,
        )  # fmt: skip


def main() -> None:
    """Measures group after group, the most important first."""
    options = parser(__doc__).parse_args()
    archive = Archive("networks", options)
    groups = GROUPS
    if options.rehearse:
        small = {OURS: "conv2former_test", THEIRS: "convnext_atto"}
        tiny: dict[str, Any] = dict(device="cpu", image_size=64, batch_size=2, threads=1)
        groups = {name: [replace(c, model=small[c.model], **tiny) for c in group] for name, group in groups.items()}
    archive.add(what="versions", torch=torch.__version__, timm=timm.__version__, cuda=torch.version.cuda)
    for name, group in groups.items():
        if archive.has_time(60, name):
            measure(archive, name, group)


if __name__ == "__main__":
    main()
