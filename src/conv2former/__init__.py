"""Conv2Former for timm: importing this package registers the family, ``timm.create_model`` does the rest.

``train``, ``evaluate``, ``predict`` and ``load`` are what the command line calls; they are imported when they are used.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from conv2former import models
from conv2former.models.conv2former import Conv2Former
from conv2former.models.isotropic import Conv2FormerIsotropic
from conv2former.version import __version__

if TYPE_CHECKING:
    from conv2former.engine.evaluate import evaluate
    from conv2former.engine.predict import predict
    from conv2former.engine.train import train
    from conv2former.tasks import load

__all__ = ["Conv2Former", "Conv2FormerIsotropic", "__version__", "evaluate", "load", "models", "predict", "train"]

_LAZY = dict(train="engine.train", evaluate="engine.evaluate", predict="engine.predict", load="tasks")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"conv2former.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'conv2former' has no attribute {name!r}")


# where modules of release 0.1 were: for one release their names still lead to the new ones
_MOVED = {
    "model": "models.conv2former",
    "isotropic": "models.isotropic",
    "ablations": "models.ablations",
    "variants": "models.variants",
    "zoo": "models.zoo",
    "fusing": "models.fused",
    "train": "engine.train",
    "evaluation": "engine.evaluate",
    "prediction": "engine.predict",
    "cards": "engine.model_card",
    "recipes.schema": "recipes.load",
    "recipes.sections": "config",
    "heads.detector": "tasks.detection.model.detector",
    "heads.upernet": "tasks.segmentation.upernet",
    "export": "tools.export",
    "push": "tools.push",
    "reproduce": "tools.reproduce",
    "reproduce.jobs": "tools.reproduce.jobs",
}


class _MovedModule(ModuleType):
    """An earlier name of a module; called, it is the function of that name, as ``conv2former.train`` is now."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(import_module(f"conv2former.{_MOVED[self.__name__.removeprefix('conv2former.')]}"), name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.__getattr__(self.__name__.rpartition(".")[2])(*args, **options)


class _Moved(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        name = fullname.removeprefix("conv2former.")
        if fullname == name or (name not in _MOVED and name != "heads"):
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        if (new := _MOVED.get(spec.name.removeprefix("conv2former."))) is not None:
            warnings.warn(f"{spec.name} is conv2former.{new} now", FutureWarning, stacklevel=2)
        return _MovedModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        return


sys.meta_path.append(_Moved())
