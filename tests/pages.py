"""The demo's page behind its gate, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="needs gradio: pip install 'conv2former[demo]'")

from conv2former.tools.demo.gate import Gate
from conv2former.tools.demo.models import Models
from conv2former.tools.demo.options import Options
from conv2former.tools.demo.page import MOST_IMAGES, Answers, build_page, mounted

LIMITS = dict(file_bytes=100_000, pixels=1_000_000)
UPLOAD_BYTES = MOST_IMAGES * LIMITS["file_bytes"]
NUMBER_OF_INPUTS = 10
META = dict(meta=dict(_type="gradio.FileData"))


def inputs(
    files: Any = None, camera: Any = None, first: Any = "finished", second: Any = "", **options: Any
) -> list[Any]:
    """What the page's components hold, in their order."""
    asked = Options(**options)
    sliders = [asked.top_k, asked.threshold, asked.opacity]
    return [files, camera, first, second, *sliders, sorted(asked.layers), asked.cam, asked.maps]


def answers_of(run: Path, folder: Path) -> Answers:
    """What the page says of uploads in a folder, which is made."""
    folder.mkdir()
    return Answers(Models([str(run)], device="cpu"), folder=folder, **LIMITS)


def gated(run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """The page of one run."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))
    page = mounted(build_page(answers_of(run, folder)))
    return Gate(page, folder=folder, upload_bytes=UPLOAD_BYTES, local=True)
