"""The tasks as the engine sees them."""

from __future__ import annotations

from importlib import import_module

from conv2former.config import Recipe
from conv2former.workflows.base import AnyEvaluation, Workflow

__all__ = ["AnyEvaluation", "Workflow", "workflow"]


def workflow(recipe: Recipe) -> Workflow:
    """The recipe's; the others, and the libraries that they need, are not imported."""
    module = import_module(f"conv2former.workflows.{recipe.task}")
    return getattr(module, f"{recipe.task.capitalize()}Workflow")(recipe)
