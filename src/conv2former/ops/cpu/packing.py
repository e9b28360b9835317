"""Packed weights, kept while the weights live."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from conv2former_runtime.packing import Array, Part, layout

# By the first weight of a call: facts of all its weights when they were packed, and the results. Fused modules cannot
# hold the results: the order depends on the processor, and a fused network may be moved, cast, loaded and compiled.
_kept: Any = WeakTensorKeyDictionary()


def packed(weights: Sequence[Tensor], pack: Callable[..., list[Array]], *sizes: int) -> list[Array]:
    """``pack(weights, *sizes)``, kept from an earlier call unless a weight has changed since."""
    if any(weight.is_inference() for weight in weights):  # such tensors do not tell whether they have changed
        return pack([weight.detach() for weight in weights], *sizes)
    facts = [sizes, *((w.data_ptr(), w._version, w.dtype, w.shape, w.stride()) for w in weights)]
    known = _kept.get(weights[0])
    if known is None or known[0] != facts or not all(map(_as_before, known[1], weights)):
        with torch.inference_mode(False), torch.no_grad():
            made = pack([weight.detach() for weight in weights], *sizes)
        refs = [(weakref.ref(weight), StorageWeakRef(weight.untyped_storage())) for weight in weights]
        known = _kept[weights[0]] = facts, refs, made
    return known[2]


def _as_before(known: tuple[Any, StorageWeakRef], weight: Tensor) -> bool:
    """Whether a weight is the same object, and its memory has been its own all the time."""
    return known[0]() is weight and not known[1].expired()


def pack(parts: Sequence[Part], weights: Sequence[Tensor]) -> list[Array]:
    """Weights, of float32 or bfloat16, in the order of the kernels, one after the other in memory."""
    order = layout(weights[0].dtype == torch.bfloat16)
    return order.views(parts, order.pack(parts, [as_array(weight) for weight in weights]))


def as_array(x: Tensor) -> Array:
    """The memory of a tensor; the bits of bfloat16 as uint16."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).detach().numpy()
