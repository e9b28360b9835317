"""Makes wheels with compiled kernels in them: classes that ``pyproject.toml`` names to setuptools."""

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PACKAGE = "conv2former_runtime"
MACHINES = {62: "x86_64", 183: "aarch64"}  # what compiled files are for, by a number in their head


def _module(name: str) -> Any:
    """A file of this folder as a module: the package itself may need what is not installed where wheels are made."""
    spec = importlib.util.spec_from_file_location(f"_{PACKAGE}_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildPy(build_py):
    """Copies the files and compiles the kernels: for all processors into a wheel, for this one in an editable install.

    Without a compiler, or where there are no builds for the platform, one line says so and the wheel is pure.
    """

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)  # it may hold files of an earlier version
        super().run()
        build = _module("build")
        try:
            program = build.compiler()
            if program is None:
                self.announce(f"{PACKAGE}: no C++ compiler, so no kernels are compiled", level=3)
            elif self.editable_mode:
                build.cached(program, build.native())
            else:
                self._fill(build, program)
        except (build.CompileError, OSError) as error:
            self.announce(f"{PACKAGE}: no kernels are compiled: {error}", level=3)

    def _fill(self, build: Any, program: str) -> None:
        folder = Path(self.build_lib) / PACKAGE / "libs"
        shutil.rmtree(folder, ignore_errors=True)
        digests = build.portable(program, folder)
        if not digests:
            self.announce(f"{PACKAGE}: there are no builds for this platform; the wheel is pure", level=3)
            return
        (folder / "index.json").write_text(json.dumps(digests, indent=1) + "\n")
        if self.distribution.get_name() == PACKAGE.replace("_", "-"):  # beside PyTorch there is its OpenMP
            build.openmp(program, folder)


class BdistWheel(bdist_wheel):
    """One wheel for all Pythons, named after the C library that its compiled files need; pure without such files."""

    def get_tag(self) -> tuple[str, str, str]:
        files = [file.read_bytes() for file in Path(self.bdist_dir or "").glob(f"{PACKAGE}/libs/*.so*")]
        self.root_is_pure = not files
        if not files:
            return "py3", "none", "any"
        needed = [int(number) for file in files for number in re.findall(rb"GLIBC_2\.(\d+)", file)]
        machine = MACHINES[int.from_bytes(files[0][18:20], "little")]
        return "py3", "none", f"manylinux_2_{max([17, *needed])}_{machine}"
