"""The fused operations in Triton, for NVIDIA GPUs of compute capability 8.0 and newer.

Values and gradients of the functions below; ``conv2former.ops`` makes operators of them. Tensors are NHWC, that is
(B, H, W, C), in float32, bfloat16 or float16; sums are taken in float32. Kernels are k x k, k odd, 3 to 21, and have
the weight of a depthwise convolution, (C, 1, k, k), and a bias (C,). Nothing is accumulated by atomics: the same input
gives the same bits. Nothing here imports Triton or asks for a GPU before a function is called.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch

OLDEST_CAPABILITY = (8, 0)
LARGEST_KERNEL = 21
# files that import Triton, when an operation in them is first asked for
FILES = dict(modulation="large_kernel", mlp_middle="three_rows")


@dataclass(frozen=True)
class Maps:
    """The maps of a block, as far as programs depend on them."""

    side: int  # height and width
    channels: int
    hidden: int  # channels of the MLP's hidden layer
    kernel_size: int  # side of the modulation's kernel
    dtype: torch.dtype


def unusable(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, in a few words; None if they can.

    With ``TRITON_INTERPRET=1`` Triton's interpreter runs them, slowly, for tests: tensors of the CPU are then fine.
    """
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not on an NVIDIA GPU"
    if not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU"
    if torch.version.hip is not None:
        return "the GPU is not NVIDIA's"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, and 8.0 is needed"
    return None


def takes(dtype: torch.dtype, *, channels: int, kernel_size: int) -> bool:
    """Whether there is code for this dtype and kernel; any number of channels is taken."""
    known = dtype in (torch.float32, torch.bfloat16, torch.float16)
    return known and channels > 0 and kernel_size % 2 == 1 and 3 <= kernel_size <= LARGEST_KERNEL


def __getattr__(name: str) -> Any:
    if (file := FILES.get(name.removesuffix("_backward"))) is not None:
        return getattr(importlib.import_module(f"conv2former.ops.triton.{file}"), name)
    raise AttributeError(name)
