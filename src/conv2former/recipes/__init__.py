"""Experiments as data: one YAML file each, checked by ``schema``."""

from conv2former.recipes.schema import load_recipe, recipe_names
from conv2former.recipes.sections import Recipe

__all__ = ["Recipe", "load_recipe", "recipe_names"]
