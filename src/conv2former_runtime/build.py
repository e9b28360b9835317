"""Compiles the C++ of ``csrc``: for this processor, or for all processors of a platform.

The standard library alone, and no other file of this package: ``make_wheel.py`` uses it where nothing is installed.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
# no -ffast-math: NaN has to stay NaN (in bfloat16 it may spread one column further)
FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
# libgcc_s stays outside: linked into the file it needs a C library of 2022. OpenMP is not linked: see `library.py`.
LINK = ["-shared", *(["-static-libstdc++", "-Wl,-s"] if sys.platform == "linux" else [])]
COMPILERS = ("g++", "clang++", "c++")
PATIENCE = 1200.0  # seconds for one file: a quarter of a minute when nothing else runs

# What `probe.cpp` returns for the processors that each of a wheel's builds runs on, the most able first, by machine
BUILDS = {"x86_64": {"x86-64-v4-bf16": 3, "x86-64-v4": 2, "x86-64-v3": 1}, "aarch64": {"armv8-a": 1}}
LEVELS = BUILDS.get(platform.machine(), {})  # of this machine

_log = logging.getLogger("conv2former")


class CompileError(Exception):
    """The compiler failed; the text says how."""


def compiler() -> str | None:
    """The C++ compiler, if there is one: CXX, else the first of ``COMPILERS``."""
    program = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    return program if program and shutil.which(program) else None


def target(program: str) -> str:
    """The machine that a compiler compiles for: ``x86_64``, ``aarch64``, ...

    Raises:
        CompileError: The compiler failed.
    """
    return _run([program, "-dumpmachine"]).decode().partition("-")[0]


def native() -> list[str]:
    """What tells the compiler to compile for this processor."""
    return ["-mcpu=native" if platform.machine() == "aarch64" else "-march=native"]


def level_flags(name: str) -> list[str]:
    """What tells the compiler to compile for the processors of one of ``LEVELS``."""
    return ["-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"] if name == "x86-64-v4-bf16" else [f"-march={name}"]


def key(program: str, flags: list[str]) -> str:
    """A name for the source as this compiler compiles it for this processor.

    Raises:
        CompileError: The compiler failed.
    """
    # what the compiler predefines names its version and what the processor can do
    macros = _run([program, *FLAGS, *flags, "-dM", "-E", "-x", "c++", os.devnull])
    texts = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    return hashlib.sha256(b"\0".join([*texts, macros, " ".join([*FLAGS, *flags, *LINK]).encode()])).hexdigest()[:24]


def compile_kernels(program: str, flags: list[str], target: Path) -> None:
    """Compiles beside the target and renames the result, so that no process loads half a library.

    Raises:
        CompileError: The compiler failed.
        OSError: The folder cannot be written.
    """
    files = [path for path in sorted(SOURCES.glob("*.cpp")) if path.name != "probe.cpp"]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:
        objects = [str(Path(scratch) / f"{path.stem}.o") for path in files]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            commands = ([program, *FLAGS, *flags, "-c", str(f), "-o", o] for f, o in zip(files, objects, strict=True))
            list(pool.map(_run, commands))
        made = Path(scratch) / "kernels.so"
        _run([program, *LINK, *objects, "-o", str(made)])
        made.chmod(0o755)  # whatever the umask: a file that others can write is not loaded (`_sound`)
        made.replace(target)


def portable(program: str, folder: Path) -> dict[str, str]:
    """Makes a wheel's builds, and the probe that tells them apart, for the machine that the compiler compiles for.

    Returns:
        The SHA-256 of each file, by its name; none where this platform has no builds.

    Raises:
        CompileError: The compiler failed.
        OSError: The folder cannot be written.
    """
    machine = target(program)
    levels = BUILDS.get(machine, {}) if platform.system() == "Linux" else {}
    if not levels:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    oldest = ["-march=x86-64"] if machine == "x86_64" else []
    _run([program, "-O2", *oldest, "-fPIC", *LINK, str(SOURCES / "probe.cpp"), "-o", str(folder / "probe.so")])
    for name in levels:
        compile_kernels(program, level_flags(name), folder / f"{name}.so")
    return {path.name: digest(path) for path in sorted(folder.glob("*.so"))}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _run(command: list[str]) -> bytes:
    try:
        return subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE).stdout
    except subprocess.TimeoutExpired:
        raise CompileError(f"{command[0]} took more than {PATIENCE:.0f} seconds") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        said = next((line for line in lines if "error" in line), "no message")
        raise CompileError(f"{command[0]} failed: {said}") from None


# ---- for this processor, in the user's cache


def cached(program: str, flags: list[str]) -> Path:
    """The library in the user's cache, compiled if it is not there.

    Raises:
        CompileError: The compiler failed.
        OSError: The folder cannot be written.
    """
    folder = cache()
    path = folder / f"kernels-{key(program, flags)}.so"
    if not _sound(path):
        with _locked(path.with_suffix(".lock")):  # of several processes one compiles
            if not _sound(path):
                _log.info(f"the C++ kernels are compiled for this processor, once, into {folder}")
                compile_kernels(program, flags, path)
                _digest_of(path).write_text(digest(path))
    return path


def _sound(path: Path) -> bool:
    """Whether a compiled file is this user's own and whole."""
    try:
        facts, wanted = path.lstat(), _digest_of(path).read_bytes()
    except OSError:
        return False
    own = stat.S_ISREG(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o022
    return own and digest(path).encode() == wanted


def _digest_of(path: Path) -> Path:
    return path.with_suffix(".sha256")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        try:
            import fcntl  # not on Windows

            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: both compile, and each renames a whole file into place
            pass
        yield


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
    _log.warning(
        "the user's cache cannot be written, or others can write to it: the C++ kernels are compiled anew for every "
        "process; set XDG_CACHE_HOME to a folder of your own, or install a wheel, which brings them"
    )
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# ---- OpenMP for a wheel that stands alone

_LICENCES = ("/usr/share/doc/libgomp1/copyright", "/usr/share/common-licenses/GPL-3")  # of Debian and its kin
_NOTICE = """\
libgomp.so.1 is the OpenMP library of GCC, unchanged. Copyright: the Free Software Foundation. Licence: GNU General
Public License, version 3 or later, with the GCC Runtime Library Exception, version 3.1, which allows programs of any
licence to use it. Source: https://gcc.gnu.org, folder libgomp. Exception: https://www.gnu.org/licenses/gcc-exception.html
"""


def openmp(program: str, folder: Path) -> None:
    """Copies OpenMP's library into a wheel: PyTorch's where it is installed, which needs an older C library.

    Raises:
        CompileError: There is none.
    """
    torch = importlib.util.find_spec("torch") if target(program) == platform.machine() else None
    places = [Path(place) / "lib" for place in (torch and torch.submodule_search_locations) or ()]
    own = Path(_run([program, "-print-file-name=libgomp.so.1"]).decode().strip())
    found = next((path for path in [*(place / "libgomp.so.1" for place in places), own] if path.is_file()), None)
    if found is None:
        raise CompileError(f"{program} has no libgomp.so.1")
    shutil.copyfile(found, folder / "libgomp.so.1")
    texts = [path.read_text(errors="replace") for path in map(Path, _LICENCES) if path.is_file()]
    (folder / "libgomp.LICENSE.txt").write_text("\n\n".join([_NOTICE, *texts]))
