"""The runtime's wheel for ARM processors: compiled across, and run by an emulator against this processor's answers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from timm.models import save_for_hf

from conv2former.tools.export import ExportOptions, export

ROOT = Path(__file__).parents[1]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
TOOLS = (COMPILER, EMULATOR, "apt-get", "dpkg-deb")  # of Debian and its kin: packages g++-aarch64-linux-gnu, qemu-user
LIBRARIES = ("libc6", "libexpat1", "zlib1g", "libffi8", "libgcc-s1", "libstdc++6")  # of Python and numpy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {', '.join(TOOLS)}"),
]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """The command that runs Debian's Python for ARM, with numpy, Pillow and our wheel."""
    root = tmp_path_factory.mktemp("arm")
    wheel = _wheel(root)
    name = _system(root)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", root / "site", "--only-binary=:all:"]
    for platform in ("manylinux_2_28_aarch64", "manylinux_2_34_aarch64"):
        pip += ["--platform", platform]
    _run(*pip, "--python-version", name.removeprefix("python"), "numpy", "pillow", wheel)
    return [
        "env",
        f"PYTHONPATH={root / 'site'}",
        EMULATOR,
        "-L",
        root / "system",
        root / "system" / "usr" / "bin" / name,
    ]


def _wheel(root: Path) -> Path:
    source = ROOT / "src" / "conv2former_runtime"
    shutil.copytree(source, root / "source", ignore=shutil.ignore_patterns("build", "libs", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", root, root / "source"]
    _run(*pip, CXX=COMPILER)
    (wheel,) = root.glob("*.whl")
    assert re.fullmatch(r".*-py3-none-manylinux_2_\d+_aarch64\.whl", wheel.name) and wheel.stat().st_size < 1e6
    return wheel


def _system(root: Path) -> str:
    """Unpacks Python and its libraries for ARM; returns its name. Nothing of this machine's own packages is changed."""
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (root / folder).mkdir(parents=True)
    settings = {"APT::Architecture": "arm64", "APT::Architectures": "arm64", "APT::Sandbox::User": "root"}
    settings |= {"Dir::State": root / "state", "Dir::State::status": os.devnull, "Dir::Cache": root / "cache"}
    options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    _run("apt-get", "-qq", *options, "update")
    depends = _run("apt-cache", *options, "depends", "python3")
    (name,) = set(re.findall(r"Depends: (python3\.\d+)$", depends, re.MULTILINE))
    packages = [f"{name}-minimal", f"lib{name}-minimal", f"lib{name}-stdlib", *LIBRARIES]
    _run("apt-get", "-qq", *options, "download", *packages, cwd=root)
    for package in root.glob("*.deb"):
        _run("dpkg-deb", "-x", package, root / "system")
    return name


def _run(*command: Any, cwd: Path | None = None, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("kind", ["runtime", "runtime-bf16"])
def test_the_same_answers(python: list[str | Path], kind: str, tmp_path: Path) -> None:
    torch_free = "import sys, conv2former_runtime.library as l; l.load(); print(l.built(), 'torch' in sys.modules)"
    assert _run(*python, "-c", torch_free) == "the build for armv8-a that came with the package False\n"
    save_for_hf(timm.create_model("conv2former_atto", num_classes=5), tmp_path / "model")
    generator = np.random.default_rng(0)
    for number, size in enumerate([(64, 64), (97, 50), (33, 210)]):
        Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / f"{number}.png")
    files = sorted(tmp_path.glob("*.png"))
    export(str(tmp_path / "model"), tmp_path / "out", ExportOptions(formats=(kind,), images=files))
    (made,) = (tmp_path / "out").glob("*.safetensors")
    words = ["-m", "conv2former_runtime", made, *files]
    here, there = (
        [json.loads(line) for line in _run(*command, *words).splitlines()] for command in ([sys.executable], python)
    )
    for one, other in zip(here, there, strict=True):
        own, wanted = ({top["index"]: top["probability"] for top in row["top"]} for row in (other, one))
        assert own == pytest.approx(wanted, abs=1e-6 if kind == "runtime" else 2e-3)
