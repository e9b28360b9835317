"""Weights in the order that the operations of evaluation need, packed once and kept while the weights live."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from conv2former.ops.cpu.build import load

# By the first weight of a call: facts of all its weights when they were packed, and the results. Fused modules cannot
# hold the results: the order depends on the processor, and a fused network may be moved, cast, loaded and compiled.
_kept: Any = WeakTensorKeyDictionary()


def packed(weights: Sequence[Tensor], pack: Callable[..., list[Tensor]], *sizes: int) -> list[Tensor]:
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


def vectors(x: Tensor) -> Tensor:
    """(C,) as float32, zeros up to whole vectors."""
    return F.pad(x.to(torch.float32, copy=True), (0, -len(x) % lanes())).contiguous()


def depthwise(weight: Tensor) -> Tensor:
    """(C, 1, k, k) -> (C / lanes, k * k, lanes), float32, zeros up to whole vectors."""
    flat = F.pad(weight.float().flatten(1), (0, 0, 0, -len(weight) % lanes()))
    return flat.view(-1, lanes(), flat.shape[1]).transpose(1, 2).contiguous()


def panels(weight: Tensor) -> Tensor:
    """(out, in) in panels of outputs, flat: in each, one input (or a pair of bfloat16 inputs) after the other.

    Outputs are filled up with zeros to whole vectors, inputs to whole pairs.
    """
    panel, together = load().conv2former_panel(), _together(weight.dtype)
    dtype = torch.bfloat16 if together == 2 else torch.float32
    weight = F.pad(weight.to(dtype), (0, -weight.shape[1] % together, 0, -weight.shape[0] % lanes()))
    words = weight.unflatten(1, (-1, together))
    whole = len(words) // panel * panel
    parts = words[:whole].unflatten(0, (-1, panel)).transpose(1, 2), words[whole:].transpose(0, 1)
    return torch.cat([part.flatten() for part in parts])


def whole_vectors(weight: Tensor) -> Tensor:
    """(..., in), zeros up to whole vectors of inputs."""
    return F.pad(weight, (0, -weight.shape[-1] % lanes()))


def rows_of_panels(weight: Tensor) -> Tensor:
    """(out, in, k, k): ``panels`` for each row of the kernel, the inputs of each position in whole pairs."""
    weight = F.pad(weight, (0, 0, 0, 0, 0, -weight.shape[1] % _together(weight.dtype)))
    return torch.cat([panels(row.transpose(1, 2).flatten(1)) for row in weight.unbind(2)])


def lanes() -> int:
    """Floats in a vector."""
    return load().conv2former_lanes()


def _together(dtype: torch.dtype) -> int:
    """Inputs that one instruction multiplies with their weights and adds up."""
    return 2 if dtype == torch.bfloat16 and load().conv2former_pairs() else 1
