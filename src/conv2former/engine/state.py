"""The state of a run, and how parts of it come off the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class TrainState:
    """How far a run is; with the weights and the optimizer this is all its state.

    Attributes:
        step: Optimizer steps done, skipped ones included.
        steps_per_epoch: Of the run that got here.
        evaluated: The step of the last evaluation.
        best: Highest value of the monitored metric so far.
        loss_sum: Sum of the losses since the last evaluation.
        loss_steps: Their number.
        logged_sum: Sum of the losses since the last logged one.
        logged_steps: Their number.
        skipped: Steps whose loss was not finite.
        skipped_in_row: Those of them that came last.
        seconds: Time spent training, evaluations and the checkpoints behind them not counted.
    """

    step: int = 0
    steps_per_epoch: int = 0
    evaluated: int = 0
    best: float = -math.inf
    loss_sum: float = 0.0
    loss_steps: int = 0
    logged_sum: float = 0.0
    logged_steps: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    seconds: float = 0.0

    def add_losses(self, total: float, steps: int) -> None:
        """Counts the losses of some steps."""
        self.loss_sum += total
        self.loss_steps += steps
        self.logged_sum += total
        self.logged_steps += steps

    def improves(self, value: float | None) -> bool:
        """Whether a value of the monitored metric is the best so far; None, not defined, is below all numbers."""
        value = -math.inf if value is None else value
        better = value > self.best or value == self.best == -math.inf
        self.best = value if better else self.best
        return better

    def rescale(self, steps_per_epoch: int) -> None:
        """The same place in the data, where an epoch has another number of steps now."""
        ratio = steps_per_epoch / self.steps_per_epoch
        self.step, self.evaluated = round(self.step * ratio), round(self.evaluated * ratio)
        self.steps_per_epoch = steps_per_epoch


class Fetched:
    """A number on its way from the device, so that asking for it does not wait for what was started after it."""

    def __init__(self, number: Tensor) -> None:
        self.ready = None
        if number.is_cuda:
            self.host = torch.empty((), dtype=number.dtype, pin_memory=True)
            self.host.copy_(number, non_blocking=True)
            self.ready = torch.cuda.Event()
            self.ready.record()
        else:
            self.host = number.clone()

    def value(self) -> float:
        """The number."""
        if self.ready is not None:
            self.ready.synchronize()
        return float(self.host)


def parameter_norm(model: nn.Module) -> float:
    """The norm of all parameters, of the whole ones where they are sharded; to be called on all processes."""
    norm: Any = torch.nn.utils.get_total_norm(model.parameters())
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def full_state_dict(model: nn.Module, *, sharded: bool) -> dict[str, Tensor]:
    """The whole state dict on the CPU, put together where it is sharded; to be called on all processes."""
    if not sharded:
        return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return state
