"""``benchmark --frontier``: which models, in which order, and what is written of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image

from conv2former.errors import UserError
from conv2former.tools.benchmark import frontier
from conv2former.tools.benchmark.measure import Row
from conv2former.tools.benchmark.options import BenchmarkOptions
from test_benchmark import measured

SPEEDS = {"conv2former_t": 40.0, "convnext_tiny": 30.0, "cpubone_b2_bfrobust": 90.0}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Row]:
    """What is measured of three models, without measuring."""
    known = {name: published for name, published in frontier.MODELS.items() if name in SPEEDS}
    monkeypatch.setattr(frontier, "MODELS", known)

    def pretend(options: BenchmarkOptions) -> list[Row]:
        (model,), (dtype,), (batch_size,), (size,) = (
            options.models,
            options.dtypes,
            options.batch_sizes,
            options.image_sizes,
        )
        common: dict[str, Any] = dict(model=model, dtype=dtype, batch_size=batch_size, image_size=size)
        rates = {"eager": SPEEDS[model], "openvino": 35.0, "openvino-int8": 70.0}
        return [measured(mode=mode, images_per_second=rates[mode], **common) for mode in options.modes]

    monkeypatch.setattr(frontier, "benchmark", pretend)
    options = BenchmarkOptions(models=(), dtypes=("float32", "bfloat16"), batch_sizes=(8, 1), out=tmp_path)
    return frontier.frontier(options)


def test_the_reference_is_first_and_last_of_each_column(rows: list[Row]) -> None:
    column = [row.model for row in rows if (row.dtype, row.batch_size, row.mode) == ("bfloat16", 1, "eager")]
    assert column == ["conv2former_t", "convnext_tiny", "cpubone_b2_bfrobust", "conv2former_t"]
    assert not [row for row in rows if row.mode == "openvino-int8" and row.dtype == "bfloat16"]


def test_the_fastest_runtime_of_each_counts(rows: list[Row], tmp_path: Path) -> None:
    head, *lines = frontier.table(rows)
    assert head[4:] == [
        *(f"{dtype}, batch size {size}" for dtype in ("float32", "bfloat16") for size in (8, 1)),
        "int8, batch size 8",
        "int8, batch size 1",
    ]
    cells = {line[0]: line for line in lines}
    assert cells["conv2former_t"][1:5] == ["83.2", "1k", "224", "40.0 (kernels)"]
    assert cells["convnext_tiny"][4] == "35.0 (openvino)" and cells["convnext_tiny"][-1] == "70.0 (openvino)"
    assert "float32, batch size 8: 40.0 and 40.0" in frontier.steadiness(rows)
    files = frontier.write(rows, tmp_path)
    assert [path.name for path in files] == ["frontier.jsonl", "frontier.md", "frontier.png"]
    assert [json.loads(line)["model"] for line in files[0].read_text().splitlines()] == [row.model for row in rows]
    with Image.open(files[2]) as image:
        assert image.width > 1000 and np.asarray(image.convert("L")).std() > 5


def test_failed_rows_leave_a_gap(rows: list[Row]) -> None:
    broken = [
        replace(row, seconds=None, images_per_second=None) if row.model == "convnext_tiny" else row for row in rows
    ]
    assert {line[0]: line for line in frontier.table(broken)}["convnext_tiny"][4:] == [""] * 6


def test_its_models_are_timms() -> None:
    assert len(frontier.MODELS) >= 20
    if timm.is_model("cpubone_b3"):  # the newest family
        assert [name for name in frontier.MODELS if not timm.is_model(name)] == []


def test_what_this_timm_lacks_and_what_cannot_be_measured_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(options: BenchmarkOptions) -> list[Row]:
        if options.models == ("convnext_tiny",):
            raise UserError("nothing could be measured: broken")
        return [measured(model=options.models[0])]

    monkeypatch.setattr(frontier, "MODELS", {name: frontier.MODELS[name] for name in SPEEDS})
    monkeypatch.setattr(frontier, "benchmark", refuse)
    monkeypatch.setattr(timm, "is_model", lambda name: not name.startswith("cpubone"))
    found = frontier.frontier(BenchmarkOptions(models=(), modes=("eager",)))
    assert [row.model for row in found] == ["conv2former_t", "conv2former_t"]
    said = capsys.readouterr().err
    assert "left out: convnext_tiny" in said and "older than cpubone_b2_bfrobust" in said
    monkeypatch.setattr(frontier, "benchmark", lambda options: refuse(BenchmarkOptions(models=("convnext_tiny",))))
    with pytest.raises(UserError, match="nothing could be measured"):
        frontier.frontier(BenchmarkOptions(models=(), modes=("eager",)))


def test_it_does_not_train() -> None:
    with pytest.raises(UserError, match="leave --train, --size"):
        frontier.frontier(BenchmarkOptions(models=(), training=True))
