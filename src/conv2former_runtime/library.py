"""The compiled kernels: those that came with the package, else compiled for this processor when first used.

The kernels need OpenMP's functions and link no library for them, so that a process has one pool of threads: PyTorch's
where PyTorch is loaded, else the one that ``_openmp`` finds.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import Any

from conv2former_runtime import build

PACKAGED = Path(__file__).parent / "libs"  # made when a wheel is built: `make_wheel.py`
INDEX = "index.json"  # of PACKAGED: the digest of each file
LIMIT = "CONV2FORMER_CPU"  # the environment's choice of a build, for a processor that is to be treated as an older one

_log = logging.getLogger("conv2former")


class Unusable(Exception):
    """There are no kernels here; the text says why, and what to do."""


@functools.cache
def load() -> Any:  # ctypes.CDLL or str
    """The library, or why there is none."""
    if not hasattr(os, "getuid"):
        return "the C++ kernels are made for Linux and macOS"
    try:
        path = _packaged() or _compiled()
        _openmp()
        library = ctypes.CDLL(str(path))
    except (OSError, Unusable, build.CompileError) as error:
        return str(error)
    library.conv2former_groups.restype = ctypes.c_long
    return library


def built() -> str:
    """Which file is loaded: the name of a build that came with the package, or a path."""
    path = Path(load()._name)
    return f"the build for {path.stem} that came with the package" if path.parent == PACKAGED else str(path)


# ---- those that came with the package


def _packaged() -> Path | None:
    """The best build that came with the package for this processor; None without one."""
    index = PACKAGED / INDEX
    if not index.is_file():
        return None
    try:
        digests = json.loads(index.read_text())
        level = ctypes.CDLL(str(_whole("probe.so", digests))).conv2former_level()
        level = min(level, build.LEVELS.get(_limit(), level))
        fitting = [name for name, needed in build.LEVELS.items() if needed <= level]
        return _whole(f"{fitting[0]}.so", digests) if fitting else None
    except (OSError, ValueError) as error:  # a damaged file would end the process when it is loaded
        _log.warning(f"{error}: install the package again; until then the kernels are compiled here")
        return None


def _limit() -> str:
    name = os.environ.get(LIMIT) or ""
    if name and name not in build.LEVELS:
        raise Unusable(f"{LIMIT}={name} is unknown: use one of {', '.join(build.LEVELS)}")
    return name


def _whole(name: str, digests: dict[str, str]) -> Path:
    path = PACKAGED / name
    if build.digest(path) != digests.get(name):
        raise ValueError(f"{path} is damaged")
    return path


# ---- compiled here


def _compiled() -> Path:
    """The library for this processor in the user's cache, compiled if it is not there."""
    program = build.compiler()
    if program is None:
        tried = os.environ.get("CXX") or ", ".join(build.COMPILERS)
        raise Unusable(f"there is no C++ compiler ({tried}): install one, or a wheel, which brings compiled kernels")
    return build.cached(program, build.level_flags(_limit()) if _limit() else build.native())


# ---- OpenMP


def _openmp() -> None:
    """Sees to it that OpenMP's functions are there: PyTorch's, those that came with the package, or the system's."""
    if hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return
    torch = importlib.util.find_spec("torch")  # found, not imported
    folders = [PACKAGED, *(Path(place) / "lib" for place in (torch and torch.submodule_search_locations) or ())]
    files = [str(path) for folder in folders for path in sorted(folder.glob("libgomp*.so*"))]
    for file in [*files, "libgomp.so.1"]:
        try:
            ctypes.CDLL(file, mode=ctypes.RTLD_GLOBAL)
            return
        except OSError:
            continue
    raise Unusable("OpenMP is missing: install libgomp1 (Debian, Ubuntu) or libgomp (Fedora)")
