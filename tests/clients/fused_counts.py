"""Multiply-adds of a fused network by thop and by ptflops, which know layers by their types."""

from typing import Any

import ptflops
import thop
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import conv2former  # noqa: F401  registers the models
from conv2former.models.fused import FusedBlock, FusedDownsample, FusedStem


def macs(part, inputs):
    """Multiply-adds of a part of the network: it runs once more, under PyTorch's own counter."""
    with FlopCounterMode(display=False) as counter:
        part.forward(*inputs)
    return counter.get_total_flops() // 2


def add_for_thop(part, inputs, output):
    part.total_ops += macs(part, inputs)


def add_for_ptflops(part, inputs, output):
    part.__flops__ += macs(part, inputs)


FUSED = (FusedBlock, FusedDownsample, FusedStem)
model: Any = timm.create_model("conv2former_atto")
model.fuse()

counted = dict.fromkeys(FUSED, add_for_thop)
inputs = (torch.randn(1, 3, 224, 224),)
thop_macs, _ = thop.profile(model, inputs, custom_ops=counted, verbose=False)
ptflops_macs, _ = ptflops.get_model_complexity_info(
    model,
    (3, 224, 224),
    custom_modules_hooks=dict.fromkeys(FUSED, add_for_ptflops),
    as_strings=False,
    print_per_layer_stat=False,
)
print(f"thop: {thop_macs / 1e9:.3f} G, ptflops: {ptflops_macs / 1e9:.3f} G")
