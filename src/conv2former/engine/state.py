"""The state of a run, and how parts of it come off the device."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from conv2former.config import ScheduleSection
from conv2former.engine.checkpointing import write_file
from conv2former.errors import UserError

SETTINGS = {"weight_decay", "betas", "eps", "momentum", "lr_scale", "initial_lr"}  # of an optimizer's group


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

    def add_loss(self, loss: float) -> None:
        """Counts the loss of a step."""
        self.loss_sum += loss
        self.loss_steps += 1
        self.logged_sum += loss
        self.logged_steps += 1

    def improves(self, value: float | None) -> bool:
        """Whether a value of the monitored metric is the best so far; None, not defined, is below all numbers."""
        value = -math.inf if value is None else value
        better = value > self.best or value == self.best == -math.inf
        self.best = value if better else self.best
        return better

    def check_end(self, steps: int, schedule: ScheduleSection) -> None:
        """Raises the UserError of a recipe that ends before this place."""
        if self.step > steps:
            raise UserError(
                f"the run has done {self.step / self.steps_per_epoch:g} epochs and the recipe ends after "
                f"{schedule.length()}: raise schedule.{'epochs' if schedule.steps is None else 'steps'}"
            )

    def rescale(self, steps_per_epoch: int) -> None:
        """The same place in the data, where an epoch has another number of steps now."""
        ratio = steps_per_epoch / self.steps_per_epoch
        self.step, self.evaluated = round(self.step * ratio), round(self.evaluated * ratio)
        self.steps_per_epoch = steps_per_epoch


class Contents:
    """What a checkpoint holds.

    Args:
        fabric: Launched.
        task: With its weights, and their average where there is one.
        wrapped: The task as Fabric has set it up.
        optimizer: Likewise.
        sharded: Whether the weights are.
    """

    def __init__(self, fabric: L.Fabric, task: nn.Module, wrapped: Any, optimizer: Any, *, sharded: bool) -> None:
        self.fabric, self.task, self.wrapped, self.optimizer, self.sharded = fabric, task, wrapped, optimizer, sharded

    def _all(self, state: TrainState) -> dict[str, Any]:
        scaler = self.fabric.strategy.precision.state_dict()  # of float16's loss, empty otherwise
        return dict(task=self.wrapped, optimizer=self.optimizer, position=asdict(state), scaler=scaler)

    def write(self, state: TrainState, path: Path) -> None:
        """Writes a file; to be called on all processes where the weights are sharded."""
        contents = self._all(state)
        if self.sharded:
            self.fabric.save(path, contents)
            self._forget_before_the_first_step(state)
        elif self.fabric.is_global_zero:
            write_file(path, contents | dict(task=self.task.state_dict(), optimizer=self.optimizer.state_dict()))

    def read(self, path: Path) -> TrainState:
        """Takes weights and optimizer from a file, and gives the position; to be called on all processes."""
        groups = [{key: group[key] for key in SETTINGS & group.keys()} for group in self.optimizer.param_groups]
        contents = self._all(TrainState())
        self.fabric.load(path, contents, weights_only=True)
        for group, settings in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(settings)  # the recipe's of now, which may have been forced to others than the checkpoint's
        known = TrainState.__dataclass_fields__
        state = TrainState(**{name: value for name, value in contents["position"].items() if name in known})
        if contents["scaler"]:
            self.fabric.strategy.precision.load_state_dict(contents["scaler"])
        if self.sharded:
            self._forget_before_the_first_step(state)
        return state

    def _forget_before_the_first_step(self, state: TrainState) -> None:
        """PyTorch makes a step without gradients to learn what an optimizer of sharded weights keeps, and counts it."""
        if state.step == 0:
            self.optimizer.optimizer.state.clear()


class Fetched:
    """Numbers (N,) on their way from the device, so that asking for them does not wait for what was started after."""

    def __init__(self, numbers: Tensor) -> None:
        self.ready = None
        if numbers.is_cuda:
            self.host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self.host.copy_(numbers, non_blocking=True)
            self.ready = torch.cuda.Event()
            self.ready.record()
        else:
            self.host = numbers.clone()

    def values(self) -> list[float]:
        """The numbers."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.host.tolist()


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
