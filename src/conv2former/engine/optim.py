"""The recipe's optimizer and learning-rate schedule, on timm's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from conv2former.config import OptimSection, ScheduleSection
from conv2former.engine.batch import BatchPlan
from conv2former.errors import UserError, one_line, say_once


def scaled_lr(optim: OptimSection, batch: BatchPlan) -> float:
    """Sec. 4.1: the base learning rate times the effective batch over ``base_batch``."""
    return optim.base_lr * batch.total / optim.base_batch


def build_optimizer(
    model: nn.Module,
    optim: OptimSection,
    *,
    lr: float,
    head: Callable[[str], bool] = lambda name: False,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """timm's optimizer with timm's parameter groups: vectors are not decayed, layer-wise decay if asked for.

    Args:
        model: Its parameters are on their device.
        optim: Of the recipe.
        lr: The learning rate.
        head: Says of a parameter's name whether it belongs to the head, which has ``optim.head_lr``.
        fused: Whether PyTorch's own AdamW, Adam and SGD take their step by one kernel for many weights. Optimizers of
            timm have no such kernel.

    Raises:
        UserError: Unknown optimizer, or one that does not take betas or eps.
    """
    options: dict[str, Any] = {key: value for key, value in (("betas", optim.betas), ("eps", optim.eps)) if value}
    has_kernel = _is_pytorchs(optim.name)
    if fused and has_kernel:
        options["fused"] = True
    try:
        optimizer = create_optimizer_v2(
            model, optim.name, lr=lr, weight_decay=optim.weight_decay, layer_decay=optim.layer_decay, **options
        )
    except (ValueError, AssertionError, TypeError) as error:
        raise UserError(f"optim.name {optim.name!r}: {one_line(error)}") from None
    if optim.head_lr != 1:
        _set_apart(optimizer, {id(p) for name, p in model.named_parameters() if head(name)}, optim.head_lr)
    if has_kernel:
        optimizer.register_load_state_dict_pre_hook(_keep_fused)
    return optimizer


def _set_apart(optimizer: torch.optim.Optimizer, head: set[int], factor: float) -> None:
    """Gives the parameters of the head groups of their own, with ``factor`` times the learning rate."""
    for group in [*optimizer.param_groups]:
        own = [parameter for parameter in group["params"] if id(parameter) in head]
        if own:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in head]
            scale = group.get("lr_scale", 1.0) * factor
            optimizer.param_groups.append({**group, "params": own, "lr_scale": scale})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def _is_pytorchs(name: str) -> bool:
    try:
        return get_optimizer_info(name.lower()).opt_class in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
    except ValueError:  # unknown, or wrapped in another: timm says which when it builds it
        return False


def _keep_fused(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint does not decide which kernel steps here: it may come from another machine, or from before."""
    saved, own = state["param_groups"], optimizer.param_groups
    if len(saved) != len(own):
        return state  # PyTorch says what is wrong
    groups = [there | dict(fused=here["fused"]) for there, here in zip(saved, own, strict=True)]
    return state | dict(param_groups=groups)


def build_schedule(optimizer: torch.optim.Optimizer, schedule: ScheduleSection, *, steps_per_epoch: int) -> Scheduler:
    """Linear warm-up, then what ``schedule.kind`` says. ``step_update(step)`` sets the learning rate of a step.

    The cosine begins behind the warm-up (ConvNeXt, Swin). The other two count from step 0 and are cut into by it, as
    in the detection and segmentation toolboxes that the paper used.
    """
    logging.getLogger("timm.scheduler.cosine_lr").setLevel(logging.ERROR)  # it warns of a run of one step
    steps, warmup = schedule.total(steps_per_epoch), schedule.warmup(steps_per_epoch)
    common: dict[str, Any] = dict(warmup_t=warmup, warmup_lr_init=schedule.warmup_lr, t_in_epochs=False)
    if schedule.kind == "multistep":
        common["warmup_prefix"] = False
        # timm looks one step ahead
        milestones = [round(epoch * steps_per_epoch) + 1 for epoch in schedule.milestones]
        return MultiStepLRScheduler(optimizer, decay_t=milestones, decay_rate=schedule.gamma, **common)
    common["lr_min"] = schedule.min_lr
    if schedule.min_lr > (highest := max(group["lr"] for group in optimizer.param_groups)):
        say_once(
            f"warning: the learning rate rises from {highest:.3g} to schedule.min_lr, {schedule.min_lr:g}: lower that"
        )
    if schedule.kind == "polynomial":
        return PolyLRScheduler(optimizer, t_initial=steps, power=schedule.power, **common)
    return CosineLRScheduler(optimizer, t_initial=steps - warmup, warmup_prefix=True, **common)


def last_lr(optimizer: Any) -> float:
    """The learning rate of the last layers; a head may have a multiple of it."""
    groups = optimizer.param_groups
    return max([group["lr"] for group in groups if group.get("lr_scale", 1.0) <= 1] or [groups[0]["lr"]])
