"""Networks without memory, on the meta device, and networks from what somebody else has written: within bounds."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode

from conv2former.errors import UserError, some

MOST_WEIGHTS = 5_000_000_000  # of a network; timm's largest has 4.4 billion
MOST_MODULES = 20_000  # of a network; timm's have up to two thousand
MOST_NUMBER = 1 << 20  # that an argument may hold: sides of images, widths, depths
MOST_NUMBERS = 10_000  # that all arguments may hold
# what timm's own functions take before a network's constructor gets the rest: where weights and settings come from,
# what else than a network is built, and where to. Those behind the first line are taken out of their **kwargs.
FACTORY = {*inspect.signature(timm.create_model).parameters, *inspect.signature(build_model_with_cfg).parameters} | {
    *("pruned", "features_only", "out_indices", "feature_cls", "pretrained_custom_load", "default_cfg", "device"),
    "dtype",
}
SIZED = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.linspace}


def check_args(args: Mapping[str, Any], what: str, *, reserved: Collection[str] = ()) -> None:
    """Refuses arguments that are none of a network's constructor, or that hold too much; ``what`` stands in messages.

    Raises:
        UserError: An argument of timm's factory or one of ``reserved``, numbers that no network has.
    """
    if refused := sorted((FACTORY | {*reserved}) & args.keys()):
        raise UserError(f"{what} cannot hold {some(refused)}: give what the network itself takes, nothing to load")
    waiting, count = [*args.values()], 0
    while waiting:
        part, count = waiting.pop(), count + 1
        if isinstance(part, (dict, list, tuple)):
            waiting += part.values() if isinstance(part, dict) else part
        elif isinstance(part, (int, float)) and not abs(part) <= MOST_NUMBER:
            raise UserError(f"{what} holds a number that no network has: give at most {MOST_NUMBER:,}")
        if count > MOST_NUMBERS:
            raise UserError(f"{what} holds more than {MOST_NUMBERS:,} values: give a network's own arguments alone")


@contextmanager
def bounded(what: str, most: float = MOST_WEIGHTS) -> Iterator[None]:
    """Ends the building of a network that gets too large, before it takes the memory, or for ever.

    Raises:
        UserError: More than ``most`` weights or ``MOST_MODULES`` layers; ``what`` describes the network.
    """
    modules = 0

    def count(*registered: Any) -> None:
        nonlocal modules
        modules += 1
        if modules > MOST_MODULES:
            raise UserError(f"{what} describes a network of more than {MOST_MODULES:,} layers: give a smaller one")

    handle = register_module_module_registration_hook(count)
    try:
        with _Bounded(what, most):
            yield
    finally:
        handle.remove()


class _Bounded(TorchFunctionMode):
    """Counts the elements of new tensors before they are made."""

    def __init__(self, what: str, most: float) -> None:
        super().__init__()
        self.what, self.most, self.count = what, most, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SIZED:
            self.count += func(*args, **kwargs | dict(device="meta")).numel()
            if self.count > self.most:
                raise UserError(f"{self.what} describes a network of more than {self.most:,.0f} weights")
        return func(*args, **kwargs)


class SkipFilling(TorchFunctionMode):
    """Leaves out the arithmetic of initialisation, most of the time that a model on the meta device takes to build."""

    FILLING = frozenset({"add_", "clamp_", "erfinv_", "fill_", "mul_", "normal_", "uniform_", "zero_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        filling = args and getattr(func, "__name__", "") in self.FILLING
        return args[0] if filling else func(*args, **(kwargs or {}))


def build_on_meta(name: str, **kwargs: Any) -> Any:
    """``timm.create_model`` on the meta device; some models that look at values meanwhile fall back to the CPU.

    Raises:
        UserError: A network that is too large (``bounded``).
    """
    try:
        with bounded(name), torch.device("meta"), SkipFilling():
            return timm.create_model(name, **kwargs)
    except (NotImplementedError, RuntimeError):
        with bounded(name):
            return timm.create_model(name, **kwargs).to("meta")
