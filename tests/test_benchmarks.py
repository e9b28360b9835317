"""The benchmarks run, and say what they are to say."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from digits import write_digits


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A benchmark as a module, which worker processes find too."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module


@pytest.fixture
def input_pipeline(script: Callable[[str], Any]) -> Any:
    return script("input_pipeline")


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


def test_dense_steps(script: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "rows.json"
    options = ["--model", "conv2former_atto", "--size", 64, "--channels", 8, "--rounds", 1, "--warmup", 0]
    script("dense_steps").main([str(option) for option in [*options, "--json", report]])
    result = json.loads(report.read_text())
    assert (result["size"], result["batch"], result["threads"]) == (64, 2, 1)
    pairs = [(row["pair"], row["rival"]) for row in result["rows"]]
    detectors = [
        (pair, rival) for pair in ("mask_rcnn", "cascade") for rival in ("torchvision", "torchvision, our sampling")
    ]
    assert pairs == [*detectors, ("upernet", "segmentation_models_pytorch")]
    for row in result["rows"]:
        assert row["ratio"] == pytest.approx(row["ours"][0] / row["theirs"][0])
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(pairs)


def test_dense_steps_without_images(script: Callable[[str], Any], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: cannot read"):
        script("dense_steps").main(["--data", str(tmp_path)])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_detect_memory(script: Callable[[str], Any], tmp_path: Path) -> None:
    report = tmp_path / "memory.json"
    script("detect_memory").main(["--width", "1600", "--height", "1200", "--json", str(report)])
    result = json.loads(report.read_text())
    assert result["objects"] == 100
    # masks are pasted some at a time: all at once would take 100 * 4 * 1600 * 1200 bytes
    assert result["large_bytes"] < result["small_bytes"] + result["bound_bytes"] < 100 * 4 * 1600 * 1200
