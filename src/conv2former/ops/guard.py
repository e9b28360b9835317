"""Whether a fused operation may run in the place of modules: only where that makes no difference but the time.

People change networks: hooks, pruning, adapters, another activation, a ``forward`` put on one layer. All that works,
because a fused operation runs only if the modules are exactly what it computes.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

_log = logging.getLogger("conv2former.ops")

# What the modules call. Profilers (calflops, DeepSpeed) put their own functions here to count, and must see the calls.
_OWNERS: dict[Any, tuple[str, ...]] = {
    F: ("conv2d", "linear", "gelu", "layer_norm", "batch_norm"),
    nn.Conv2d: ("forward", "_conv_forward"),
    nn.Linear: ("forward",),
    nn.LayerNorm: ("forward",),
    nn.BatchNorm2d: ("forward",),
    nn.GELU: ("forward",),
}
_FUNCTIONS = [(owner, name, getattr(owner, name)) for owner, names in _OWNERS.items() for name in names]


@functools.cache
def warn_once(line: str) -> None:
    _log.warning(line)


def exchanged_functions() -> str:
    """Which of PyTorch's functions is no longer its own, '' where none is."""
    for owner, name, function in _FUNCTIONS:
        if getattr(owner, name) is not function:
            return f"{owner.__name__}.{name} was exchanged"
    return ""


def hooked(*modules: nn.Module) -> str:
    """What would be lost if the modules were not called: '' for nothing."""
    if _global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks:
        return "hooks for all modules are registered"
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"a {type(module).__name__} has a hook"
        if "forward" in module.__dict__ or "_conv_forward" in module.__dict__:
            return f"a {type(module).__name__} has a forward of its own"
    return ""


def not_gelu(act: nn.Module) -> str:
    """Why the module is not the exact GELU, '' where it is."""
    exact = type(act) is nn.GELU and act.approximate == "none"
    return "" if exact else f"the activation, a {type(act).__name__}, is not the exact GELU"


def not_depthwise(conv: Any) -> str:
    """Why the module is not a depthwise convolution with bias, "same" zero padding and default settings; '' if so."""
    if type(conv) is not nn.Conv2d:
        return f"the depthwise convolution is a {type(conv).__name__}"
    channels, _, side, _ = conv.weight.shape
    settings = conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
    if settings != ((1, 1), (side // 2, side // 2), (1, 1), channels, "zeros") or conv.bias is None:
        return "the depthwise convolution is not of stride 1, dilation 1 and padding k // 2, with a bias"
    return ""


def plain(x: Tensor) -> bool:
    """Whether a tensor has no code of its own for operations: no DTensor, no quantised or otherwise wrapped weight."""
    return type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
