"""What a run tells PyTorch so that it is fast on a GPU, and what it says about that when it starts."""

from __future__ import annotations

import torch

from conv2former.errors import UserError
from conv2former.recipes.sections import Recipe

CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile that record them


def start_lines(asked: Recipe, recipe: Recipe) -> list[str]:
    """What the user should know before the first step.

    Args:
        asked: The recipe as it was given.
        recipe: The same with 'auto' decided.
    """
    lines = []
    if asked != recipe and recipe.engine.compile:
        lines.append("engine.compile=auto is on: torch.compile compiles the network for the NVIDIA GPU")
    elif asked != recipe:
        lines.append("engine.compile=auto is off: there is no NVIDIA GPU, the network runs without torch.compile")
    return lines


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
