"""What a user installs is complete, and the quick start keeps its promise."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm

import nets
from conv2former.engine.train import train
from conv2former.recipes import load_recipe, recipe_names

ROOT = Path(__file__).parents[1]


def test_a_wheel_holds_everything(tmp_path: Path) -> None:
    """Built from the tree; its files alone must import, list the recipes and answer --help."""
    tree = tmp_path / "tree"  # a copy: a build leaves its folders where it runs
    left_out = shutil.ignore_patterns("*.egg-info", "__pycache__", "build", "libs")
    shutil.copytree(ROOT / "src", tree / "src", ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={tmp_path}"]
    no_compiler = os.environ | {"CXX": "no-such-compiler"}  # with one see test_runtime.py
    subprocess.run([*build, str(tree)], check=True, capture_output=True, env=no_compiler)
    (wheel,) = tmp_path.glob("conv2former-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        metadata = next(name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        assert "conv2former = conv2former_cli:main" in archive.read(metadata).decode()
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
        others = [name for name in archive.namelist() if not name.endswith(".py") and ".dist-info/" not in name]
        assert sorted(others) == nets.stored("wheel")
    sources = {path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*") if path.suffix in (".py", ".yaml")}
    assert all((tmp_path / "site" / path).is_file() for path in sources)
    code = "import sys, conv2former_cli; sys.argv = ['conv2former', 'recipes']; conv2former_cli.main()"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "site", env={"PYTHONPATH": "."}, capture_output=True, text=True
    )
    assert all(name in answer.stdout for name in recipe_names()), answer.stderr


@pytest.mark.slow  # `make quickstart` does the same
def test_the_quickstart_reaches_97_percent(tmp_path: Path) -> None:
    """The recipe as it is shipped, on the real digits; about a minute."""
    result = train(load_recipe("quickstart"), data=None, out=tmp_path / "run")
    assert result is not None and result.details["images"] >= 350
    assert result.details["top1"] >= 97
    assert len(list((tmp_path / "run" / "samples").iterdir())) >= 8
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'best'}", pretrained=True)
    assert model.num_classes == 10
