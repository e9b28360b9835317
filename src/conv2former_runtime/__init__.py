"""Conv2Former's kernels for CPUs, and inference with them that needs numpy alone: no PyTorch.

``load("model.safetensors")`` opens a file that ``conv2former export RUN --format runtime`` has written.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conv2former_runtime.classifier import Classifier

__all__ = ["__version__", "load"]
__version__ = "0.1.0"  # of both packages


def load(path: str | os.PathLike[str], *, threads: int | None = None) -> Classifier:
    """Opens a network; see ``Classifier`` for what it does."""
    from conv2former_runtime.classifier import Classifier

    return Classifier(path, threads=threads)
