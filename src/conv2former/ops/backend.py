"""Which code computes the operations: chosen at the first call, never at import."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import register_flop_formula

from conv2former.errors import UserError
from conv2former.ops import guard

BACKENDS = ("auto", "reference", "cpp", "triton")
VARIABLE = "CONV2FORMER_OPS"  # the environment's choice

# Each is a module with the operations' forward and backward functions, `unusable(device)`, which says why it cannot run
# there (None where it can), and `takes(...)`, which says whether it has code for these shapes and this dtype.
MODULES = {"cpp": "conv2former.ops.cpu", "triton": "conv2former.ops.triton"}
BY_DEVICE = {"cpu": "cpp", "cuda": "triton"}

_chosen: list[str | None] = [None]  # by `set_backend`; None leaves it to the environment
_log = logging.getLogger("conv2former.ops")


def set_backend(name: str) -> None:
    """Chooses what computes the operations from now on, in this process.

    Args:
        name: 'auto' (the fused code of the device where it can run, else plain PyTorch), 'reference' (plain PyTorch),
            'cpp' (CPUs) or 'triton' (NVIDIA GPUs). What ``torch.compile`` has compiled is compiled anew.

    Raises:
        UserError: Unknown name.
    """
    _chosen[0] = _known(name, "backend")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """``set_backend`` for the length of a ``with`` block."""
    before = _chosen[0]
    set_backend(name)
    try:
        yield
    finally:
        _chosen[0] = before


def _known(name: str, what: str) -> str:
    if name not in BACKENDS:
        raise UserError(f"{what} {name!r} is unknown: use one of {', '.join(BACKENDS)}")
    return name


def current() -> str:
    """The choice as it stands: ``set_backend``'s, else the environment variable CONV2FORMER_OPS, else 'auto'."""
    return _chosen[0] or _known(os.environ.get(VARIABLE) or "auto", VARIABLE)


def backend_for(device: torch.device | str) -> str:
    """What computes the operations on a device: 'reference', 'cpp' or 'triton'.

    Raises:
        UserError: A backend was chosen that cannot run there; the message says why.
    """
    return _resolve(current(), torch.device(device).type)


@functools.cache
def _resolve(choice: str, device: str) -> str:
    name = BY_DEVICE.get(device, "reference") if choice == "auto" else choice
    if name == "reference":
        return name
    if choice != "auto":
        _usable(name, device)
    elif why := module(name).unusable(torch.device(device)):
        _log.warning(f"operations on {device} are computed by plain PyTorch, because {why}")
        return "reference"
    _log.info(f"operations on {device}: {name}")
    return name


def module(name: str) -> ModuleType:
    return importlib.import_module(MODULES[name])


def kernels(device: torch.device) -> Any:
    """The module that computes a fused operation on a device.

    Whether to fuse was decided when the operation was called. Its backward pass, or an exported program, may run after
    the choice has changed.

    Raises:
        UserError: It cannot run there.
    """
    name = "triton" if current() == "triton" else BY_DEVICE.get(device.type, "triton")
    return _usable(name, device.type)


@functools.cache
def _usable(name: str, device: str) -> ModuleType:
    if why := module(name).unusable(torch.device(device)):
        raise UserError(f"the {name} kernels cannot run on {device}: {why}; use auto or reference")
    return module(name)


@torch.compiler.assume_constant_result  # under torch.compile it runs as it stands, once for each set of arguments
def _obstacle(
    chosen: str | None, device: str, dtype: torch.dtype, channels: int, kernel_size: int, operation: str
) -> str | None:
    """Why no fused kernel computes an operation: '' if one does, None where none was asked for."""
    name = _wanted(current(), device)  # `chosen` is there for the compiler, which sees by it that the choice changed
    if name == "reference":
        return None
    why = _lacks(name, operation, dtype, channels, kernel_size)
    return guard.exchanged_functions() if why == "" else why


def _wanted(choice: str, device: str) -> str:
    """The backend for a call. An exported program gets a fused operation only if its backend was chosen by name."""
    if choice == "auto" and (torch.compiler.is_exporting() or torch.jit.is_tracing()):
        return "reference"  # another runtime would not know our operators
    return _resolve(choice, device)


@functools.cache
def _lacks(name: str, operation: str, dtype: torch.dtype, channels: int, kernel_size: int) -> str | None:
    """Why a backend has no code for these arguments: '' if it has, None where it never has the operation."""
    if not hasattr(module(name), operation):
        return None
    fits = module(name).takes(dtype, channels=channels, kernel_size=kernel_size)
    return "" if fits else f"{name} has no kernel for {dtype} at these sizes"


@torch.compiler.assume_constant_result
def _say(operation: str, why: str, device: str) -> None:
    if _wanted(current(), device) != "reference":
        guard.warn_once(f"{operation} on {device} is computed by plain PyTorch, because {why}")


def passes_by(operation: str, act: nn.Module, conv: Any, u: Tensor, *others: Tensor) -> bool:
    """Whether a fused kernel may compute ``conv(act(u))``, and what is around it, without calling the modules.

    Args:
        operation: Its name, for the warning that says once why it is not fused where it could be.
        act: Must be the exact GELU.
        conv: Must be a depthwise convolution with bias, "same" zero padding and default settings.
        u: (B, H, W, C), the input of ``act``.
        *others: Further maps, (B, H, W, C) too.
    """
    if isinstance(u, Proxy):  # a symbolic trace records modules, which can be scripted and changed
        return False
    why = guard.not_gelu(act) or guard.not_depthwise(conv) or guard.hooked(act, conv)
    if not why:
        weight = conv.weight
        if weight.dtype != u.dtype and not torch.is_autocast_enabled(u.device.type):
            return False  # PyTorch raises an error for that
        return fused(operation, u, weight, conv.bias, *others)
    _say(operation, why, u.device.type)
    return False


def fused(operation: str, u: Tensor, weight: Tensor, bias: Tensor, *others: Tensor) -> bool:
    """Whether a fused kernel is to compute an operation: there is one, and the tensors are what it is written for.

    u and the others are (B, H, W, C) of one dtype, weight is (C, 1, k, k) with k odd, bias (C,), all on one device.
    Broadcasting, other shapes, mixed dtypes, wrapped tensors, ``torch.func`` and forward-mode differentiation are left
    to PyTorch.

    Under ``torch.export`` and ``torch.jit.trace`` only a backend that was chosen by name is used: its custom operators
    stay in the program.
    """
    shape, dtype, sides = u.shape, u.dtype, weight.shape  # each is asked for once: this runs for every block
    size = sides[-1]
    for other in others:
        if other.shape != shape or other.dtype != dtype:
            return False
    if len(shape) != 4 or sides != (shape[3], 1, size, size) or bias.shape != sides[:1] or weight.dtype != bias.dtype:
        return False
    if size % 2 == 0 or (operation == "mlp_middle" and size != 3):
        return False
    return _unhindered(operation, (u, weight, bias, *others), channels=sides[0], kernel_size=size)


def in_evaluation(operation: str, x: Tensor, weights: Sequence[Tensor], *, channels: int, kernel_size: int) -> bool:
    """Whether a fused kernel without a backward pass is to compute an operation.

    There is one on the device, all tensors are of one dtype, and no gradient is wanted. Autocast is left to PyTorch.
    """
    if torch.is_grad_enabled() and (x.requires_grad or any(weight.requires_grad for weight in weights)):
        return False
    if any(w.dtype != x.dtype for w in weights):
        return False
    if not _unhindered(operation, (x, *weights), channels=channels, kernel_size=kernel_size):
        return False
    if torch.is_autocast_enabled(x.device.type):  # asked last: it knows no device "meta"
        _say(operation, "autocast is on: give the network the dtype itself, model.to(torch.bfloat16)", x.device.type)
        return False
    return True


def _unhindered(operation: str, tensors: Sequence[Tensor], *, channels: int, kernel_size: int) -> bool:
    """Whether there is a kernel and it takes the tensors; if not, a warning says why."""
    x = tensors[0]
    why = _obstacle(_chosen[0], x.device.type, x.dtype, channels, kernel_size, operation)
    if why == "":
        why = _unlike(tensors)
    if why:
        _say(operation, why, x.device.type)
    return why == ""


def _unlike(tensors: Sequence[Tensor]) -> str:
    """Why a kernel does not take the tensors, '' where it does."""
    device = tensors[0].device
    for tensor in tensors:
        if tensor.device != device:
            return "its tensors are on several devices"
        kind = type(tensor)
        known = kind is Tensor or kind is nn.Parameter or kind is FakeTensor or kind is FunctionalTensor
        if not known and not guard.plain(tensor):
            return f"one of its tensors is a {kind.__name__}"
    return "torch.func or forward-mode differentiation is at work" if _transformed() else ""


@torch.compiler.assume_constant_result
def _transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


_library = torch.library.Library("conv2former", "DEF")


def operator(
    schema: str,
    shapes: Callable[..., Any],
    *,
    compute: Callable[..., Any] | None = None,
    gradients: Callable[..., Any] | None = None,
    save: Callable[..., Any] | None = None,
    flops: Callable[..., int],
) -> Callable[..., Any]:
    """Makes ``torch.ops.conv2former.NAME``.

    Not by ``torch.library.custom_op``, whose checks of every call take longer than a small network's kernels.

    Args:
        schema: Name, arguments and results.
        shapes: Makes empty results of the right shapes.
        compute: Computes it on any device; unless given, the function of its name in the device's ``kernels``.
        gradients: The backward pass; without one, for evaluation, inputs that require gradients are refused.
        save: Keeps what the backward pass needs.
        flops: Twice the multiply-adds, from the arguments' shapes, for ``torch.utils.flop_counter``.
    """
    name = schema.partition("(")[0]

    def kernel(x: Tensor, *rest: Any) -> Any:
        return getattr(kernels(x.device), name)(x, *rest)

    compute = compute or kernel
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for device in ("CPU", "CUDA"):
        _library.impl(name, compute if gradients else _without_gradients(compute), device)
    torch.library.register_fake(f"conv2former::{name}", shapes)
    if gradients:
        torch.library.register_autograd(f"conv2former::{name}", gradients, setup_context=save)
    made = getattr(torch.ops.conv2former, name)
    register_flop_formula(made)(flops)
    return made.default


def second_derivative(
    ctx: Any, reference: Callable[..., Tensor], g: Tensor, inputs: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """An operation's gradients in a form that can be differentiated again: those of the plain form.

    ``reference`` is the plain form, which takes ``inputs``; g is the output's gradient, and ctx the operation's.
    """
    here = [tensor.view_as(tensor) for tensor in inputs]  # gradients stop here and do not go on from u to what made it
    leaves = [tensor for tensor, wanted in zip(here, ctx.needs_input_grad, strict=False) if wanted]
    out = reference(*(tensor.to(g.dtype) for tensor in here))  # under autocast the weights are float32
    found = iter(torch.autograd.grad(out, leaves, g, create_graph=True))
    return tuple(next(found) if wanted else None for wanted in ctx.needs_input_grad[: len(inputs)])


def _without_gradients(compute: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*arguments: Any) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise NotImplementedError(
                "this fused operation has no derivative: compute under conv2former.ops.use_backend('reference')"
            )
        return compute(*arguments)

    return checked


def in_layout_of(weight: Tensor, gradient: Tensor) -> Tensor:
    """A weight's gradient with the weight's strides, which DDP needs and the ``shapes`` functions promise."""
    strides = gradient.stride()
    if strides == weight.stride():
        return gradient
    if all(size == 1 or a == b for size, a, b in zip(weight.shape, strides, weight.stride(), strict=True)):
        return gradient.as_strided(weight.shape, weight.stride())  # dimensions of size 1 need no copy
    return torch.empty_like(weight).copy_(gradient)


def pixels(x: Tensor) -> tuple[Tensor, int]:
    """The tensor (B, H, W, C), copied where necessary, and the distance S of its pixels in elements.

    Pixel (b, y, x) begins at element ((b * H + y) * W + x) * S. Contiguous tensors and either half of a contiguous
    (B, H, W, 2C) are not copied.
    """
    size, stride = x.shape, x.stride()
    wanted = step = next((stride[d] for d in (2, 1, 0) if size[d] > 1), size[3])
    dense = size[3] == 1 or stride[3] == 1
    for d in (2, 1, 0):
        dense &= size[d] == 1 or stride[d] == wanted
        wanted *= size[d]
    return (x, step) if dense and step >= size[3] else (x.contiguous(), size[3])


def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's depthwise convolution with "same" zero padding on NHWC: (B, H, W, C), weight (C, 1, k, k), (C,)."""
    padding = int(weight.shape[-1]) // 2  # torch.jit.trace gives sizes as tensors, which torch 2.9 does not take here
    y = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=weight.shape[0])
    return y.permute(0, 2, 3, 1)
