"""Layer scale, stochastic depth and the residual connection on GPUs: ``x + y * scale * keep[b]`` in one pass."""

# mypy: allow-incomplete-defs, allow-untyped-calls
# (in kernels only the constants have types)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from conv2former.ops.backend import pixels
from conv2former.ops.triton.lanes import channel_group, first_channel, fold, on_device_of, processors

LANES, WARPS = 512, 4  # four values a thread: 8 or 16 bytes in each access
SIZES = ["count", "area"]


@triton.jit
def factor(scale, keep, pixel, c, area, SCALE: tl.constexpr, KEEP: tl.constexpr, N: tl.constexpr):
    """scale * keep at these lanes."""
    value = tl.full([N], 1.0, tl.float32)
    if SCALE:
        value = tl.load(scale + c).to(tl.float32)
    if KEEP:
        value = value * tl.load(keep + pixel // area)
    return value


@triton.jit(do_not_specialize=SIZES)
def residual_kernel(x, y, scale, keep, out, count, area, C: tl.constexpr, SX: tl.constexpr, SY: tl.constexpr,
                    SCALE: tl.constexpr, KEEP: tl.constexpr, CG: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """One program adds R of ``count`` pixels of one group of channels; ``area`` pixels make an image."""
    R: tl.constexpr = N // CG
    G: tl.constexpr = (C + CG - 1) // CG
    lane = tl.arange(0, N)
    c = first_channel(tl.program_id(0) % G, C, CG) + lane % CG
    pixel = tl.program_id(0) // G * R + lane // CG
    inside = (lane < R * CG) & (pixel < count)
    pixel = tl.minimum(pixel, count - 1)
    at = pixel.to(tl.int64)
    branch = tl.load(y + at * SY + c, mask=inside, other=0.0).to(tl.float32)
    sum = tl.fma(
        branch,
        factor(scale, keep, pixel, c, area, SCALE, KEEP, N),
        tl.load(x + at * SX + c, mask=inside).to(tl.float32),
    )
    tl.store(out + at * C + c, sum, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def residual_backward_kernel(g, y, scale, keep, dy, partial, count, area, C: tl.constexpr, SG: tl.constexpr,
                             SY: tl.constexpr, SCALE: tl.constexpr, KEEP: tl.constexpr, CG: tl.constexpr,
                             N: tl.constexpr):  # fmt: skip
    """dy = g * scale * keep, and partial sums of g * y * keep for scale."""
    R: tl.constexpr = N // CG
    G: tl.constexpr = (C + CG - 1) // CG
    programs = tl.num_programs(0) // G
    lane = tl.arange(0, N)
    c = first_channel(tl.program_id(0) % G, C, CG) + lane % CG
    total = tl.zeros([N], tl.float32)
    for block in range(tl.program_id(0) // G, tl.cdiv(count, R), programs):
        pixel = block * R + lane // CG
        inside = (lane < R * CG) & (pixel < count)
        pixel = tl.minimum(pixel, count - 1)
        at = pixel.to(tl.int64)
        grad = tl.load(g + at * SG + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(dy + at * C + c, grad * factor(scale, keep, pixel, c, area, SCALE, KEEP, N), mask=inside)
        if SCALE:
            grad *= factor(scale, keep, pixel, c, area, False, KEEP, N)
            total = tl.fma(grad, tl.load(y + at * SY + c, mask=inside, other=0.0).to(tl.float32), total)
    if SCALE:
        tl.store(partial + tl.program_id(0).to(tl.int64) * N + lane, total)


def residual(x: Tensor, y: Tensor, scale: Tensor | None, keep: Tensor | None) -> Tensor:
    """See ``conv2former.ops.triton.residual``."""
    batch, height, width, channels = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return out
    group, count = channel_group(channels, LANES), batch * height * width
    with on_device_of(x):
        (x, step_x), (y, step_y) = pixels(x), pixels(y)
        residual_kernel[(triton.cdiv(channels, group) * triton.cdiv(count, LANES // group),)](
            x, y, x if scale is None else scale, x if keep is None else keep, out, count, height * width,
            C=channels, SX=step_x, SY=step_y, SCALE=scale is not None, KEEP=keep is not None, CG=group, N=LANES,
            num_warps=WARPS,
        )  # fmt: skip
    return out


def residual_backward(g: Tensor, y: Tensor, scale: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """See ``conv2former.ops.triton.residual_backward``."""
    batch, height, width, channels = y.shape
    dy = torch.empty_like(y, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return dy, None if scale is None else torch.zeros_like(scale)
    group, count = channel_group(channels, LANES), batch * height * width
    groups, positions = triton.cdiv(channels, group), LANES // group
    with on_device_of(y):
        (g, step_g), (y, step_y) = pixels(g), pixels(y)
        programs = min(triton.cdiv(count, positions), triton.cdiv(16 * processors(y), groups))
        sums = torch.empty((programs, groups, 1, LANES), dtype=torch.float32, device=y.device)
        residual_backward_kernel[(programs * groups,)](
            g, y, y if scale is None else scale, y if keep is None else keep, dy, sums, count, height * width,
            C=channels, SG=step_g, SY=step_y, SCALE=scale is not None, KEEP=keep is not None, CG=group, N=LANES,
            num_warps=WARPS,
        )  # fmt: skip
        dscale = None if scale is None else fold(sums, channels, group, positions)[0].to(scale.dtype)
    return dy, dscale
