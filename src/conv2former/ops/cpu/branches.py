"""The branches of a block in evaluation: ``branches.cpp``, and the order in which it wants the weights.

Weights are put in that order once and kept beside them for as long as they live.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from conv2former.ops.cpu.build import load
from conv2former.ops.cpu.calls import call, pointer, strided
from conv2former.ops.cpu.depthwise import modulation

_kept: Any = WeakTensorKeyDictionary()  # weight: (what it was made of, the packed weight)


def modulation_branch(
    x: Tensor, w: Tensor, w_bias: Tensor, taps: Tensor, taps_bias: Tensor, proj: Tensor, proj_bias: Tensor, eps: float
) -> Tensor:
    """``modulation_branch``: two products around the modulation."""
    if not x.numel():
        return x.clone()
    u, v = _linear(x, w, w_bias, eps=eps).chunk(2, dim=-1)
    z, _ = modulation(u, v, _packed(taps, _floats), _packed(taps_bias, _floats), False)
    return _linear(z, proj, proj_bias, residual=x.contiguous())


def mlp_branch(
    x: Tensor, fc1: Tensor, fc1_bias: Tensor, taps: Tensor, taps_bias: Tensor, fc2: Tensor, fc2_bias: Tensor, eps: float
) -> Tensor:
    """``mlp_branch``: one call."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if out.numel():
        parts = [
            _packed(fc1, _panels),
            _packed(fc1_bias, _vectors),
            _packed(taps, _taps),
            _packed(taps_bias, _vectors),
            _packed(fc2, _panels_of_whole_vectors),
            _packed(fc2_bias, _vectors),
        ]
        arguments = (ctypes.c_float(eps), *map(pointer, parts), pointer(out))
        call("mlp_branch", x.dtype, (*x.shape, fc1.shape[0]), pointer(x), *arguments)
    return out


def _linear(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = -1.0, residual: Tensor | None = None) -> Tensor:
    """The linear layer of x, normalised before where eps is not negative, with the residual added."""
    outs, ins = weight.shape
    out = x.new_empty(*x.shape[:-1], outs)
    x, *at_x = strided(x)
    parts = _packed(weight, _panels), _packed(bias, _vectors), residual, out
    call("linear", x.dtype, (x.numel() // ins, ins, outs), *at_x, ctypes.c_float(eps), *map(pointer, parts))
    return out


def _packed(weight: Tensor, pack: Callable[[Tensor], Tensor]) -> Tensor:
    """A weight in another order, made anew if the weight is another than when it was last made."""
    if weight.is_inference():  # such tensors do not tell whether they have changed
        return pack(weight.detach())
    facts = (pack, weight.data_ptr(), weight._version, weight.dtype, weight.shape, weight.stride())
    known = _kept.get(weight)
    if known is None or known[0] != facts:
        with torch.inference_mode(False), torch.no_grad():
            known = _kept[weight] = facts, pack(weight.detach())
    return known[1]


def _floats(x: Tensor) -> Tensor:
    return x.to(torch.float32, copy=True).contiguous()


def _vectors(x: Tensor) -> Tensor:
    """(C,) as float32, zeros up to whole vectors."""
    return F.pad(x.to(torch.float32, copy=True), (0, -len(x) % _lanes())).contiguous()


def _taps(weight: Tensor) -> Tensor:
    """(C, 1, 3, 3) -> (C / lanes, 9, lanes), float32, zeros up to whole vectors."""
    flat = F.pad(weight.float().flatten(1), (0, 0, 0, -len(weight) % _lanes()))
    return flat.view(-1, _lanes(), flat.shape[1]).transpose(1, 2).contiguous()


def _panels(weight: Tensor) -> Tensor:
    """(out, in) in panels of outputs, flat: in each, one input (or a pair of bfloat16 inputs) after the other.

    Outputs are filled up with zeros to whole vectors, inputs to whole pairs.
    """
    library: Any = load()
    lanes, panel = _lanes(), library.conv2former_panel()
    together = 2 if weight.dtype == torch.bfloat16 and library.conv2former_pairs() else 1
    dtype = torch.bfloat16 if together == 2 else torch.float32
    weight = F.pad(weight.to(dtype), (0, -weight.shape[1] % together, 0, -weight.shape[0] % lanes))
    words = weight.unflatten(1, (-1, together))
    whole = len(words) // panel * panel
    parts = words[:whole].unflatten(0, (-1, panel)).transpose(1, 2), words[whole:].transpose(0, 1)
    return torch.cat([part.flatten() for part in parts])


def _panels_of_whole_vectors(weight: Tensor) -> Tensor:
    """``_panels`` for inputs that come in whole vectors."""
    return _panels(F.pad(weight, (0, -weight.shape[1] % _lanes())))


def _lanes() -> int:
    library: Any = load()
    return library.conv2former_lanes()
