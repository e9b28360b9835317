"""``conv2former benchmark``: what it computes, in which order, what it writes. No speed is held to anything."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from command import run_command
from conv2former import ops
from conv2former.errors import UserError
from conv2former.tools.benchmark import peak, plots, report
from conv2former.tools.benchmark.measure import Row, benchmark, statistics, take_turns, with_ratios
from conv2former.tools.benchmark.modes import MODES, Configuration, prepare
from conv2former.tools.benchmark.options import BenchmarkOptions, model_args, plan
from conv2former.tools.benchmark.worker import Holder, Operation, Worker

BASE = Configuration(
    model="conv2former_test",
    model_args=dict(dims=(32, 48), depths=(1, 1)),
    mode="eager",
    training=False,
    dtype="float32",
    batch_size=2,
    image_size=64,
    threads=1,
    device="cpu",
    ops="auto",
    fuse=True,
)
ROW = Row(
    model="conv2former_t",
    mode="eager",
    task="inference",
    dtype="float32",
    batch_size=4,
    image_size=224,
    fused=True,
    ops="cpp",
    threads=1,
    device="a processor",
    params=10**6,
    macs=10**9,
    rounds=3,
    versions={"torch": "2"},
)


@pytest.fixture(autouse=True)
def backend() -> Iterator[None]:
    """Preparing a configuration chooses a backend for the process, which is a worker's, not pytest's."""
    with ops.use_backend("auto"):
        yield


class FakeWorker:
    """Takes as many seconds as its mode has letters; fails at the step that ``failing`` says."""

    log: ClassVar[list[str]] = []
    failing: ClassVar[dict[str, int]] = {}

    def __init__(self, configuration: Configuration) -> None:
        self.configuration, self.error, self.steps = configuration, None, 0
        self.log.append(f"start {configuration.mode}")

    def step(self) -> float | None:
        mode = self.configuration.mode
        if self.steps == self.failing.get(mode):
            self.error = "out of luck"
        if self.error:
            return None
        self.steps += 1
        self.log.append(mode)
        return float(len(mode))

    def memory(self) -> int:
        return 3_000_000

    def versions(self) -> dict[str, str]:
        return {"torch": "2"}

    def peak(self, dtype: str) -> float:
        self.log.append(f"peak {dtype}")
        return 1e12

    def profile(self) -> list[Operation]:
        return [Operation("aten::addmm", 7, 0.5, 0.25)]

    def close(self) -> None:
        self.log.append(f"close {self.configuration.mode}")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeWorker]:
    monkeypatch.setattr(FakeWorker, "log", [])
    monkeypatch.setattr(FakeWorker, "failing", {})
    return FakeWorker


# what is planned


def test_configurations_are_in_groups_of_what_is_compared() -> None:
    options = BenchmarkOptions(
        models=["conv2former_test", "test_vit"],
        dtypes=["float32", "bfloat16"],
        batch_sizes=[1, 2],
        image_sizes=[64, 96],
        device="cpu",
        threads=1,
    )
    found = plan(options).configurations
    assert len(found) == 2 * 2 * 2 * 2 * 2
    assert [(c.model, c.mode) for c in found[:4]] == [
        (model, mode) for model in ("conv2former_test", "test_vit") for mode in ("eager", "compile")
    ]
    groups = [c.group for c in found]
    assert groups == [group for group in dict.fromkeys(groups) for _ in range(4)]
    assert all(c.fuse and c.threads == 1 and not c.training for c in found)
    assert not any(c.fuse for c in plan(replace(options, training=True)).configurations)


def test_the_first_models_own_size_is_the_default() -> None:
    planned = plan(BenchmarkOptions(models=["test_vit"], device="cpu"))
    assert {c.image_size for c in planned.configurations} == {160}
    assert planned.counts["test_vit", 160][0] == sum(p.numel() for p in timm.create_model("test_vit").parameters())


@pytest.mark.parametrize(
    ("model", "size", "expected"),
    [
        ("conv2former_test", 96, {}),
        ("test_convnext", 96, {}),
        ("test_vit", 160, {}),
        ("test_vit", 96, {"img_size": 96}),
        ("swin_tiny_patch4_window7_224", 1024, {"img_size": 1024}),
        ("deit_small_patch16_224", 384, {"img_size": 384}),
    ],
)
def test_networks_with_positions_are_told_the_size(model: str, size: int, expected: dict[str, int]) -> None:
    assert model_args(model, size) == expected


BAD = [
    (["conv2former_tt"], "did you mean 'conv2former_t"),
    (["test_vit", "--mode", "tensorrt"], "--mode 'tensorrt' is unknown: use one of eager, compile"),
    (["test_vit", "--dtype", "float16"], "--dtype 'float16' is unknown"),
    (["test_vit", "--ops", "fortran"], "'fortran' is unknown"),
    (["test_vit", "--device", "cuda:99"], "use --device cpu"),
    (["test_vit", "--device", "meta"], "use --device cpu or cuda"),
    (["test_vit", "--ops", "triton", "--device", "cpu"], "the triton kernels cannot run on cpu"),
    (["test_vit", "--mode", "openvino", "--train"], "openvino does not train"),
    (["test_vit", "--mode", "onnxruntime", "--train"], "onnxruntime does not train"),
    (["test_vit", "--train", "--fuse"], "--fuse is for inference"),
    (["conv2former_test", "--size", "16"], "does not take images of 16 pixels, give another --size"),
    (["conv2former_test", "test_vit", "--size", "50"], "test_vit does not take images of 50 pixels"),
    (["test_vit", "--out", "{file}"], "cannot make the folder --out"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_a_mistake_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("hello")
    given = [argument.format(file=tmp_path / "file") for argument in arguments]
    assert run(monkeypatch, *given) == 1
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("error: ") and output.err.count("\n") == 1
    assert message in output.err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"openvino: pip install openvino"):
        plan(BenchmarkOptions(models=["test_vit"], modes=["openvino"], device="cpu"))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit status of ``conv2former benchmark ARGUMENTS``, in this process."""
    return run_command(monkeypatch, "benchmark", *arguments)


# what is computed


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    """The output of the network as it is trained, in plain PyTorch."""
    with ops.use_backend("auto"):
        return prepare(replace(BASE, fuse=False, ops="reference"))()


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("eager", "float32"),
        ("eager", "bfloat16"),
        pytest.param("compile", "float32", marks=pytest.mark.slow),  # test_model.py compiles, too
        ("onnxruntime", "float32"),
        # OpenVINO's files of both kinds are among the quick tests of the export
        pytest.param("openvino-int8", "float32", marks=pytest.mark.slow),
        pytest.param("openvino", "float32", marks=pytest.mark.slow),
        pytest.param("openvino", "bfloat16", marks=pytest.mark.slow),
        pytest.param("aotinductor", "float32", marks=pytest.mark.slow),  # compiled for most of a minute
        pytest.param("aotinductor", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_all_modes_compute_the_same(mode: str, dtype: str, expected: torch.Tensor) -> None:
    for package in MODES[mode]:
        pytest.importorskip(package)
    try:
        step = prepare(replace(BASE, mode=mode, dtype=dtype))
    except UserError as reason:
        if (mode, dtype) != ("openvino", "bfloat16"):
            raise
        pytest.skip(str(reason))  # on a processor without such products
    found = torch.as_tensor(step())
    assert found.shape == expected.shape
    tolerance = 0.3 if mode.endswith("int8") else 1e-5 if dtype == "float32" else 0.03
    assert (found.float() - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("mode", ["onnxruntime", "openvino-int8"])
def test_what_has_no_bfloat16_refuses_it(mode: str) -> None:
    with pytest.raises(UserError, match="float32 alone"):
        prepare(replace(BASE, mode=mode, dtype="bfloat16"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_step_trains(dtype: str) -> None:
    step = prepare(replace(BASE, training=True, fuse=False, dtype=dtype))
    losses = [step().item() for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]


def test_a_profile_is_sorted_and_adds_up() -> None:
    found = Holder(BASE).profile(15)
    assert 5 < len(found) <= 15
    assert any("conv2former::blocks" in operation.name or "convolution" in operation.name for operation in found)
    assert [o.seconds for o in found] == sorted((o.seconds for o in found), reverse=True)
    assert 0.5 < sum(o.share for o in found) <= 1 + 1e-9 and all(o.calls > 0 for o in found)


# how it is measured


def test_workers_take_turns(fake: type[FakeWorker]) -> None:
    workers = [fake(replace(BASE, mode=mode)) for mode in ("a", "bb", "ccc")]
    fake.failing["bb"] = 1
    fake.log.clear()
    assert take_turns(workers, 3) == [[1, 1, 1], [2], [3, 3, 3]]
    assert fake.log == ["a", "bb", "ccc", "a", "ccc", "a", "ccc"]


def test_statistics() -> None:
    found = statistics(ROW, [0.5, 0.1, 0.2, 0.3, 0.4], 1e11)
    assert found["seconds"] == 0.3 and found["quartiles"] == pytest.approx((0.2, 0.4))
    assert found["images_per_second"] == pytest.approx(4 / 0.3)
    assert found["macs_per_second"] == pytest.approx(4e9 / 0.3)
    assert found["peak_share"] == pytest.approx(4e9 / 0.3 / 1e11)
    training = statistics(replace(ROW, task="training"), [0.3], None)
    assert training["macs_per_second"] == pytest.approx(12e9 / 0.3)
    assert training["quartiles"] == (0.3, 0.3) and training["peak_share"] is None


def test_ratios_are_to_the_first_models_best_mode() -> None:
    rows = [
        replace(ROW, images_per_second=10.0),
        replace(ROW, mode="compile", images_per_second=20.0),
        replace(ROW, mode="openvino", error="broken"),
        replace(ROW, model="convnext_tiny", images_per_second=30.0),
    ]
    found = with_ratios(rows)
    assert [row.ratio for row in found] == [0.5, 1.0, None, 1.5]
    assert {row.ratio_to for row in found if row.ratio} == {"conv2former_t"}
    assert with_ratios(rows[2:])[1].ratio is None


def test_a_failed_configuration_is_a_row(fake: type[FakeWorker], capsys: pytest.CaptureFixture[str]) -> None:
    options = BenchmarkOptions(
        models=["conv2former_test"], image_sizes=[64], batch_sizes=[2], rounds=2, device="cpu", profile=True
    )
    fake.failing["compile"] = 1
    eager, compiled = benchmark(options, start=fake)  # type: ignore[arg-type]
    assert fake.log[:5] == ["start eager", "start compile", "eager", "compile", "eager"]
    assert fake.log[5:] == ["peak float32", "close eager", "close compile"]
    assert eager.seconds == 5 and eager.ratio == 1 and eager.memory == 3_000_000 and eager.error is None
    assert compiled.error == "out of luck" and compiled.seconds is None and compiled.macs == eager.macs > 0
    assert report.cells(compiled)[-1] == "out of luck" and "out of luck" in report.to_markdown([eager, compiled])
    assert eager.to_json()["profile"] == [dict(name="aten::addmm", calls=7, seconds=0.5, share=0.25)]
    assert "failed: conv2former_test, compile" in capsys.readouterr().err
    fake.failing["eager"] = 0
    with pytest.raises(UserError, match="nothing could be measured: out of luck"):
        benchmark(options, start=fake)  # type: ignore[arg-type]


def test_a_worker_says_why_it_failed() -> None:
    worker = Worker(replace(BASE, model_args=dict(kernel_size=4)))
    worker.close()
    assert worker.error is not None and "kernel_size is 4" in worker.error
    assert worker.step() is None and worker.versions() == {}


def test_a_worker_that_dies_is_noticed() -> None:
    worker = Worker(BASE)
    assert worker.error is None and (worker.step() or 0) > 0
    os.kill(worker._process.pid or 0, signal.SIGKILL)
    assert worker.step() is None and worker.step() is None
    worker.close()
    assert worker.error == "its process ended with status -9: too little memory?"


def test_the_machines_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peak.SIDE, "cpu", 256)
    holder = Holder(BASE)
    assert 1e8 < holder.peak("float32") < 1e14
    assert set(holder.versions()) == {"torch", "timm", "python"}


# what is written


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    measured = ["--mode", "eager", "--size", 64, "--batch-size", 1, "--rounds", 3, "--threads", 1, "--device", "cpu"]
    assert run(monkeypatch, "conv2former_test", "test_vit", *measured, "--profile", "--json", "--out", out) == 0
    first, second = rows = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in rows] == ["conv2former_test", "test_vit"]
    for row in rows:
        assert row["error"] is None and row["rounds"] == 3 and row["task"] == "inference" and row["threads"] == 1
        low, high = row["quartiles"]
        assert 0 < low <= row["seconds"] <= high
        assert row["images_per_second"] == pytest.approx(1 / row["seconds"])
        assert row["peak"] == first["peak"] and 0 < row["peak_share"] == row["macs_per_second"] / row["peak"]
        assert row["memory"] > 0 and row["params"] > 0 and row["device"] and row["date"] and row["versions"]["torch"]
        assert len(row["profile"]) > 5
    assert first["ratio"] == 1 and second["ratio_to"] == "conv2former_test"
    assert second["ratio"] == pytest.approx(second["images_per_second"] / first["images_per_second"])
    assert [json.loads(line) for line in (out / "benchmark.jsonl").read_text().splitlines()] == rows
    assert "| test_vit | eager | float32 | 1 | 64 |" in (out / "benchmark.md").read_text()
    assert "test_vit, eager, float32, batch size 1, 64 px" in (out / "profile.txt").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["benchmark.jsonl", "benchmark.md", "profile.txt"]


def test_the_table_on_the_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [measured(images_per_second=10.0), measured(model="convnext_tiny", images_per_second=30.0)]
    monkeypatch.setattr("conv2former.tools.benchmark.measure.benchmark", lambda options: with_ratios(rows))
    assert run(monkeypatch, "conv2former_t", "convnext_tiny", "--profile", "--out", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "inference, medians of 3 rounds; a processor, threads: 1; operations by cpp; fused; peak"
    )
    assert "x of conv2former_t" in lines[1]
    numbers = "4 224 133.33 120.00-150.00 30.0 3.00 5 1.0 1.00 30.0 3.0"
    assert lines[3].split() == ["convnext_tiny", "eager", "float32", *numbers.split()]
    assert lines[-1] == f"benchmark.jsonl, benchmark.md, speed.png are in {tmp_path}"


def measured(**fields: Any) -> Row:
    """A row as it comes from measuring, with numbers that hold together."""
    row = replace(ROW, **fields)
    speed = row.images_per_second or 10.0
    seconds = row.batch_size / speed
    return replace(
        row,
        seconds=seconds,
        quartiles=(0.9 * seconds, 1.125 * seconds),
        images_per_second=speed,
        memory=5_000_000,
        macs_per_second=speed * 1e9,
        peak=1e12,
        peak_share=speed * 1e-3,
    )


def test_rows_are_appended_and_plots_drawn(tmp_path: Path) -> None:
    models = ("conv2former_t", "convnext_tiny.fb_in1k", "swin_tiny_patch4_window7_224", "test_vit")
    rows = [
        measured(model=model, image_size=size, dtype=dtype, images_per_second=1e6 / size**2 + 5 * index)
        for index, model in enumerate(models)
        for size in (224, 384, 1024)
        for dtype in ("float32", "bfloat16")
    ]
    rows.append(replace(ROW, mode="openvino", error="broken"))
    for count in (1, 2):
        files = report.write(rows, tmp_path)
        assert [path.name for path in files] == ["benchmark.jsonl", "benchmark.md", "speed.png", "resolution.png"]
        assert len((tmp_path / "benchmark.jsonl").read_text().splitlines()) == count * len(rows)
    for name in ("speed.png", "resolution.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 500 and np.asarray(picture.convert("L")).std() > 5


def test_no_plot_without_something_to_show(tmp_path: Path) -> None:
    rows = [measured(model="test_vit"), measured(image_size=256), replace(ROW, error="broken")]
    assert plots.speed(rows, tmp_path) is None
    assert plots.resolution(rows[:1], tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_the_papers_baselines_are_models_of_timm() -> None:
    assert all(timm.is_model(name) for name in plots.BASELINES_TOP1)


def test_the_best_mode_stands_for_a_model() -> None:
    slow, fast = measured(images_per_second=10.0), measured(mode="compile", images_per_second=20.0)
    failed = replace(ROW, mode="openvino", error="broken")
    assert plots.best_modes([slow, fast, failed]) == [fast]
