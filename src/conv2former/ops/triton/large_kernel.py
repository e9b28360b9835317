"""Convolutional modulation on GPUs: ``z = (DWConv_kxk(GELU(u)) + bias) * v``, forward and backward.

A large depthwise convolution has k * k multiply-adds for each element that is read and written: it is limited by the
rate of float32 multiply-adds, and only if little else is executed. Hence:

- A lane keeps T neighbouring outputs of one row in registers, and the k weights of one kernel row. It reads each of the
  T + k - 1 inputs of that row once and uses it up to k times. The loop over kernel rows is not unrolled.
- GELU is taken once per element, by a pass before, and not once per tap. That pass leaves zeros beside each row, so
  that the inner loop needs no masks; a kernel row above or below the map points to a row of zeros.
- The backward pass forms da = g * v in the same way and convolves it with the flipped kernel; the weight gradient lets
  kernel rows share the lanes of a program, so that one reading of h and da serves them all.

The padded form of a (B, H, W, C) tensor is (columns, C) with P = k // 2: P columns of zeros, then for each of the B * H
rows W columns and P zeros, then a row of zeros and what a tile may read beyond. Offsets are 64-bit where they may need
it; B * H * (W + P) stays below 2^31.
"""

# mypy: allow-incomplete-defs, allow-untyped-calls
# (in kernels only the constants have types)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from conv2former.ops.backend import pixels
from conv2former.ops.triton.gelu import gelu, gelu_slope
from conv2former.ops.triton.lanes import (
    INTERPRETED,
    append,
    by_tap,
    channel_group,
    first_channel,
    fold,
    on_device_of,
    processors,
    replace,
    shape_class,
    use,
    widen,
    zeros,
)

MAX_TILE = 16
SIZES = ["rows", "H", "W", "columns", "blocks", "shape"]


def columns_of(rows: int, width: int, kernel: int) -> int:
    """Columns of the padded form."""
    pad = kernel // 2
    return pad + (rows + 1) * (width + pad) + MAX_TILE + kernel


@triton.jit(do_not_specialize=SIZES)
def pad_kernel(u, h, rows, W, columns, C: tl.constexpr, S: tl.constexpr, K: tl.constexpr, CG: tl.constexpr,
               N: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """h = GELU(u) in the padded form. A program fills R columns of one group."""
    P: tl.constexpr = K // 2
    R: tl.constexpr = N // CG
    G: tl.constexpr = (C + CG - 1) // CG
    lane = tl.arange(0, N)
    c = first_channel(tl.program_id(0) % G, C, CG) + lane % CG
    column = tl.program_id(0) // G * R + lane // CG
    row = (column - P) // (W + P)
    x = column - P - row * (W + P)
    inside = (column >= P) & (x < W) & (row < rows)
    value = tl.load(u + (row * W + x).to(tl.int64) * S + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + column.to(tl.int64) * C + c, gelu(value, EXACT), mask=(lane < R * CG) & (column < columns))


@triton.jit(do_not_specialize=SIZES)
def pad_backward_kernel(g, u, v, a, h, da, dv, partial, rows, W, columns, C: tl.constexpr, SU: tl.constexpr,
                        SV: tl.constexpr, K: tl.constexpr, CG: tl.constexpr, N: tl.constexpr,
                        EXACT: tl.constexpr):  # fmt: skip
    """h = GELU(u) and da = g * v in the padded form, dv = g * a, and partial sums of da for the bias."""
    P: tl.constexpr = K // 2
    R: tl.constexpr = N // CG
    G: tl.constexpr = (C + CG - 1) // CG
    programs = tl.num_programs(0) // G
    lane = tl.arange(0, N)
    c = first_channel(tl.program_id(0) % G, C, CG) + lane % CG
    total = tl.zeros([N], tl.float32)
    block = tl.program_id(0) // G
    while block < tl.cdiv(columns, R):
        column = block * R + lane // CG
        row = (column - P) // (W + P)
        x = column - P - row * (W + P)
        used = (lane < R * CG) & (column < columns)
        inside = used & (column >= P) & (x < W) & (row < rows)
        pixel = (row * W + x).to(tl.int64)
        grad = tl.load(g + pixel * C + c, mask=inside, other=0.0).to(tl.float32)
        weighed = grad * tl.load(v + pixel * SV + c, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(u + pixel * SU + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(dv + pixel * C + c, grad * tl.load(a + pixel * C + c, mask=inside, other=0.0), mask=inside)
        padded = column.to(tl.int64) * C + c
        tl.store(da + padded, weighed, mask=used)
        tl.store(h + padded, gelu(value, EXACT), mask=used)
        total += weighed
        block += programs
    tl.store(partial + tl.program_id(0).to(tl.int64) * N + lane, total)


def convolution_cost(kernel: int, tile: int, per_thread: int, width: int, itemsize: int) -> float:
    """Instructions of the inner loop for each output, by counting."""
    single = width <= tile
    pad = kernel // 2
    columns = tile if single else tile + kernel - 1
    taps = sum(min(tile, j + pad + 1) - max(0, j - pad) for j in range(tile)) if single else tile * kernel
    reading = 1 + (per_thread if itemsize == 2 else 0)  # a load, and making float32 of 16-bit values
    instructions = per_thread * taps + columns * reading + kernel + 16
    return kernel * instructions * -(-width // tile) / (per_thread * width)


def ranked(configs: list[triton.Config], args: dict[str, Any], registers: int) -> list[triton.Config]:
    """The configurations that fit, those with the fewest instructions for this kernel size and width first.

    Args:
        configs: Tiles and warps.
        args: The kernel's arguments.
        registers: How many a thread may use for accumulators and weights, or gradients; benchmarks/triton_build.py
            shows whether the rest is enough for all else.
    """
    kernel, width, itemsize = args["K"], args["W"], args["source"].element_size()

    def per_thread(config: triton.Config) -> int:
        return (args | config.kwargs)["N"] // (32 * config.num_warps)

    def fits(config: triton.Config) -> bool:
        values = per_thread(config)
        return values <= 4 and values * (config.kwargs["T"] + kernel) <= registers

    def cost(config: triton.Config) -> float:
        return convolution_cost(kernel, config.kwargs["T"], per_thread(config), width, itemsize)

    return sorted(filter(fits, configs), key=cost)


def cheapest(configs: list[triton.Config], named_args: dict[str, Any], **kwargs: Any) -> list[triton.Config]:
    """The three configurations of the convolution to be timed: its result is the same in all."""
    args = named_args | kwargs
    return ranked(configs, args, 112 if args["source"].element_size() == 2 else 96)[:3]


TILES = (4, 7, 8, 10, 12, 14, 16)
CONFIGS = (
    [triton.Config({"T": 4, "N": 2048}, num_warps=4)]
    if INTERPRETED
    else [triton.Config({"T": t, "N": 128 * e}, num_warps=4, num_stages=1, maxnreg=168) for e in (2, 4) for t in TILES]
)


@triton.autotune(CONFIGS, key=["K", "C", "shape", "BACKWARD"], prune_configs_by={"early_config_prune": cheapest})
@triton.heuristics(
    {
        "CG": lambda args: channel_group(args["C"], args["N"]),
        "SINGLE": lambda args: args["W"] <= args["T"],
    }
)
@triton.jit(do_not_specialize=SIZES)
def convolution_kernel(source, taps, bias, other, out, kept, rows, H, W, shape, C: tl.constexpr, S: tl.constexpr,
                       K: tl.constexpr, BACKWARD: tl.constexpr, KEEP: tl.constexpr, EXACT: tl.constexpr,
                       CG: tl.constexpr, N: tl.constexpr, T: tl.constexpr, SINGLE: tl.constexpr):  # fmt: skip
    """The convolution of a padded source with what follows it.

    Forward: source h, other v; kept = a where ``KEEP``, out = a * v. Backward: source da, other u;
    out = GELU'(u) * (da convolved with the flipped kernel). ``taps`` is (k * k, C). ``S`` is the pixel distance of
    other. ``SINGLE`` says that one tile spans the map's width, so that no tap of the columns beside it counts.
    """
    P: tl.constexpr = K // 2
    R: tl.constexpr = N // CG
    G: tl.constexpr = (C + CG - 1) // CG
    FIRST: tl.constexpr = P if SINGLE else 0
    LAST: tl.constexpr = P + T if SINGLE else T + K - 1
    strips = tl.cdiv(W, T)
    lane = tl.arange(0, N)
    c = first_channel(tl.program_id(0) % G, C, CG) + lane % CG
    x0 = tl.program_id(0) // G % strips * T
    begin = tl.program_id(0) // G // strips * R
    row = tl.minimum(begin + lane // CG % R, rows - 1)
    y = row % H

    acc = zeros(T, N)
    for ky in range(K):
        inside = (y + ky >= P) & (y + ky < H + P)
        line = tl.where(inside, row + ky - P, rows)  # or the row of zeros
        at = source + (line.to(tl.int64) * (W + P) + x0) * C + c
        weights = ()
        for kx in tl.static_range(K):
            tap = K * K - 1 - (ky * K + kx) if BACKWARD else ky * K + kx
            weights = append(weights, tl.load(taps + tap * C + c))
        for j in tl.static_range(FIRST, LAST):
            value = widen(tl.load(at + j * C))
            for t in tl.static_range(T):
                if j >= t and j - t < K:
                    acc = replace(acc, t, tl.fma(value, weights[j - t], acc[t]))

    pixel = row.to(tl.int64) * W + x0
    used = (lane < R * CG) & (begin + lane // CG < rows)
    left = tl.zeros([N], tl.int32) + (W - x0)  # columns of the map from the tile's first on
    shift = 0.0 if BACKWARD else tl.load(bias + c).to(tl.float32)
    for t in tl.static_range(T):
        inside = used & (left > t)
        a = acc[t] + shift
        beside = tl.load(other + pixel * S + c + t * S, mask=inside, other=0.0).to(tl.float32)
        if KEEP:
            tl.store(kept + pixel * C + c + t * C, a, mask=inside)
        result = a * (gelu_slope(beside, EXACT) if BACKWARD else beside)
        tl.store(out + pixel * C + c + t * C, result, mask=inside)


def the_cheapest(configs: list[triton.Config], named_args: dict[str, Any], **kwargs: Any) -> list[triton.Config]:
    """One configuration of the weight gradient: its sums depend on it, and must not on what was faster one day."""
    args = named_args | kwargs
    return ranked(configs, args, 100 if args["source"].element_size() == 2 else 80)[:1]


WEIGHT_CONFIGS = (
    [triton.Config({"T": 4}, num_warps=4)]
    if INTERPRETED
    else [triton.Config({"T": t}, num_warps=w, num_stages=1, maxnreg=128) for w in (8, 16) for t in TILES]
)


@triton.autotune(WEIGHT_CONFIGS, key=["K", "C", "shape", "N"], prune_configs_by={"early_config_prune": the_cheapest})
@triton.heuristics(
    {
        "SINGLE": lambda args: args["W"] <= args["T"],
        "OVER": lambda args: -args["W"] % args["T"] > args["K"] // 2,
    }
)
@triton.jit(do_not_specialize=SIZES)
def weight_gradient_kernel(source, da, partial, rows, H, W, blocks, shape, C: tl.constexpr, K: tl.constexpr,
                           CG: tl.constexpr, N: tl.constexpr, T: tl.constexpr, SINGLE: tl.constexpr,
                           OVER: tl.constexpr):  # fmt: skip
    """Partial sums of h (the source) correlated with da, both padded: (programs, groups, k * k, R * CG).

    A lane is (kernel row, position, channel); ``blocks`` of R rows make the map. A program walks down strips of T
    columns with the k sums of a kernel row in each lane's registers. ``SINGLE`` as above; ``OVER`` says that the last
    strip reaches beyond the zeros on da's right.
    """
    P: tl.constexpr = K // 2
    R: tl.constexpr = N // (CG * K)
    G: tl.constexpr = (C + CG - 1) // CG
    FIRST: tl.constexpr = P if SINGLE else 0
    LAST: tl.constexpr = P + T if SINGLE else T + K - 1
    lane = tl.arange(0, N)
    c = first_channel(tl.program_id(0) % G, C, CG) + lane % CG
    position = lane // CG % R
    ky = lane // (CG * R) % K
    units = blocks * tl.cdiv(W, T)
    each = tl.cdiv(units, tl.num_programs(0) // G)
    begin = tl.program_id(0) // G * each

    acc = zeros(K, N)
    unit = begin
    while unit < tl.minimum(begin + each, units):
        x0 = unit // blocks * T
        row = unit % blocks * R + position
        y = row % H + ky
        line = tl.where((y >= P) & (y < H + P) & (row < rows), row + ky - P, rows)
        at = source + (line.to(tl.int64) * (W + P) + x0) * C + c
        ours = da + (tl.minimum(row, rows).to(tl.int64) * (W + P) + P + x0) * C + c
        left = tl.zeros([N], tl.int32) + (W - x0)
        grads = ()
        for t in tl.static_range(T):
            if OVER:
                grads = append(grads, widen(tl.load(ours + t * C, mask=left > t, other=0.0)))
            else:
                grads = append(grads, widen(tl.load(ours + t * C)))
        for j in tl.static_range(FIRST, LAST):
            value = widen(tl.load(at + j * C))
            for t in tl.static_range(T):
                if j >= t and j - t < K:
                    acc = replace(acc, j - t, tl.fma(value, grads[t], acc[j - t]))
        unit += 1
    sums = partial + (tl.program_id(0).to(tl.int64) * K + ky) * (K * R * CG) + lane % (R * CG)
    for kx in tl.static_range(K):
        tl.store(sums + kx * (R * CG), acc[kx], mask=lane < K * R * CG)


def pad_lanes(dtype: torch.dtype) -> int:
    """Lanes of the passes over memory: 16 bytes a thread."""
    return 4 * 128 * 4 // dtype.itemsize


def weight_lanes(channels: int, kernel: int) -> tuple[int, int]:
    """Lanes and channel group of the weight gradient, for the most use of the lanes.

    2048 lanes are four a thread, too many for the sums of a large kernel.
    """

    def worth(choice: tuple[int, int]) -> float:
        lanes, group = choice
        each = lanes // kernel  # lanes of one kernel row
        return use(channels, group, each) * each * kernel / lanes

    choices = (1024, 2048) if kernel <= 11 else (1024,)
    return max(((lanes, channel_group(channels, lanes // kernel)) for lanes in choices), key=worth)


def convolve(source: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Runs ``convolution_kernel``: forward with a bias, backward without."""
    batch, height, width, channels = other.shape
    other, step = pixels(other)
    out = torch.empty_like(other, memory_format=torch.contiguous_format)
    kept = torch.empty_like(out) if keep else out.new_empty(0)
    rows, taps = batch * height, by_tap(weight)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        groups, positions = triton.cdiv(channels, meta["CG"]), meta["N"] // meta["CG"]
        return (groups * triton.cdiv(width, meta["T"]) * triton.cdiv(rows, positions),)

    convolution_kernel[grid](
        source, taps, taps if bias is None else bias, other, out, kept, rows, height, width, shape_class(rows, width),
        C=channels, S=step, K=weight.shape[-1], BACKWARD=bias is None, KEEP=keep, EXACT=out.dtype == torch.float32,
    )  # fmt: skip
    return out, kept


def modulation(u: Tensor, v: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """See ``conv2former.ops.triton.modulation``."""
    batch, height, width, channels = u.shape
    if u.numel() == 0:
        return torch.empty_like(u, memory_format=torch.contiguous_format), u.new_empty(u.shape if keep else 0)
    rows, kernel, lanes = batch * height, weight.shape[-1], pad_lanes(u.dtype)
    columns, group = columns_of(rows, width, kernel), channel_group(channels, lanes)
    with on_device_of(u):
        u, step = pixels(u)
        h = u.new_empty(columns, channels)
        grid = (triton.cdiv(channels, group) * triton.cdiv(columns, lanes // group),)
        pad_kernel[grid](
            u, h, rows, width, columns,
            C=channels, S=step, K=kernel, CG=group, N=lanes, EXACT=u.dtype == torch.float32,
        )  # fmt: skip
        return convolve(h, weight, bias, v, keep)


def modulation_backward(
    g: Tensor, u: Tensor, v: Tensor, a: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``conv2former.ops.triton.modulation_backward``."""
    batch, height, width, channels = u.shape
    if u.numel() == 0:
        empty = torch.empty_like(u, memory_format=torch.contiguous_format)
        return empty, empty.clone(), torch.zeros_like(weight), weight.new_zeros(channels)
    rows, kernel, lanes = batch * height, weight.shape[-1], pad_lanes(u.dtype)
    columns, group = columns_of(rows, width, kernel), channel_group(channels, lanes)
    groups, positions = triton.cdiv(channels, group), lanes // group
    with on_device_of(u):
        g, a = g.contiguous(), a.contiguous()
        (u, step_u), (v, step_v) = pixels(u), pixels(v)
        h, da, dv = u.new_empty(columns, channels), u.new_empty(columns, channels), torch.empty_like(a)
        programs = min(triton.cdiv(columns, positions), triton.cdiv(8 * processors(u), groups))
        sums = torch.empty((programs, groups, 1, lanes), dtype=torch.float32, device=u.device)
        pad_backward_kernel[(programs * groups,)](
            g, u, v, a, h, da, dv, sums, rows, width, columns,
            C=channels, SU=step_u, SV=step_v, K=kernel, CG=group, N=lanes, EXACT=u.dtype == torch.float32,
        )  # fmt: skip
        dbias = fold(sums, channels, group, positions)[0]
        du, _ = convolve(da, weight, None, u, keep=False)
        dweight = weight_gradient(h, da, u.shape, kernel)
    return du, dv, dweight.to(weight.dtype), dbias.to(weight.dtype)


def weight_gradient(h: Tensor, da: Tensor, shape: torch.Size, kernel: int) -> Tensor:
    """(C, 1, k, k) in float32 from the padded h and da of tensors of this shape."""
    batch, height, width, channels = shape
    rows, (lanes, group) = batch * height, weight_lanes(channels, kernel)
    groups, positions = triton.cdiv(channels, group), lanes // (kernel * group)
    blocks = triton.cdiv(rows, positions)
    programs = min(blocks * triton.cdiv(width, MAX_TILE), triton.cdiv(processors(h) * 2048, lanes * groups))
    sums = torch.empty((programs, groups, kernel * kernel, positions * group), dtype=torch.float32, device=h.device)
    weight_gradient_kernel[(programs * groups,)](
        h, da, sums, rows, height, width, blocks, shape_class(rows, width), C=channels, K=kernel, CG=group, N=lanes
    )
    return fold(sums, channels, group, positions).t().reshape(channels, 1, kernel, kernel)
