"""The networks, for timm: importing this package registers them."""

from conv2former.models import ablations, isotropic, variants

__all__ = ["ablations", "isotropic", "variants"]
