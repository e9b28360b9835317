"""How the images of an optimizer step are divided among processes and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from conv2former.config import Recipe
from conv2former.errors import UserError, plural

# Which number seeds the random choices of a micro-batch. 1: its place in its process, and the process. 2: its place in
# the optimizer step, whichever process takes it.
KEYS = 2


@dataclass(frozen=True)
class BatchPlan:
    """One optimizer step.

    Attributes:
        per_process: Images of a micro-batch of one process.
        world: Processes.
        accumulate: Micro-batches of a step of one process.
        keys: See ``KEYS``.
    """

    per_process: int
    world: int
    accumulate: int
    keys: int = KEYS

    @property
    def micro_batches(self) -> int:
        """Of an optimizer step, over all processes."""
        return self.world * self.accumulate

    def key(self, part: int, rank: int) -> tuple[int, int]:
        """What seeds micro-batch ``part`` of process ``rank``, beside the run's seed and the step."""
        return (part, rank) if self.keys == 1 else (part * self.world + rank, 0)

    @property
    def total(self) -> int:
        """Images per optimizer step; the learning rate is scaled by it."""
        return self.per_process * self.world * self.accumulate

    def __str__(self) -> str:
        if self.micro_batches == 1:
            return str(self.total)
        processes = plural(self.world, "process", "processes")
        return f"{self.per_process} x {processes} x {self.accumulate} accumulated = {self.total}"


def recorded_batch(batch: BatchPlan) -> dict[str, int]:
    """What ``run.json`` says of a run's optimizer steps, whatever the number of its processes."""
    return dict(images=batch.per_process, micro_batches=batch.micro_batches, keys=batch.keys)


def fitting_worlds(recipe: Recipe, batch: BatchPlan) -> tuple[list[int], str]:
    """The numbers of processes that a run may go on with, and what they depend on."""
    if batch.keys == 1:
        return [batch.world], "its version of the package bound random choices to the process"
    if recipe.engine.sync_batchnorm:
        return [batch.world], "engine.sync_batchnorm normalises over the images of all processes"
    parts = batch.micro_batches
    counts = [count for count in range(1, parts + 1) if parts % count == 0]
    return counts, f"an optimizer step has {parts} micro-batches"


def plan_batch(recipe: Recipe, *, world: int) -> BatchPlan:
    """The recipe's batch on ``world`` processes.

    Without ``optim.global_batch`` the total grows with the processes. With it the total stays: each process takes its
    share in as few micro-batches as ``optim.batch_size`` allows.

    Raises:
        UserError: ``optim.global_batch`` cannot be divided evenly, or leaves an odd batch to MixUp.
    """
    optim = recipe.optim
    if optim.global_batch is None:
        return BatchPlan(optim.batch_size, world, optim.accumulate)
    images, left = divmod(optim.global_batch, world)
    if left or not images:
        raise UserError(
            f"optim.global_batch={optim.global_batch} cannot be shared by {world} processes: "
            f"give --set optim.global_batch={max(round(optim.global_batch / world), 1) * world}"
        )
    step = 2 if recipe.pairs else 1
    fitting = [size for size in range(step, min(optim.batch_size, images) + 1, step) if images % size == 0]
    if not fitting:
        raise UserError(
            f"a process's {images} images cannot be mixed in pairs: give an optim.global_batch that is a "
            f"multiple of {2 * world}, --set optim.global_batch={(images + 1) * world} for example"
        )
    return BatchPlan(fitting[-1], world, images // fitting[-1])
