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

import functools
import math
from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from conv2former.ops.backend import pixels
from conv2former.ops.triton.gelu import gelu, gelu_slope
from conv2former.ops.triton.lanes import (
    INTERPRETED,
    Choice,
    Config,
    append,
    by_tap,
    ceil_div,
    channel_group,
    compiling,
    first_channel,
    launch,
    on_device_of,
    processors,
    replace,
    shape_class,
    use,
    widen,
    zeros,
)

MAX_TILE = 16
INTERPRETED_TILE = 4  # tests take others too
SIZES = ["rows", "H", "W", "columns", "blocks"]


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
    """h = GELU(u) and da = g * v in the padded form, dv = g * a, and partial sums (programs, R, C) of da."""
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
    at = tl.program_id(0) // G * R + lane // CG
    tl.store(partial + at.to(tl.int64) * C + c, total, mask=lane < R * CG)


def convolution_cost(kernel: int, tile: int, per_thread: int, width: int, itemsize: int) -> float:
    """Instructions of the inner loop for each output, by counting."""
    single = width <= tile
    pad = kernel // 2
    columns = tile if single else tile + kernel - 1
    taps = sum(min(tile, j + pad + 1) - max(0, j - pad) for j in range(tile)) if single else tile * kernel
    reading = 1 + (per_thread if itemsize == 2 else 0)  # a load, and making float32 of 16-bit values
    instructions = per_thread * taps + columns * reading + kernel + 16
    return kernel * instructions * -(-width // tile) / (per_thread * width)


TILES = (4, 7, 8, 10, 12, 14, 16)
LANES = (256, 512)  # of the convolution, two or four a thread


def fitting(
    choices: Iterable[tuple[int, int, int]], *, kernel: int, width: int, itemsize: int, registers: int
) -> list[tuple[int, int, int]]:
    """The choices (tile, lanes, warps) that fit, those with the fewest instructions for this kernel and width first.

    ``registers`` is how many a thread may use for accumulators and weights, or gradients; benchmarks/triton_build.py
    shows whether the rest is enough for all else.
    """

    def fits(choice: tuple[int, int, int]) -> bool:
        tile, lanes, warps = choice
        values = lanes // (32 * warps)
        return values <= 4 and values * (tile + kernel) <= registers

    def cost(choice: tuple[int, int, int]) -> float:
        tile, lanes, warps = choice
        return convolution_cost(kernel, tile, lanes // (32 * warps), width, itemsize)

    return sorted(filter(fits, choices), key=cost)


def candidates(kernel: int, channels: int, width: int, itemsize: int) -> list[Config]:
    """The three configurations of the convolution that are timed: its result is the same in all."""
    if INTERPRETED:
        choices = [(INTERPRETED_TILE, 2048, 4)]
    else:
        every = [(tile, lanes, 4) for lanes in LANES for tile in TILES]
        registers = 112 if itemsize == 2 else 96
        choices = fitting(every, kernel=kernel, width=width, itemsize=itemsize, registers=registers)[:3]
    return [
        dict(T=tile, N=lanes, CG=channel_group(channels, lanes), SINGLE=width <= tile, **compiling(warps, 168))
        for tile, lanes, warps in choices
    ]


@triton.jit(do_not_specialize=SIZES)
def convolution_kernel(source, taps, bias, other, out, kept, rows, H, W, C: tl.constexpr, S: tl.constexpr,
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


@functools.cache
def weight_config(kernel: int, channels: int, width: int, itemsize: int) -> Config:
    """The configuration of the weight gradient. Its sums depend on it, and must not on what was faster one day."""
    lanes, group = weight_lanes(channels, kernel)
    if INTERPRETED:
        tile, warps = INTERPRETED_TILE, 4
    else:
        every = [(tile, lanes, warps) for warps in (8, 16) for tile in TILES if itemsize == 2 or tile <= 12]
        registers = 100 if itemsize == 2 else 80
        tile, _, warps = fitting(every, kernel=kernel, width=width, itemsize=itemsize, registers=registers)[0]
    over = -width % tile > kernel // 2
    return dict(CG=group, N=lanes, T=tile, SINGLE=width <= tile, OVER=over, **compiling(warps, 128))


@triton.jit(do_not_specialize=SIZES)
def weight_gradient_kernel(source, da, partial, rows, H, W, blocks, C: tl.constexpr, K: tl.constexpr,
                           CG: tl.constexpr, N: tl.constexpr, T: tl.constexpr, SINGLE: tl.constexpr,
                           OVER: tl.constexpr):  # fmt: skip
    """Partial sums of h (the source) correlated with da, both padded: (programs, k * k, R, C).

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
    sums = partial + (tl.program_id(0) // G).to(tl.int64) * (K * K * R * C) + ((ky * K * R + position) * C + c)
    for kx in tl.static_range(K):
        tl.store(sums + kx * (R * C), acc[kx], mask=lane < K * R * CG)


def pad_lanes(dtype: torch.dtype) -> int:
    """Lanes of the passes over memory: 16 bytes a thread."""
    return 4 * 128 * 4 // dtype.itemsize


@functools.cache
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


_convolution = Choice()


def convolve(source: Tensor, taps: Tensor, bias: Tensor | None, other: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Runs ``convolution_kernel``: forward with a bias (C,) and other = v, backward without and other = u.

    The source is padded, taps are (k * k, C). The results are the output and, with ``keep``, a, else an empty tensor.
    """
    batch, height, width, channels = other.shape
    other, step = pixels(other)
    out = torch.empty((batch, height, width, channels), dtype=other.dtype, device=other.device)
    kept = torch.empty(out.shape, dtype=out.dtype, device=out.device) if keep else source
    rows, kernel, itemsize = batch * height, math.isqrt(taps.shape[0]), other.element_size()
    back = bias is None

    def start(config: Config) -> None:
        groups, positions = ceil_div(channels, config["CG"]), config["N"] // config["CG"]
        launch(
            convolution_kernel, groups * ceil_div(width, config["T"]) * ceil_div(rows, positions),
            source, taps, taps if back else bias, other, out, kept, rows, height, width,
            C=channels, S=step, K=kernel, BACKWARD=back, KEEP=keep, EXACT=itemsize == 4, **config,
        )  # fmt: skip

    kind = kernel, channels, shape_class(rows, width), other.dtype, back, other.device
    _convolution.run(kind, lambda: candidates(kernel, channels, width, itemsize), start)
    return out, kept if keep else out.new_empty(0)


def modulation(u: Tensor, v: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """z = a * v with a = DWConv_kxk(GELU(u)) + bias, and a, which the backward pass takes, or an empty tensor (0,).

    The arguments are those of the operator; the results are contiguous, with u's dtype.
    """
    batch, height, width, channels = u.shape
    if u.numel() == 0:
        return torch.empty_like(u, memory_format=torch.contiguous_format), u.new_empty(u.shape if keep else 0)
    rows, kernel, lanes = batch * height, weight.shape[-1], pad_lanes(u.dtype)
    columns, group = columns_of(rows, width, kernel), channel_group(channels, lanes)
    with on_device_of(u):
        u, step = pixels(u)
        h = torch.empty((columns, channels), dtype=u.dtype, device=u.device)
        launch(
            pad_kernel, ceil_div(channels, group) * ceil_div(columns, lanes // group), u, h, rows, width, columns,
            C=channels, S=step, K=kernel, CG=group, N=lanes, EXACT=u.dtype == torch.float32,
        )  # fmt: skip
        return convolve(h, by_tap(weight), bias, v, keep)


def modulation_backward(
    g: Tensor, u: Tensor, v: Tensor, a: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``modulation`` for u, v, weight and bias, given z's gradient g and the a that was kept."""
    batch, height, width, channels = u.shape
    if u.numel() == 0:
        empty = torch.empty_like(u, memory_format=torch.contiguous_format)
        return empty, empty.clone(), torch.zeros_like(weight), weight.new_zeros(channels)
    rows, kernel, lanes = batch * height, weight.shape[-1], pad_lanes(u.dtype)
    columns, group = columns_of(rows, width, kernel), channel_group(channels, lanes)
    groups, positions = ceil_div(channels, group), lanes // group
    with on_device_of(u):
        g, a = g.contiguous(), a.contiguous()
        (u, step_u), (v, step_v) = pixels(u), pixels(v)
        h = torch.empty((columns, channels), dtype=u.dtype, device=u.device)
        da = torch.empty((columns, channels), dtype=u.dtype, device=u.device)
        dv = torch.empty(a.shape, dtype=u.dtype, device=u.device)
        programs = min(ceil_div(columns, positions), ceil_div(8 * processors(u), groups))
        sums = torch.empty((programs, positions, channels), dtype=torch.float32, device=u.device)
        launch(
            pad_backward_kernel, programs * groups, g, u, v, a, h, da, dv, sums, rows, width, columns,
            C=channels, SU=step_u, SV=step_v, K=kernel, CG=group, N=lanes, EXACT=u.dtype == torch.float32,
        )  # fmt: skip
        du, _ = convolve(da, by_tap(weight), None, u, keep=False)
        dweight = weight_gradient(h, da, u.shape, kernel)
        return du, dv, dweight.to(weight.dtype), sums.sum((0, 1)).to(weight.dtype)


def weight_gradient(h: Tensor, da: Tensor, shape: torch.Size, kernel: int) -> Tensor:
    """(C, 1, k, k) in float32 from the padded h and da of tensors of this shape."""
    batch, height, width, channels = shape
    rows, config = batch * height, weight_config(kernel, channels, width, h.element_size())
    lanes, group = config["N"], config["CG"]
    groups, positions = ceil_div(channels, group), lanes // (kernel * group)
    blocks = ceil_div(rows, positions)
    programs = min(blocks * ceil_div(width, MAX_TILE), ceil_div(processors(h) * 2048, lanes * groups))
    sums = torch.empty((programs, kernel * kernel, positions, channels), dtype=torch.float32, device=h.device)
    launch(
        weight_gradient_kernel, programs * groups,
        h, da, sums, rows, height, width, blocks, C=channels, K=kernel, **config,
    )  # fmt: skip
    return sums.sum((0, 2)).t().reshape(channels, 1, kernel, kernel)
