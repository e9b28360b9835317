"""The middle of the MLP on GPUs: ``h + GELU(DWConv3x3(h) + bias)`` with ``h = GELU(u)``, forward and backward.

The hidden layer is the network's widest tensor, so memory decides: nothing but u is kept, and h never leaves the
registers. A lane walks down a strip of T columns with three rows of T + 2 values in registers; each new row costs T + 2
GELUs for T outputs. The backward pass does the same twice: it computes c = DWConv3x3(h) + bias again, stores
dc = g * GELU'(c) and adds up the weight's gradient, then convolves dc with the flipped kernel.
"""

# mypy: allow-incomplete-defs, allow-untyped-calls
# (in kernels only the constants have types)

from __future__ import annotations

import functools

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
    widen,
    zeros,
)

LANES, WARPS = 256, 4  # two values a thread: more would need too many registers for tiles that are wide enough
SUMS = 10  # of the nine weights and of the bias
PER_PROCESSOR = 3  # programs that a processor holds at once, by their registers
SIZES = ["batch", "H", "W", "chunks", "span"]
TILES = (4, 5, 6, 7, 8, 10, 12, 14)
WIDEST_INNER = 8  # of the tiles of the stage that adds up the weight's gradient, whose sums take registers
INTERPRETED_TILE = 4  # tests take others too


@triton.jit
def read_row(source, pixel, c, x0, W, inside, S: tl.constexpr, T: tl.constexpr, FIRST: tl.constexpr,
             GELU: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Columns x0 - 1 + FIRST to x0 + T - FIRST of one row; zeros beside the map. ``pixel`` is the row's at x0."""
    row = ()
    for j in tl.static_range(FIRST, T + 2 - FIRST):
        mask = inside & (x0 + j >= 1) & (x0 + j <= W)
        value = widen(tl.load(source + pixel * S + c + (j - 1) * S, mask=mask, other=0.0))
        row = append(row, gelu(value, EXACT) if GELU else value)
    return row


@triton.jit
def finish_row(above, middle, below, weights, shift, sums, g, u, out, pixel, c, x0, W, ready, C: tl.constexpr,
               SG: tl.constexpr, SU: tl.constexpr, STAGE: tl.constexpr, EXACT: tl.constexpr, T: tl.constexpr,
               FIRST: tl.constexpr):  # fmt: skip
    """Convolves and stores the middle row; returns the sums."""
    for t in tl.static_range(T):
        inside = ready & (x0 + t < W)
        value = shift
        for j in tl.static_range(t, t + 3):
            if j >= FIRST and j < T + 2 - FIRST:
                value = tl.fma(above[j - FIRST], weights[j - t], value)
                value = tl.fma(middle[j - FIRST], weights[3 + j - t], value)
                value = tl.fma(below[j - FIRST], weights[6 + j - t], value)
        if STAGE == "input":
            value += tl.load(g + pixel * SG + c + t * SG, mask=inside, other=0.0).to(tl.float32)
            value *= gelu_slope(tl.load(u + pixel * SU + c + t * SU, mask=inside, other=0.0).to(tl.float32), EXACT)
        elif STAGE == "inner":
            grad = tl.load(g + pixel * SG + c + t * SG, mask=inside, other=0.0).to(tl.float32)
            value = grad * gelu_slope(value, EXACT)
            for j in tl.static_range(t, t + 3):
                if j >= FIRST and j < T + 2 - FIRST:
                    sums = replace(sums, j - t, tl.fma(above[j - FIRST], value, sums[j - t]))
                    sums = replace(sums, 3 + j - t, tl.fma(middle[j - FIRST], value, sums[3 + j - t]))
                    sums = replace(sums, 6 + j - t, tl.fma(below[j - FIRST], value, sums[6 + j - t]))
            sums = replace(sums, 9, sums[9] + value)
        else:
            value = middle[t + 1 - FIRST] + gelu(value, EXACT)
        tl.store(out + pixel * C + c + t * C, value, mask=inside)
    return sums


@triton.jit(do_not_specialize=SIZES)
def three_rows_kernel(source, taps, bias, g, u, out, partial, batch, H, W, chunks, span, C: tl.constexpr,
                      S: tl.constexpr, SG: tl.constexpr, SU: tl.constexpr, STAGE: tl.constexpr, EXACT: tl.constexpr,
                      CG: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
                      SINGLE: tl.constexpr):  # fmt: skip
    """A 3x3 convolution of the source and what follows it, by marches down strips of T columns.

    The map's rows are dealt out in ``chunks`` of ``span``, one a march. Stage "forward": source u,
    out = h + GELU(c). Stage "inner": source u, out = dc = g * GELU'(c), and partial sums (programs, 10, R, C) of the
    weight's and the bias's gradient. Stage "input": source dc, out = GELU'(u) * (g + dc convolved with the flipped
    kernel). ``S``, ``SG``, ``SU`` are the pixel distances of source, g and u; ``taps`` is (9, C). ``SINGLE`` says that
    one strip spans the map's width.
    """
    R: tl.constexpr = N // CG
    G: tl.constexpr = (C + CG - 1) // CG
    FIRST: tl.constexpr = 1 if SINGLE else 0
    GELU: tl.constexpr = STAGE != "input"
    lane = tl.arange(0, N)
    c = first_channel(tl.program_id(0) % G, C, CG) + lane % CG
    strips = tl.cdiv(W, T)
    weights = ()
    for tap in tl.static_range(9):
        weights = append(weights, tl.load(taps + (tap if GELU else 8 - tap) * C + c))
    shift = tl.load(bias + c).to(tl.float32) if GELU else tl.zeros([N], tl.float32)

    sums = zeros(10, N)
    block = tl.program_id(0) // G
    while block < tl.cdiv(batch * chunks * strips, R):
        item = block * R + lane // CG
        x0 = item % strips * T
        first = item // strips % chunks * span
        image = item // strips // chunks
        used = (lane < R * CG) & (image < batch)
        pixel = (image * H + first).to(tl.int64) * W + x0
        above = read_row(source, pixel - W, c, x0, W, used & (first > 0), S, T, FIRST, GELU, EXACT)
        middle = read_row(source, pixel, c, x0, W, used & (first < H), S, T, FIRST, GELU, EXACT)
        step = 0
        while step < span:
            y = first + step  # the middle row; what a loop carries over costs a change of layout
            pixel = (image * H + y).to(tl.int64) * W + x0
            below = read_row(source, pixel + W, c, x0, W, used & (y < H - 1), S, T, FIRST, GELU, EXACT)
            sums = finish_row(above, middle, below, weights, shift, sums, g, u, out, pixel, c, x0, W,
                              used & (y < H), C, SG, SU, STAGE, EXACT, T, FIRST)  # fmt: skip
            above = middle
            middle = below
            step += 1
        block += tl.num_programs(0) // G
    if STAGE == "inner":
        at = partial + ((tl.program_id(0) // G).to(tl.int64) * 10 * R + lane // CG) * C + c
        for which in tl.static_range(10):
            tl.store(at + which * (R * C), sums[which], mask=lane < R * CG)


@functools.lru_cache(4096)
def candidates(stage: str, width: int, exact: bool) -> list[Config]:
    """The three tiles with the fewest instructions for an output at this width, which are timed.

    One for the stage "inner": its sums depend on the tile, and must not depend on what was faster one day.
    """

    def cost(tile: int) -> float:
        columns = tile if width <= tile else tile + 2
        return (columns * (3 if stage == "input" else 13) + tile * 30 + 40) * ceil_div(width, tile) / width

    inner = stage == "inner"
    widest = WIDEST_INNER if inner else 12 if exact else 14  # the sums and the exact GELU take registers
    tiles = sorted((tile for tile in TILES if tile <= widest), key=cost)[: 1 if inner else 3]
    if INTERPRETED:
        tiles = [INTERPRETED_TILE]
    return [dict(T=tile, SINGLE=width <= tile, **compiling(WARPS, 168)) for tile in tiles]


@functools.lru_cache(4096)
def deal(
    batch: int, height: int, strips: int, positions: int, groups: int, at_once: int, *, persistent: bool
) -> tuple[int, int, int]:
    """How rows are dealt out to marches, for the least time by counting: chunks of a map, rows of a chunk, programs.

    ``positions`` is R, the marches of a block, ``at_once`` how many programs the device holds at once. With
    ``persistent`` no more than those are started, and each takes several blocks.
    """
    found = []
    for wanted in range(1, ceil_div(height, 4) + 1):
        span = ceil_div(height, wanted)
        chunks = ceil_div(height, span)
        blocks = ceil_div(batch * chunks * strips, positions)
        if persistent:
            started = min(blocks, max(at_once // groups, 1))
            rounds = float(ceil_div(blocks, started))
        else:
            started = blocks
            rounds = blocks * groups / at_once + 1  # the last is on average half idle at its beginning and its end
        found.append((rounds * (span + 1.5), chunks, span, started * groups))  # beginning a march costs 1.5 rows
    return min(found)[1:]


_march = Choice()


def march(
    stage: str, source: Tensor, taps: Tensor, bias: Tensor | None, g: Tensor | None, u: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One stage of ``three_rows_kernel``: output of the source's dtype, sums (10, C) of the stage "inner"."""
    batch, height, width, channels = source.shape
    group = channel_group(channels, LANES)
    groups, positions = ceil_div(channels, group), LANES // group
    out = torch.empty((batch, height, width, channels), dtype=source.dtype, device=source.device)
    source, step = pixels(source)
    (g, step_g), (u, step_u) = ((source, 0) if x is None else pixels(x) for x in (g, u))
    exact, inner = source.dtype == torch.float32, stage == "inner"
    at_once = PER_PROCESSOR * processors(source)
    sums = None

    def start(config: Config) -> None:
        nonlocal sums
        strips = ceil_div(width, config["T"])
        chunks, span, programs = deal(batch, height, strips, positions, groups, at_once, persistent=inner)
        partial = source
        if inner:
            shape = programs // groups, SUMS, positions, channels
            sums = partial = torch.empty(shape, dtype=torch.float32, device=source.device)
        launch(
            three_rows_kernel, programs,
            source, taps, taps if bias is None else bias, g, u, out, partial, batch, height, width, chunks, span,
            C=channels, S=step, SG=step_g, SU=step_u, STAGE=stage, EXACT=exact, CG=group, N=LANES, **config,
        )  # fmt: skip

    if inner:  # by its own width alone, not by another one of its class that came first
        start(candidates(stage, width, exact)[0])
    else:
        kind = stage, channels, shape_class(batch * height, width), source.dtype, source.device
        _march.run(kind, lambda: candidates(stage, width, exact), start)
    return out, sums.sum((0, 2)) if sums is not None else None


def mlp_middle(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """h + GELU(DWConv3x3(h) + bias) with h = GELU(u); u is (B, H, W, C), weight (C, 1, 3, 3), bias (C,)."""
    if u.numel() == 0:
        return torch.empty_like(u, memory_format=torch.contiguous_format)
    with on_device_of(u):
        return march("forward", u, by_tap(weight), bias, None, None)[0]


def mlp_middle_backward(g: Tensor, u: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``mlp_middle`` for u, weight and bias, given the output's gradient g."""
    if u.numel() == 0:
        empty = torch.empty_like(u, memory_format=torch.contiguous_format)
        return empty, torch.zeros_like(weight), torch.zeros_like(bias)
    with on_device_of(u):
        taps = by_tap(weight)
        dc, sums = march("inner", u, taps, bias, g, None)
        du, _ = march("input", dc, taps, None, g, u)
    assert sums is not None
    dweight, dbias = sums[: SUMS - 1].t().reshape(weight.shape), sums[SUMS - 1]
    return du, dweight.to(weight.dtype), dbias.to(bias.dtype)
