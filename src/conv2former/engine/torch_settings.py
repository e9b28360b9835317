"""What a run tells PyTorch so that it is fast on a GPU, and what it says about that when it starts."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator

import torch

from conv2former.config import Recipe
from conv2former.engine.machine import fast_bfloat16
from conv2former.errors import UserError, one_line

CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile that record them
LONGEST_REASON = 300  # characters of a compiler's error, which may run to pages


def is_nvidia(device: torch.device) -> bool:
    """Whether it is an NVIDIA GPU: AMD's go by the name of CUDA, too."""
    return device.type == "cuda" and torch.version.hip is None


def fused_optimizer(recipe: Recipe, device: torch.device) -> bool:
    """Whether the optimizer may be a fused one.

    On a CPU it may not: runs there go on bit for bit from old checkpoints. Nor may it where float16's loss scale meets
    gradient clipping: a fused optimizer takes the scale back itself, after the clipping, and Lightning refuses that.
    """
    return is_nvidia(device) and not (recipe.engine.precision == "16" and recipe.optim.clip_grad is not None)


@contextlib.contextmanager
def applied(recipe: Recipe) -> Iterator[None]:
    """PyTorch's global settings while a run trains; at the end, whatever ends it, they are as they were before.

    Raises:
        UserError: The caller has set TF32 by PyTorch's newer settings, which exclude this one.
    """
    wanted = recipe.engine.float32_matmul_precision
    try:
        with warnings.catch_warnings():  # PyTorch 2.9 advises the newer settings, in every process
            warnings.simplefilter("ignore", UserWarning)
            before = torch.get_float32_matmul_precision()
    except RuntimeError:
        raise UserError(
            "this program has set a fp32_precision of torch.backends, which excludes engine.float32_matmul_precision: "
            "do not set it"
        ) from None
    if wanted != before:
        torch.set_float32_matmul_precision(wanted)
    try:
        with cudnn_benchmark(recipe.engine.cudnn_benchmark or torch.backends.cudnn.benchmark):
            yield
    finally:
        if wanted != before:
            torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def cudnn_benchmark(on: bool) -> Iterator[None]:
    """Lets cuDNN search for the fastest algorithms, or not, for a while."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def start_lines(asked: Recipe, recipe: Recipe, device: torch.device) -> list[str]:
    """What the user should know before the first step.

    Args:
        asked: The recipe as it was given.
        recipe: The same with 'auto' decided.
        device: Where it is trained.
    """
    engine = recipe.engine
    lines = []
    asked_auto = asked.engine.compile == "auto"
    if asked_auto and engine.compile:
        lines.append("engine.compile=auto is on: torch.compile compiles the network for the NVIDIA GPU")
    elif asked_auto:
        lines.append("engine.compile=auto is off: the run is not on an NVIDIA GPU, so nothing is compiled")
    exact = engine.precision == "32" and engine.float32_matmul_precision == "highest"
    if exact and is_nvidia(device) and torch.cuda.get_device_capability(device) >= (8, 0):  # Ampere brought TF32
        lines.append(
            "float32 matrix products run without TF32: a run with --set engine.float32_matmul_precision=high is faster "
            "and less exact"
        )
    return [*lines, *filter(None, [slow_precision(recipe, device)])]


def slow_precision(recipe: Recipe, device: torch.device) -> str | None:
    """A warning where PyTorch computes products in bfloat16 5 to 70 times slower than in float32.

    timm's Muon computes its steps in bfloat16, whatever the precision of the network.
    """
    if device.type != "cpu" or fast_bfloat16():
        return None
    remedies = {"engine.precision=bf16": "engine.precision=32"} if recipe.engine.precision == "bf16" else {}
    if "muon" in recipe.optim.name:
        remedies[f"optim.name={recipe.optim.name}"] = "optim.name=adamw"
    if not remedies:
        return None
    instead = " ".join(f"--set {setting}" for setting in remedies.values())
    slow = f"this processor has no fast bfloat16, which makes {' and '.join(remedies)} many times slower"
    return f"warning: {slow}: add {instead}"


def check_cuda_graphs(recipe: Recipe, *, accumulate: int, device: torch.device) -> None:
    """Refuses CUDA graphs with gradient accumulation: the second backward pass overwrites the gradients of the first.

    PyTorch stops with an error there, see https://github.com/pytorch/pytorch/issues/169545.

    Raises:
        UserError: The recipe asks for both.
    """
    engine = recipe.engine
    if engine.compile and engine.compile_mode in CUDA_GRAPHS and accumulate > 1 and device.type == "cuda":
        raise UserError(
            f"engine.compile_mode={engine.compile_mode} uses CUDA graphs, which cannot add up the gradients of the "
            f"{accumulate} forward passes of a step: set engine.compile_mode to default or max-autotune-no-cudagraphs"
        )


def compiler_failure(error: RuntimeError) -> str | None:
    """What the user can do about an error of ``torch.compile``; None for any other.

    The network has run without the compiler before, so what is met here is the compiler's: the machine has no C
    compiler or no Triton, say.
    """
    dynamo = sys.modules.get("torch._dynamo.exc")  # nobody who compiles nothing waits for its import
    if dynamo is None or not isinstance(error, dynamo.TorchDynamoException):
        return None
    reason = one_line(getattr(error, "inner_exception", error))[:LONGEST_REASON]
    return (
        f"torch.compile cannot compile the network here ({reason}): train it with --set engine.compile=false; a run "
        "that is there continues so with --resume --force"
    )
