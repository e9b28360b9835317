"""Experiments as data: one YAML file each, checked against ``config`` and the tasks' own sections."""

from conv2former.config import Recipe
from conv2former.recipes.load import load_recipe, recipe_names

__all__ = ["Recipe", "load_recipe", "recipe_names"]
