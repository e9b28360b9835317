"""The middle of the MLP on GPUs: ``h + GELU(DWConv3x3(h) + bias)`` with ``h = GELU(u)``, forward and backward.

The hidden layer is the network's widest tensor, so memory decides: nothing but u is kept, and h never leaves the
registers. A lane walks down a strip of T columns with three rows of T + 2 values in registers; each new row costs T + 2
GELUs for T outputs. The backward pass does the same twice: it computes c = DWConv3x3(h) + bias again, stores
dc = g * GELU'(c) and adds up the weight's gradient, then convolves dc with the flipped kernel.
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
    widen,
    zeros,
)

LANES, WARPS = 256, 4  # two values a thread: more would need too many registers for tiles that are wide enough
SUMS = 10  # of the nine weights and of the bias
SIZES = ["batch", "H", "W", "chunks", "span", "shape"]


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


def cheapest(configs: list[triton.Config], named_args: dict[str, Any], **kwargs: Any) -> list[triton.Config]:
    """The three tiles with the fewest instructions for an output at this width, to be timed.

    One for the stage "inner": its sums depend on the tile, and must not depend on what was faster one day.
    """
    args = named_args | kwargs

    def cost(config: triton.Config) -> float:
        tile, width = config.kwargs["T"], args["W"]
        columns = tile if width <= tile else tile + 2
        return (columns * (3 if args["STAGE"] == "input" else 13) + tile * 30 + 40) * triton.cdiv(width, tile) / width

    inner = args["STAGE"] == "inner"
    widest = 6 if inner else 12 if args["EXACT"] else 14  # the sums and the exact GELU take registers
    return sorted((config for config in configs if config.kwargs["T"] <= widest), key=cost)[: 1 if inner else 3]


TILES = (4,) if INTERPRETED else (4, 5, 6, 7, 8, 10, 12, 14)
CONFIGS = [triton.Config({"T": tile}, num_warps=WARPS, num_stages=1, maxnreg=168) for tile in TILES]


@triton.autotune(CONFIGS, key=["C", "shape", "STAGE"], prune_configs_by={"early_config_prune": cheapest})
@triton.heuristics({"SINGLE": lambda args: args["W"] <= args["T"]})
@triton.jit(do_not_specialize=SIZES)
def three_rows_kernel(source, taps, bias, g, u, out, partial, batch, H, W, chunks, span, shape,
                      C: tl.constexpr, S: tl.constexpr, SG: tl.constexpr, SU: tl.constexpr, STAGE: tl.constexpr,
                      EXACT: tl.constexpr, CG: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
                      SINGLE: tl.constexpr):  # fmt: skip
    """A 3x3 convolution of the source and what follows it, by marches down strips of T columns.

    The map's rows are dealt out in ``chunks`` of ``span``, one a march. Stage "forward": source u,
    out = h + GELU(c). Stage "inner": source u, out = dc = g * GELU'(c), and partial sums (programs, groups, 10, N) of
    the weight's and the bias's gradient. Stage "input": source dc, out = GELU'(u) * (g + dc convolved with the flipped
    kernel). ``S``, ``SG``, ``SU`` are the pixel distances of source, g and u; ``taps`` is (9, C). ``SINGLE`` says that
    one strip spans the map's width.
    """
    R: tl.constexpr = N // CG
    G: tl.constexpr = (C + CG - 1) // CG
    FIRST: tl.constexpr = 1 if SINGLE else 0
    INPUT: tl.constexpr = STAGE == "input"
    INNER: tl.constexpr = STAGE == "inner"
    lane = tl.arange(0, N)
    c = first_channel(tl.program_id(0) % G, C, CG) + lane % CG
    strips = tl.cdiv(W, T)
    weights = ()
    for tap in tl.static_range(9):
        weights = append(weights, tl.load(taps + (8 - tap if INPUT else tap) * C + c))
    shift = tl.zeros([N], tl.float32) if INPUT else tl.load(bias + c).to(tl.float32)

    sums = zeros(10, N)
    block = tl.program_id(0) // G
    while block < tl.cdiv(batch * chunks * strips, R):
        item = block * R + lane // CG
        x0 = item % strips * T
        first = item // strips % chunks * span
        image = item // strips // chunks
        used = (lane < R * CG) & (image < batch)
        top = zeros(T + 2 - 2 * FIRST, N)
        middle = zeros(T + 2 - 2 * FIRST, N)
        step = 0
        while step < span + 2:
            y = first + step - 1  # the row that is read; the one above it is finished
            pixel = (image * H + y).to(tl.int64) * W + x0
            bottom = read_row(source, pixel, c, x0, W, used & (y >= 0) & (y < H), S, T, FIRST, not INPUT, EXACT)
            pixel -= W
            ready = used & (y > first) & (y <= H)  # from the third row on
            for t in tl.static_range(T):
                inside = ready & (x0 + t < W)
                value = shift
                for j in tl.static_range(t, t + 3):
                    if j >= FIRST and j < T + 2 - FIRST:
                        value = tl.fma(top[j - FIRST], weights[j - t], value)
                        value = tl.fma(middle[j - FIRST], weights[3 + j - t], value)
                        value = tl.fma(bottom[j - FIRST], weights[6 + j - t], value)
                if INPUT:
                    value += tl.load(g + pixel * SG + c + t * SG, mask=inside, other=0.0).to(tl.float32)
                    value *= gelu_slope(
                        tl.load(u + pixel * SU + c + t * SU, mask=inside, other=0.0).to(tl.float32), EXACT
                    )
                elif INNER:
                    grad = tl.load(g + pixel * SG + c + t * SG, mask=inside, other=0.0).to(tl.float32)
                    value = grad * gelu_slope(value, EXACT)
                    for j in tl.static_range(t, t + 3):
                        if j >= FIRST and j < T + 2 - FIRST:
                            sums = replace(sums, j - t, tl.fma(top[j - FIRST], value, sums[j - t]))
                            sums = replace(sums, 3 + j - t, tl.fma(middle[j - FIRST], value, sums[3 + j - t]))
                            sums = replace(sums, 6 + j - t, tl.fma(bottom[j - FIRST], value, sums[6 + j - t]))
                    sums = replace(sums, 9, sums[9] + value)
                else:
                    value = middle[t + 1 - FIRST] + gelu(value, EXACT)
                tl.store(out + pixel * C + c + t * C, value, mask=inside)
            top = middle
            middle = bottom
            step += 1
        block += tl.num_programs(0) // G
    if INNER:
        for which in tl.static_range(10):
            tl.store(partial + (tl.program_id(0).to(tl.int64) * 10 + which) * N + lane, sums[which])


def march(
    stage: str, source: Tensor, weight: Tensor, bias: Tensor | None, g: Tensor | None, u: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Runs one stage of ``three_rows_kernel``.

    Returns:
        Its output, contiguous with the source's dtype, and the sums (10, C) of the stage "inner".
    """
    batch, height, width, channels = source.shape
    group = channel_group(channels, LANES)
    groups, positions = triton.cdiv(channels, group), LANES // group
    full = triton.cdiv(batch * triton.cdiv(width, 8), positions) * groups  # programs, were a march the map's height
    chunks = min(triton.cdiv(height, 8), triton.cdiv(8 * processors(source), full))
    span = triton.cdiv(height, chunks)
    chunks = triton.cdiv(height, span)
    out = torch.empty_like(source, memory_format=torch.contiguous_format)

    def programs(meta: dict[str, Any]) -> int:
        return triton.cdiv(batch * chunks * triton.cdiv(width, meta["T"]), positions)

    inner = stage == "inner"
    persistent = min(programs({"T": max(TILES)}), triton.cdiv(4 * processors(source), groups))
    sums = torch.empty((persistent if inner else 0, groups, SUMS, LANES), dtype=torch.float32, device=source.device)
    (source, step), taps = pixels(source), by_tap(weight)
    (g, step_g), (u, step_u) = ((source, 0) if x is None else pixels(x) for x in (g, u))
    three_rows_kernel[lambda meta: (groups * (persistent if inner else programs(meta)),)](
        source, taps, taps if bias is None else bias, g, u, out, sums, batch, height, width, chunks, span,
        shape_class(batch * height, width), C=channels, S=step, SG=step_g, SU=step_u, STAGE=stage,
        EXACT=out.dtype == torch.float32, CG=group, N=LANES,
    )  # fmt: skip
    return out, fold(sums, channels, group, positions)


def mlp_middle(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See ``conv2former.ops.triton.mlp_middle``."""
    if u.numel() == 0:
        return torch.empty_like(u, memory_format=torch.contiguous_format)
    with on_device_of(u):
        return march("forward", u, weight, bias, None, None)[0]


def mlp_middle_backward(g: Tensor, u: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ``conv2former.ops.triton.mlp_middle_backward``."""
    if u.numel() == 0:
        return (
            torch.empty_like(u, memory_format=torch.contiguous_format),
            torch.zeros_like(weight),
            torch.zeros_like(bias),
        )
    with on_device_of(u):
        dc, sums = march("inner", u, weight, bias, g, None)
        du, _ = march("input", dc, weight, None, g, u)
    dweight, dbias = sums[:9].t().reshape(weight.shape), sums[9]
    return du, dweight.to(weight.dtype), dbias.to(bias.dtype)
