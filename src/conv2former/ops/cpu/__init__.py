"""The operations in C++, compiled for this processor when first used.

No PyTorch headers are involved, so compiling takes seconds; the library is kept in the user's cache folder, under a
name that stands for the source, the compiler and the processor. OpenMP's symbols are those of the library that PyTorch
has loaded: one pool of threads.
"""

from __future__ import annotations

import torch

from conv2former.ops.cpu.build import load
from conv2former.ops.cpu.depthwise import mlp_middle, mlp_middle_backward, modulation, modulation_backward
from conv2former.ops.cpu.inference import blocks, downsample, head, stem
from conv2former.ops.cpu.packing import lanes


def unusable(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device; None where they can. Compiles them when asked for the first time."""
    if device.type != "cpu":
        return "they are for CPUs"
    library = load()
    return library if isinstance(library, str) else None


def takes(dtype: torch.dtype, *, channels: int, kernel_size: int) -> bool:
    """Whether there is code for this dtype (float32, bfloat16), width (at least one vector) and kernel (odd, to 21)."""
    known = dtype in (torch.float32, torch.bfloat16)
    return known and channels >= lanes() and kernel_size <= load().conv2former_largest_kernel()
