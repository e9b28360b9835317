"""The tutorials as notebooks: what a cell is, and that the cells run as a reader would run them."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
NAMED = re.compile(r'"((?:runs|data|exported)/[^"]*)"')  # what Python reads
MAKER = runpy.run_path(str(DOCS / "notebooks.py"))


@pytest.mark.parametrize("page", MAKER["TUTORIALS"], ids=lambda path: path.stem)
def test_a_page_becomes_cells(page: Path) -> None:
    notebook = json.loads(MAKER["notebook"](page))
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    code = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    text = "".join(cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    assert code and text.startswith("# ")
    assert not [source for source in code if "needs:" in source]
    assert all(source.startswith("%%bash") or "import" in source for source in code)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a tutorial takes ten minutes on a machine of today
@pytest.mark.parametrize("page", MAKER["TUTORIALS"], ids=lambda path: path.stem)
def test_the_cells_run(page: Path, tmp_path: Path) -> None:
    """In order, in one folder, after the quick start. Python that needs what was not run is left out."""
    path = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"

    def run(*command: str) -> None:
        answer = subprocess.run(command, cwd=tmp_path, env=os.environ | dict(PATH=path), capture_output=True, text=True)
        assert answer.returncode == 0, f"{command}\n{answer.stdout}\n{answer.stderr}"

    shutil.copytree(DOCS.parent / "src/conv2former_runtime", tmp_path / "src/conv2former_runtime")  # to make a wheel of
    short = ["--set", "schedule.epochs=1", "--set", "schedule.warmup_epochs=0"]
    run("conv2former", "train", "--recipe", "quickstart", "--out", "runs/quickstart", *short)
    left_out = 0
    for cell in json.loads(MAKER["notebook"](page))["cells"]:
        source = cell["source"]
        if cell["cell_type"] == "code" and source.startswith("%%bash"):
            run("bash", "-ec", source.partition("\n")[2])
        elif cell["cell_type"] == "code" and all((tmp_path / name).exists() for name in NAMED.findall(source)):
            run(sys.executable, "-c", source)
        else:
            left_out += cell["cell_type"] == "code"
    assert left_out == (page.stem in ("tutorial_classify", "tutorial_detect")), "their runs need weights from a network"
