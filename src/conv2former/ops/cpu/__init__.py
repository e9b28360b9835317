"""The operations in C++: the kernels of ``conv2former_runtime``, called with tensors."""

from __future__ import annotations

import torch

from conv2former.ops.cpu.depthwise import mlp_middle, mlp_middle_backward, modulation, modulation_backward
from conv2former.ops.cpu.inference import blocks, downsample, head, stem
from conv2former_runtime.library import load


def unusable(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device; None where they can."""
    if device.type != "cpu":
        return "they are for CPUs"
    library = load()
    return library if isinstance(library, str) else None


def takes(dtype: torch.dtype, *, channels: int, kernel_size: int) -> bool:
    """Whether there is code for this dtype (float32, bfloat16), width (at least one vector) and kernel (odd, to 21)."""
    known = dtype in (torch.float32, torch.bfloat16)
    return known and channels >= load().conv2former_lanes() and kernel_size <= load().conv2former_largest_kernel()
