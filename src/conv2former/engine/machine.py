"""What runs and measurements record of where they were made: versions, commit, machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from conv2former.version import __version__

PACKAGES = ("conv2former", "torch", "torchvision", "timm", "lightning", "numpy", "pillow")


def machine_facts() -> dict[str, Any]:
    """Command, versions, commit and machine, for whoever repeats it."""
    return dict(
        command=[_program(Path(sys.argv[0])), *sys.argv[1:]],
        versions={name: version_of(name) for name in PACKAGES} | dict(python=platform.python_version()),
        commit=_commit(),
        machine=dict(
            system=f"{platform.system()} {platform.machine()}",
            cpus=os.cpu_count(),
            gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        ),
    )


def version_of(package: str) -> str:
    """The version of an installed package. Ours may also be a folder on PYTHONPATH."""
    try:
        return version(package)
    except PackageNotFoundError:
        return __version__ if package == "conv2former" else "not installed"


def _program(path: Path) -> str:
    return path.parent.name if path.name == "__main__.py" else path.name  # python -m PACKAGE


def _commit() -> str | None:
    # only where the package runs from a checkout of its own; an installed wheel has its version
    git: Any = dict(cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True)
    try:
        # a file that git does not track lies in somebody else's repository, in a virtual environment there say
        subprocess.run(["git", "ls-files", "--error-unmatch", Path(__file__).name], **git)
        return subprocess.run(["git", "describe", "--always", "--dirty"], **git).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def fast_bfloat16() -> bool:
    """Whether PyTorch's products in bfloat16 use this processor's vector instructions."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is None or bool(supported())
