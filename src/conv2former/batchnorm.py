"""Batch norm (the stem's, in Conv2Former) in training: over all processes, and safe from a step that is skipped."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorm(nn.SyncBatchNorm):
    """PyTorch's, which refuses CPUs, with plain arithmetic for those: runs on CPUs can be checked too."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C, ...)."""
        if x.device.type != "cpu" or not self.training:
            return super().forward(x)
        shape = [1, -1] + [1] * (x.ndim - 2)
        dims = [d for d in range(x.ndim) if d != 1]
        values = x.float()
        count = torch.tensor([x.numel() / x.shape[1]], dtype=torch.float32)
        dist.all_reduce(count)
        mean = all_reduce(values.sum(dims)) / count
        centred = values - mean.view(shape)
        variance = all_reduce(centred.square().sum(dims)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(variance * (count / (count - 1)), share)
        normalised = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(x.dtype)


def synchronise(model: nn.Module) -> nn.Module:
    """Turns every batch norm of a model into one over the images of all processes; names and values stay."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.SyncBatchNorm:
            module.__class__ = SyncBatchNorm
    return model


class BatchNormBackup:
    """The running statistics as they were before a step, for one that turns out not to count."""

    def __init__(self, model: nn.Module) -> None:
        layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        buffers = [buffer for layer in layers for buffer in layer.buffers()]
        # by type, because PyTorch copies lists of one type at once
        self.live = [[b for b in buffers if b.is_floating_point()], [b for b in buffers if not b.is_floating_point()]]
        self.kept = [[b.clone() for b in group] for group in self.live]

    def keep(self) -> None:
        """Before a step."""
        self._copy(self.kept, self.live)

    def restore(self) -> None:
        """After one that does not count."""
        self._copy(self.live, self.kept)

    @staticmethod
    @torch.no_grad()
    def _copy(to: list[list[Tensor]], source: list[list[Tensor]]) -> None:
        for destination, origin in zip(to, source, strict=True):
            if destination:
                torch._foreach_copy_(destination, origin)
