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

import torch
from torch import Tensor

__all__ = [
    "Maps",
    "mlp_middle",
    "mlp_middle_backward",
    "modulation",
    "modulation_backward",
    "takes",
    "unusable",
]

OLDEST_CAPABILITY = (8, 0)
LARGEST_KERNEL = 21


@dataclass(frozen=True)
class Maps:
    """The maps of a block, as far as programs depend on them.

    Attributes:
        side: Height and width.
        channels: C.
        hidden: Channels of the MLP's hidden layer.
        kernel_size: Side of the modulation's kernel.
        dtype: Of the maps.
    """

    side: int
    channels: int
    hidden: int
    kernel_size: int
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


def modulation(u: Tensor, v: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Convolutional modulation, z = a * v with a = DWConv_kxk(GELU(u)) + bias.

    Args:
        u: (B, H, W, C), before GELU.
        v: (B, H, W, C), the values.
        weight: (C, 1, k, k).
        bias: (C,).
        keep: Whether to return a, which the backward pass takes.

    Returns:
        z, and a or an empty tensor (0,); contiguous, with u's dtype.
    """
    from conv2former.ops.triton import large_kernel

    return large_kernel.modulation(u, v, weight, bias, keep)


def modulation_backward(
    g: Tensor, u: Tensor, v: Tensor, a: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``modulation`` for u, v, weight and bias, given z's gradient g and the a that was kept."""
    from conv2former.ops.triton import large_kernel

    return large_kernel.modulation_backward(g, u, v, a, weight)


def mlp_middle(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """h + GELU(DWConv3x3(h) + bias) with h = GELU(u); u is (B, H, W, C), weight (C, 1, 3, 3), bias (C,)."""
    from conv2former.ops.triton import three_rows

    return three_rows.mlp_middle(u, weight, bias)


def mlp_middle_backward(g: Tensor, u: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``mlp_middle`` for u, weight and bias, given the output's gradient g."""
    from conv2former.ops.triton import three_rows

    return three_rows.mlp_middle_backward(g, u, weight, bias)
