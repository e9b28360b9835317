"""Weights in the order that the kernels of inference read them, which depends on the processor: numpy alone.

bfloat16 numbers are arrays of uint16, their bits. ``Part``s say how each weight of an operation is packed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from conv2former_runtime.library import load

Array = npt.NDArray[Any]
Part = tuple[str, tuple[int, ...]]  # a method of `Layout`, and the shape of the weight
ALIGNMENT = 64  # bytes: the kernels load whole vectors
_FLOATS = ("vectors", "depthwise")  # weights that are float32 in every network


@dataclass(frozen=True)
class Layout:
    """What the order depends on.

    Attributes:
        lanes: Floats in a vector.
        panel: Outputs in a panel.
        together: Inputs that one instruction multiplies with their weights and adds up: 2 where it takes bfloat16.
    """

    lanes: int
    panel: int
    together: int

    def pack(self, parts: Sequence[Part], arrays: Sequence[Array]) -> Array:
        """All weights packed, one after the other: bytes, their address and number multiples of ``ALIGNMENT``."""
        made = []
        for (how, shape), array in zip(parts, arrays, strict=True):
            made.append(getattr(self, how)(self._numbers(how, array.reshape(shape))).ravel().view(np.uint8))
        whole = _aligned(self.size(parts))
        np.concatenate(made, out=whole[: sum(each.size for each in made)])
        return whole

    def unpack(self, parts: Sequence[Part], packed: Array) -> Iterator[Array]:
        """The opposite of ``pack``, from its array of bytes."""
        for (how, shape), part in zip(parts, self.views(parts, packed), strict=True):
            flat, order = part.view(np.uint16 if self._itemsize(how) == 2 else np.float32), self._order(how, shape)
            plain = np.empty(math.prod(shape), flat.dtype)
            plain[order[order > 0] - 1] = flat[order > 0]
            yield plain.reshape(shape)

    def size(self, parts: Sequence[Part]) -> int:
        """Bytes of ``pack``."""
        return _up(sum(self._bytes(parts)), ALIGNMENT)

    def views(self, parts: Sequence[Part], packed: Array) -> list[Array]:
        """Where each weight lies in what ``pack`` made."""
        return _divided(packed, self._bytes(parts))

    # the ways to pack a weight; zeros fill up what is not whole

    def vectors(self, x: Array) -> Array:
        """(C,) in whole vectors."""
        return _padded(x, 0, self.lanes)

    def depthwise(self, weight: Array) -> Array:
        """(C, 1, k, k) -> (C / lanes, k * k, lanes)."""
        flat = _padded(weight.reshape(len(weight), -1), 0, self.lanes)
        return flat.reshape(-1, self.lanes, flat.shape[1]).swapaxes(1, 2)

    def panels(self, weight: Array) -> Array:
        """(out, in) in panels of outputs: in each, one input (or pair of inputs) after the other."""
        weight = _padded(_padded(weight, 1, self.together), 0, self.lanes)
        words = weight.reshape(len(weight), -1, self.together)
        whole = len(words) // self.panel * self.panel
        first = words[:whole].reshape(-1, self.panel, *words.shape[1:]).swapaxes(1, 2)
        return np.concatenate([first.ravel(), words[whole:].swapaxes(0, 1).ravel()])

    def wide_panels(self, weight: Array) -> Array:
        """``panels`` of inputs in whole vectors."""
        return self.panels(_padded(weight, 1, self.lanes))

    def rows_of_panels(self, weight: Array) -> Array:
        """(out, in, k, k): ``panels`` for each row of the kernel, the inputs of each position in whole pairs."""
        weight = _padded(weight, 1, self.together)
        rows = [weight[:, :, y].swapaxes(1, 2).reshape(len(weight), -1) for y in range(weight.shape[2])]
        return np.concatenate([self.panels(row) for row in rows])

    def places_of_panels(self, weight: Array) -> Array:
        """(out, in, k, k): ``panels`` of the inputs of one position after the other, each in whole vectors."""
        weight = _padded(weight.transpose(0, 2, 3, 1), 3, self.lanes)
        return self.panels(weight.reshape(len(weight), -1))

    def _numbers(self, how: str, weight: Array) -> Array:
        if self._itemsize(how) == 4:
            return as_float(weight)
        return weight if weight.dtype == np.uint16 else as_bfloat16(weight)

    def _itemsize(self, how: str) -> int:
        return 4 if how in _FLOATS or self.together == 1 else 2

    def _order(self, how: str, shape: tuple[int, ...]) -> Array:
        """Which number of the weight is packed where, from 1 on; 0 for what fills up."""
        flat: Array = getattr(self, how)(np.arange(1, math.prod(shape) + 1, dtype=np.int32).reshape(shape)).ravel()
        return flat

    def _bytes(self, parts: Sequence[Part]) -> list[int]:
        return [self._size(*part) * self._itemsize(part[0]) for part in parts]

    def _size(self, how: str, shape: tuple[int, ...]) -> int:
        """Numbers of a packed weight."""
        outs, *ins = shape
        outs = _up(outs, self.lanes)
        if how == "rows_of_panels":
            return outs * ins[1] * _up(_up(ins[0], self.together) * ins[2], self.together)
        if how == "places_of_panels":
            return outs * ins[1] * ins[2] * _up(ins[0], self.lanes)
        unit = {"panels": self.together, "wide_panels": self.lanes}.get(how, 1)
        return outs * math.prod(ins[:-1]) * _up(ins[-1], unit) if ins else outs


def layout(half: bool) -> Layout:
    """That of the loaded kernels, for a network in bfloat16 or float32."""
    library = load()
    return Layout(
        library.conv2former_lanes(), library.conv2former_panel(), 2 if half and library.conv2former_pairs() else 1
    )


# ---- how each operation's weights are packed, in the order in which the kernels take them


def stem_parts(ins: int, mid: int, outs: int) -> list[Part]:
    first, second = (mid, ins, 3, 3), (mid, mid, 3, 3)
    middle: list[Part] = [("vectors", (mid,)), ("vectors", (mid,)), ("rows_of_panels", second)]
    return [("rows_of_panels", first), *middle, ("rows_of_panels", (outs, mid, 2, 2)), ("vectors", (outs,))]


def block_parts(dim: int, hidden: int, kernel_size: int) -> tuple[list[Part], list[Part]]:
    """Of the modulation branch, W1 and W2 one after the other, and of the MLP branch."""
    product: list[Part] = [("panels", (dim, dim)), ("vectors", (dim,))]
    taps: list[Part] = [("depthwise", (dim, 1, kernel_size, kernel_size)), ("vectors", (dim,))]
    mod = [*product, *product, *taps, ("wide_panels", (dim, dim)), ("vectors", (dim,))]
    mlp: list[Part] = [("panels", (hidden, dim)), ("vectors", (hidden,)), ("depthwise", (hidden, 1, 3, 3))]
    return mod, [*mlp, ("vectors", (hidden,)), ("wide_panels", (dim, hidden)), ("vectors", (dim,))]


def downsample_parts(ins: int, outs: int) -> list[Part]:
    return [("places_of_panels", (outs, ins, 2, 2)), ("vectors", (outs,))]


def head_parts(ins: int, hidden: int, classes: int) -> list[Part]:
    first: list[Part] = [("wide_panels", (hidden, ins)), ("vectors", (hidden,))]
    norm: list[Part] = [("vectors", (hidden,)), ("vectors", (hidden,))]
    return [*first, *norm, ("wide_panels", (classes, hidden)), ("vectors", (classes,))]


# ---- numbers


def as_float(x: Array) -> Array:
    """float32, of bfloat16 too."""
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x.astype(np.float32, copy=False)


def as_bfloat16(x: Array) -> Array:
    """The nearest bfloat16 of float32 numbers, of two the even one."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _padded(x: Array, axis: int, unit: int) -> Array:
    missing = -x.shape[axis] % unit
    if not missing:
        return x
    return np.pad(x, [(0, missing if d == axis else 0) for d in range(x.ndim)])


def _aligned(size: int) -> Array:
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size]


def _divided(whole: Array, sizes: Sequence[int]) -> list[Array]:
    ends = np.cumsum(sizes)
    return [whole[end - size : end] for end, size in zip(ends, sizes, strict=True)]
