"""A linear classifier on features: logistic regression with a regularisation chosen by cross-validation."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FOLDS = 5
DECAYS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # tried, of the weights on standardised features
STEPS = 100  # of L-BFGS at most
MOST = 20_000  # samples that are looked at: a linear layer needs no more


class Fitted(NamedTuple):
    """A linear classifier.

    Attributes:
        weight: (K, D).
        bias: (K,).
        accuracy: By cross-validation, 0 to 1.
    """

    weight: Tensor
    bias: Tensor
    accuracy: float


def fit(features: Tensor, targets: Tensor, classes: int) -> Fitted:
    """Fits it to features (N, D) and targets (N,) of ``classes`` classes; the same on every call."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))[:MOST].to(targets.device)
    features, targets = features[order].float(), targets[order]
    mean, std = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
    x = (features - mean) / std
    fold = torch.arange(len(x), device=x.device) % FOLDS
    decays = DECAYS if len(x) >= 2 * FOLDS else DECAYS[:1]
    right = dict.fromkeys(decays, 0)
    for number in range(FOLDS if len(decays) > 1 else 0):
        held = fold == number
        start = None
        for decay in reversed(decays):  # from the strongest, each from the one before
            start = _solve(x[~held], targets[~held], classes, decay, start)
            weight, bias = start
            right[decay] += int((F.linear(x[held], weight, bias).argmax(1) == targets[held]).sum())
    best = max(decays, key=lambda decay: right[decay])
    weight, bias = _solve(x, targets, classes, best)
    weight = weight / std
    return Fitted(weight, bias - weight @ mean, right[best] / len(x))


def _solve(
    x: Tensor, targets: Tensor, classes: int, decay: float, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    weight, bias = start or (x.new_zeros(classes, x.shape[1]), x.new_zeros(classes))
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    solver = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), targets) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)  # type: ignore[arg-type]
    return weight.detach(), bias.detach()
