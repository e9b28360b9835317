"""Conv2Former for timm: importing this package registers the family, ``timm.create_model`` does the rest."""

from conv2former import ablations, isotropic, model, variants
from conv2former.isotropic import Conv2FormerIsotropic
from conv2former.model import Conv2Former
from conv2former.version import __version__

__all__ = ["Conv2Former", "Conv2FormerIsotropic", "__version__", "ablations", "isotropic", "model", "variants"]
