"""Conv2Former for timm: importing this package registers the family, ``timm.create_model`` does the rest."""

from conv2former.models import ablations, isotropic, variants
from conv2former.models import conv2former as model
from conv2former.models.conv2former import Conv2Former
from conv2former.models.isotropic import Conv2FormerIsotropic
from conv2former.version import __version__

__all__ = ["Conv2Former", "Conv2FormerIsotropic", "__version__", "ablations", "isotropic", "model", "variants"]
