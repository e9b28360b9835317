"""benchmarks/gpu: what can be known of the three calls without a GPU; and ``conv2former doctor``."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from conv2former.errors import UserError
from conv2former.ops import triton as kernels
from conv2former.tools.doctor import maps, report, warm

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file of the folder as a module."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module(name)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_rows_are_written_one_by_one_until_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = script("common", monkeypatch)
    monkeypatch.setattr(common.time, "time", lambda: 1000.0)
    options = argparse.Namespace(out=tmp_path / "new", until=1050, rehearse=True)
    archive = common.Archive("kernels", options)
    archive.add(what="first")
    assert [row["what"] for row in rows(tmp_path / "new")] == ["first"]
    assert archive.has_time(5, "a short one") and not archive.has_time(60, "a long one")
    first, second = rows(tmp_path / "new")
    assert first["call"] == "kernels" and first["rehearsal"] is True
    assert second["left_out"] == "a long one" and second["because"] == "50 s are left, 60 s are needed"


def test_there_are_three_calls(tmp_path: Path) -> None:
    answer = subprocess.run(["bash", FOLDER / "call.sh", "4", tmp_path], capture_output=True, text=True)
    assert answer.returncode == 2 and answer.stderr == "there is no call 4: use 1, 2 or 3\n"


def test_taps_that_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by a convolution of ones."""
    pytest.importorskip("triton")
    needed = script("kernels", monkeypatch).needed_taps
    for kernel, side in ((11, 7), (11, 56), (3, 5), (21, 4)):
        ones = torch.ones(1, 1, side, side)
        counted = torch.nn.functional.conv2d(ones, torch.ones(1, 1, kernel, kernel), padding=kernel // 2).mean()
        assert needed(kernel, side) == pytest.approx(counted.item())


@pytest.mark.parametrize(
    ("damage", "named"), [(0.0, "mod.dwconv.weight"), (-1.0, "mlp.dwconv.weight"), (math.nan, "head.fc.bias")]
)
def test_wrong_gradients_of_small_weights_are_seen(damage: float, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one norm over all parameters they may not be; NaN is not lost in sorting."""
    pytest.importorskip("triton")
    call = script("correctness", monkeypatch)
    torch.manual_seed(0)
    model = timm.create_model("conv2former_test", num_classes=10, ls_init_value=1.0)
    images, labels = torch.randn(2, 3, 64, 64), torch.arange(2)
    names = [name for name, _ in model.named_parameters()]
    exact, plain = (
        call.gradients(net, x, labels, "reference", dtype)
        for net, x, dtype in (
            (copy.deepcopy(model).double(), images.double(), torch.float64), (model, images, torch.bfloat16)
        )
    )  # fmt: skip
    ours = call.gradients(model, images, labels, "auto", torch.bfloat16)
    assert call.compare(ours, plain, exact, names)[0][0] <= 1
    wrong = [g * damage if named in name else g for g, name in zip(plain, names, strict=True)]
    ratio, name = call.compare(wrong, plain, exact, names)[0]
    assert ratio > 1 and named in name


def test_doctor() -> None:
    lines = report()
    assert f"torch {torch.__version__.partition('+')[0]}" in lines[0]
    assert any(line.startswith("operations on cpu: ") for line in lines)
    found = maps("conv2former_t", size=224, dtype=torch.bfloat16)
    assert [(m.side, m.channels, m.hidden, m.kernel_size) for m in found] == [
        (56, 72, 288, 11), (28, 144, 576, 11), (14, 288, 1152, 11), (7, 576, 2304, 11)
    ]  # fmt: skip


def test_doctor_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONV2FORMER_OPS", "reference")
    assert "operations on cpu: reference, because CONV2FORMER_OPS says so" in report()
    monkeypatch.setenv("CONV2FORMER_OPS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert any(line.startswith("operations on cpu: none, because the triton kernels cannot run") for line in report())


def test_doctor_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="--warm conv2former_x: there is no such network of ours"):
        warm("conv2former_x", size=224, dtype="bfloat16")
    with pytest.raises(UserError, match="--dtype int8 is unknown: use bfloat16, float16 or float32"):
        warm("conv2former_t", size=224, dtype="int8")
    if why := kernels.unusable(torch.device("cuda")):
        with pytest.raises(UserError, match=f"--warm needs an NVIDIA GPU that the kernels run on: {why}"):
            warm("conv2former_t", size=224, dtype="bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 2])
def test_rehearsal(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call without a GPU: kernels chosen and compiled by Triton's own path. The third one takes minutes."""
    pytest.importorskip("triton")
    environment = os.environ | {"PYTHON": sys.executable, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    command = ["bash", FOLDER / "call.sh", str(call), tmp_path / "out", "--rehearse"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    found = rows(tmp_path / "out")
    if call == 1:
        assert found[-1]["what"] == "verdict" and found[-1]["right"]
        launched = next(row["launched"] for row in found if row.get("what") == "rehearsed launches")
        assert len(launched) == 5  # kernels
    else:
        uses = script("kernels", monkeypatch).WORK
        assert {row["kernel"] for row in found if "configuration" in row} == set(uses)
        assert not [row for row in found if "error" in row]
