"""Models without memory: built on the meta device to look at names, shapes and counts."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch.overrides import TorchFunctionMode


class SkipFilling(TorchFunctionMode):
    """Leaves out the arithmetic of initialisation, most of the time that a model on the meta device takes to build."""

    FILLING = frozenset({"add_", "clamp_", "erfinv_", "fill_", "mul_", "normal_", "uniform_", "zero_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        filling = args and getattr(func, "__name__", "") in self.FILLING
        return args[0] if filling else func(*args, **(kwargs or {}))


def build_on_meta(name: str, **kwargs: Any) -> Any:
    """``timm.create_model`` on the meta device; some models that look at values meanwhile fall back to the CPU."""
    try:
        with torch.device("meta"), SkipFilling():
            return timm.create_model(name, **kwargs)
    except (NotImplementedError, RuntimeError):
        return timm.create_model(name, **kwargs).to("meta")
