"""Compiles the C++ files of this folder and loads them."""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("*.cpp"))
# no -ffast-math: NaN has to stay NaN (in bfloat16 it may spread one column further)
FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
COMPILERS = ("g++", "clang++", "c++")
PATIENCE = 120.0  # seconds for the compiler


@functools.cache
def load() -> Any:  # ctypes.CDLL or str
    """The library, compiled if this source has not been compiled for this processor before; or why there is none."""
    if not hasattr(os, "getuid"):
        return "the C++ kernels are made for Linux and macOS"
    program = compiler()
    if program is None:
        return f"there is no C++ compiler ({os.environ.get('CXX') or ', '.join(COMPILERS)})"
    flags = [*FLAGS, "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"]
    try:
        # what the compiler predefines names its version and what the processor can do
        macros = _run([program, *flags, "-dM", "-E", "-x", "c++", os.devnull])
        texts = [path.read_bytes() for path in sorted(FOLDER.iterdir()) if path.suffix in (".cpp", ".h")]
        name = hashlib.sha256(b"\0".join([*texts, macros, " ".join(flags).encode()])).hexdigest()[:24]
        path = cache() / f"kernels-{name}.so"
        if not path.exists():
            with FileLock(path.with_suffix(".lock"), timeout=3 * PATIENCE):  # of several processes one compiles
                if not path.exists():
                    _compile([program, *flags], path)
        library = ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        return f"{program} failed: {next((line for line in lines if 'error' in line), 'no message')}"
    except subprocess.TimeoutExpired:
        return f"{program} took more than {PATIENCE:.0f} seconds"
    except (OSError, NotImplementedError) as error:  # the latter where files cannot be locked
        return f"the compiled kernels cannot be loaded: {error}"
    library.conv2former_groups.restype = ctypes.c_long
    return library


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    program = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    return program if program and shutil.which(program) else None


def _run(command: list[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE).stdout


def _compile(command: list[str], path: Path) -> None:
    """Builds in a folder of its own and renames the result, so that no process loads half a library.

    OpenMP is not linked: PyTorch has loaded its symbols.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as scratch:
        made = Path(scratch) / "kernels.so"
        objects = [str(made.with_name(f"{source.stem}.o")) for source in SOURCES]
        with ThreadPoolExecutor() as pool:
            commands = ([*command, "-c", str(s), "-o", o] for s, o in zip(SOURCES, objects, strict=True))
            list(pool.map(_run, commands))
        _run([command[0], "-shared", *objects, "-o", str(made)])
        made.replace(path)


def cache() -> Path:
    """The user's cache; a folder of this process alone where that cannot be written, or others can write to it."""
    try:
        # without a home (RuntimeError) there is no cache
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "conv2former"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
        if facts.st_uid != os.getuid() or facts.st_mode & 0o022:  # somebody else may have put the code there
            return _own_folder()
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):
        return _own_folder()


@functools.cache
def _own_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="conv2former-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
