"""Batch norm (the stem's, in Conv2Former) in training: over all processes, and safe from a step that is skipped."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from conv2former.engine.distributed import Processes
from conv2former.errors import UserError


class _Sum(torch.autograd.Function):
    """The sum over all processes, with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the images of all processes in plain arithmetic, because PyTorch's takes GPUs alone.

    It makes a run on several CPU processes equal to that on one.
    """

    plain_in_evaluation = True  # then it is batch norm like any other, and may be fused (``models.fused``)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if not self.training:
            return super().forward(input)
        values, dims, shape = input.float(), (0, 2, 3), (1, -1, 1, 1)
        count = torch.tensor(input.numel() / input.shape[1])
        dist.all_reduce(count)
        mean = _Sum.apply(values.sum(dims)) / count
        centred = values - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(dims)) / count
        with torch.no_grad():
            for running, value in ((self.running_mean, mean), (self.running_var, variance * (count / (count - 1)))):
                if running is not None:
                    running.lerp_(value, self.momentum or 0.0)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        normalised = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(input.dtype)


def synchronise(model: nn.Module, device: torch.device) -> nn.Module:
    """Turns every batch norm of a model into one over the images of all processes; names and values stay.

    Raises:
        UserError: A model whose batch norms have no counterpart on CPUs.
    """
    for name, module in [*model.named_modules()]:
        if isinstance(module, _Frozen):
            continue
        if device.type != "cpu":
            for key, child in module.named_children():
                if isinstance(child, _BatchNorm) and not isinstance(child, _Frozen):
                    setattr(module, key, convert_sync_batchnorm(child))
        elif type(module) is nn.BatchNorm2d and module.momentum is not None:
            module.__class__ = CpuSyncBatchNorm
        elif isinstance(module, _BatchNorm):
            raise UserError(f"engine.sync_batchnorm: {name} ({type(module).__name__}) cannot be synchronised on CPUs")
    return model


class _Frozen:
    """Batch norm that never counts."""

    plain_in_evaluation = True

    def train(self, mode: bool = True) -> Any:
        """Stays in evaluation mode."""
        return super().train(False)  # type: ignore[misc]


def freeze(model: nn.Module) -> None:
    """Has every batch norm keep its statistics, scale and shift, whatever mode the model is in; names stay."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            kind: Any = type(module)
            module.__class__ = _frozen(kind)
            module.eval()
            module.requires_grad_(False)


@functools.cache
def _frozen(kind: type) -> type:
    return type(f"Frozen{kind.__name__}", (_Frozen, kind), {})


class RunningStatistics:
    """The running statistics during an optimizer step.

    With several processes each micro-batch leaves its own share in the layers. At the end of the step the shares of all
    micro-batches are added to the running statistics in the order of the micro-batches, as one process would have done
    it, so that it does not matter which process took which. A step that turns out not to count changes nothing.

    Args:
        model: Its batch norms are left alone where they are frozen or synchronised over processes already.
        processes: That share the micro-batches.
        ordered: Off for runs of before, whose running statistics are those of the first process.
    """

    def __init__(self, model: nn.Module, processes: Processes, *, ordered: bool = True) -> None:
        layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        buffers = [buffer for layer in layers for buffer in layer.buffers()]
        # by type, because PyTorch copies lists of one type at once
        self.live = [[b for b in buffers if b.is_floating_point()], [b for b in buffers if not b.is_floating_point()]]
        self.kept = [[b.clone() for b in group] for group in self.live]
        self.shared = [layer for layer in layers if ordered and processes.world > 1 and _is_shared(layer)]
        self.world = processes.world
        self.found: list[tuple[Tensor, Tensor]] = []  # of each micro-batch of this process

    def keep(self) -> None:
        """Before a step."""
        self._copy(self.kept, self.live)
        self.found = []

    def before_micro_batch(self) -> None:
        """Before each forward pass."""
        for layer in self.shared:
            if layer.training:
                for buffer in layer.buffers():
                    buffer.zero_()

    def after_micro_batch(self) -> None:
        """After each backward pass, which may compute the forward pass again."""
        if layers := [layer for layer in self.shared if layer.training]:
            times = torch.stack([layer.num_batches_tracked for layer in layers])  # type: ignore[misc]
            self.found.append((torch.cat([value for layer in layers for value in _statistics(layer)]), times))

    @torch.no_grad()
    def update(self) -> None:
        """After a step that counts; to be called on all processes."""
        if not self.found:
            return
        shares, times = (_in_order(torch.stack(column), self.world) for column in zip(*self.found, strict=True))
        self.restore()
        layers = [layer for layer in self.shared if layer.training]
        sizes = torch.tensor([len(value) for layer in layers for value in _statistics(layer)], device=shares.device)
        momenta = torch.tensor([layer.momentum for layer in layers for _ in _statistics(layer)], dtype=torch.double)
        rest = (1 - momenta.to(shares.device)) ** times.repeat_interleave(2, dim=1)  # of the statistics of before
        running = torch.cat([value for layer in layers for value in _statistics(layer)])
        for share, factors in zip(shares, rest, strict=True):
            running = (factors.repeat_interleave(sizes) * running.double() + share).to(running.dtype)
        values = iter(running.split(sizes.tolist()))
        for layer, count in zip(layers, times.sum(0), strict=True):
            layer.num_batches_tracked += count  # type: ignore[operator]
            for buffer in _statistics(layer):
                buffer.copy_(next(values))

    def restore(self) -> None:
        """After a step that does not count."""
        self._copy(self.live, self.kept)

    def broadcast(self) -> None:
        """All processes take the first one's, which are what is saved; DDP does so by itself, FSDP does not."""
        for group in self.live:
            for buffer in group:
                dist.broadcast(buffer, src=0)

    @staticmethod
    @torch.no_grad()
    def _copy(to: list[list[Tensor]], source: list[list[Tensor]]) -> None:
        for destination, origin in zip(to, source, strict=True):
            if destination:
                torch._foreach_copy_(destination, origin)


def _is_shared(layer: _BatchNorm) -> bool:
    plain = not isinstance(layer, (_Frozen, nn.SyncBatchNorm, CpuSyncBatchNorm))
    return plain and layer.num_batches_tracked is not None and layer.momentum is not None


def _statistics(layer: _BatchNorm) -> list[Tensor]:
    return [layer.running_mean, layer.running_var]  # type: ignore[misc, list-item]


def _in_order(own: Tensor, world: int) -> Tensor:
    """Rows of all micro-batches as they follow each other, from those of each process."""
    parts = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(parts, own)
    return torch.stack(parts, dim=1).flatten(0, 1)
