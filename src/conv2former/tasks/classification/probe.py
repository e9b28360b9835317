"""A linear classifier on features: logistic regression with a regularisation chosen by cross-validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FOLDS = 5
DECAYS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # tried, of the weights on standardised features
USUAL = 1e-2  # where trying would take too long
STEPS = 100  # of L-BFGS at most
LONG = 2e8  # multiply-adds of one pass over the features, above which one decay is not tried but taken


class Fitted(NamedTuple):
    """A linear classifier.

    Attributes:
        weight: (K, D).
        bias: (K,).
        accuracy: By cross-validation, 0 to 1; None without.
    """

    weight: Tensor
    bias: Tensor
    accuracy: float | None


def fit(features: Tensor, targets: Tensor, classes: int, *, stopped: Callable[[], bool] = lambda: False) -> Fitted:
    """Fits it to features (N, D) and targets (N,) of ``classes`` classes; the same on every call.

    If ``stopped`` says so, it ends at once with what it has.
    """
    mean, std = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
    x = (features.float() - mean) / std
    best, right = USUAL, None
    if len(x) < 2 * FOLDS:
        best = DECAYS[-1]
    elif len(x) * x.shape[1] * classes <= LONG:
        right = _tried(x, targets, classes, stopped)
        best = max(DECAYS, key=lambda decay: right[decay])
    weight, bias = _solve(x, targets, classes, best, stopped)
    weight = weight / std
    return Fitted(weight, bias - weight @ mean, None if right is None else right[best] / len(x))


def _tried(x: Tensor, targets: Tensor, classes: int, stopped: Callable[[], bool]) -> dict[float, int]:
    """How many samples are right, for each decay, where every fold is predicted from the others."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    fold = torch.empty_like(order)
    fold[order] = torch.arange(len(x), device=x.device) % FOLDS
    right = dict.fromkeys(DECAYS, 0)
    for number in range(FOLDS):
        held, start = fold == number, None
        for decay in reversed(DECAYS):  # from the strongest, each from the one before
            start = _solve(x[~held], targets[~held], classes, decay, stopped, start)
            weight, bias = start
            right[decay] += int((F.linear(x[held], weight, bias).argmax(1) == targets[held]).sum())
    return right


def _solve(
    x: Tensor,
    targets: Tensor,
    classes: int,
    decay: float,
    stopped: Callable[[], bool],
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    weight, bias = start or (x.new_zeros(classes, x.shape[1]), x.new_zeros(classes))
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    solver = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), targets) + decay / 2 * weight.square().sum()
        loss.backward()
        if stopped():  # without a gradient the solver ends
            solver.zero_grad(set_to_none=False)
        return loss

    solver.step(closure)  # type: ignore[arg-type]
    return weight.detach(), bias.detach()
