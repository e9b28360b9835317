"""Counters of multiply-adds, compared with a sum over the layers, before and after ``fuse()``."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from networks import OURS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from conv2former.ops import use_backend

SNIPPET = Path(__file__).with_name("fused_counts.py")
SHAPE = (1, 3, 224, 224)


def sum_over_layers(model: nn.Module) -> int:
    """Multiply-adds of all convolutions and linear layers, from the shapes of their weights and outputs."""
    total = 0

    def add(layer: Any, inputs: Any, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * layer.weight[0].numel()

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(add) for layer in layers]
    with torch.no_grad():
        model(torch.randn(SHAPE))
    for handle in handles:
        handle.remove()
    return total


def _checked(name: str, count: Callable[[Any], float], *, above: float = 0.0, fused: bool = True) -> int:
    """The right count, after a counter has met it; ``above`` is the fraction that norms and activations may add."""
    model: Any = timm.create_model(name).eval()
    expected = sum_over_layers(model)
    assert name != OURS or round(expected / 1e9, 3) == 0.533, f"layers that need {expected / 1e9:.3f} G are called"
    _compare(count(model), expected, "before fuse()", above)
    if name == OURS and fused:
        _compare(count(model.fuse()), expected, "after fuse()", above)
    return expected


def _compare(found: float, expected: int, when: str, above: float = 0.0) -> None:
    right = 0 <= found - expected <= above * expected
    assert right, f"it counts {found / 1e9:.3f} G {when}, where {expected / 1e9:.3f} G are right"


def with_torch(name: str) -> None:
    def count(model: Any) -> float:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.randn(SHAPE))
        return counter.get_total_flops() / 2

    _checked(name, count)


def with_calflops(name: str) -> None:
    from calflops import calculate_flops

    _checked(name, lambda model: calculate_flops(model, SHAPE, print_results=False, output_as_string=False)[1])


def with_deepspeed(name: str) -> None:
    from deepspeed.profiling.flops_profiler import get_model_profile

    _checked(name, lambda model: get_model_profile(model, SHAPE, print_profile=False, as_string=False)[1])


def with_fvcore(name: str) -> None:
    from fvcore.nn import FlopCountAnalysis

    def count(model: nn.Module) -> float:
        found = FlopCountAnalysis(model, torch.randn(SHAPE)).unsupported_ops_warnings(False).by_operator()
        return found["conv"] + found["linear"]  # without norms

    _checked(name, count)


def with_thop(name: str) -> None:
    import thop

    count = lambda model: thop.profile(model, (torch.randn(SHAPE),), verbose=False)[0]  # noqa: E731
    expected = _checked(name, count, above=0.02, fused=False)
    if name == OURS:
        _compare(runpy.run_path(str(SNIPPET))["thop_macs"], expected, "after fuse()", above=0.02)


def with_ptflops(name: str) -> None:
    from ptflops import get_model_complexity_info

    settings: dict[str, Any] = dict(as_strings=False, print_per_layer_stat=False)
    count = lambda model: get_model_complexity_info(model, SHAPE[1:], **settings)[0]  # noqa: E731
    expected = _checked(name, count, above=0.04, fused=False)
    if name == OURS:
        _compare(runpy.run_path(str(SNIPPET))["ptflops_macs"], expected, "after fuse()", above=0.04)


def with_ptflops_aten(name: str) -> None:
    from ptflops import get_model_complexity_info

    settings: dict[str, Any] = dict(as_strings=False, print_per_layer_stat=False, backend="aten")
    with use_backend("reference"):
        _checked(name, lambda model: get_model_complexity_info(model, SHAPE[1:], **settings)[0], above=0.04)
