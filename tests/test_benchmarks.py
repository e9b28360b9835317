"""The benchmarks run, and say what they are to say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from digits import write_digits


@pytest.fixture
def input_pipeline(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, which worker processes find too."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("input_pipeline")


def test_input_pipeline(input_pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, report = write_digits(tmp_path / "data", train=8), tmp_path / "rows.json"
    options = ["--data", data, "--workers", 2, "--images", 32, "--rounds", 1, "--json", report]
    input_pipeline.main([str(option) for option in options])
    result = json.loads(report.read_text())
    assert (result["images"], result["batch_size"]) == (32, 2)
    assert [row["pipeline"] for row in result["rows"]] == ["conv2former", "timm", "timm, floats"]
    for row in result["rows"]:
        assert row["images_per_second"] > 0
        assert min(row[f"{stage}_ms"] for stage in ("decode", "augment", "collate", "main")) > 0
        parts = sum(row[f"{stage}_ms"] for stage in ("decode", "augment", "collate", "rest"))
        assert parts == pytest.approx(2000 / row["images_per_second"])  # two workers' time, without remainder
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[-3:]] == ["conv2former", "timm", "timm,"]


def test_input_pipeline_without_images(input_pipeline: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: no images in"):
        input_pipeline.main(["--data", str(tmp_path)])
