"""``conv2former_runtime``: what it computes without PyTorch is what PyTorch computes, whatever it is given."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.numpy import load_file

import conv2former_runtime
from conv2former.engine.predict import predict
from conv2former.errors import UserError
from conv2former.models.conv2former import Conv2Former
from conv2former.ops import cpu
from conv2former.tools.export import ExportOptions, export
from conv2former.tools.export import runtime as writer
from conv2former_runtime import file, library, packing
from conv2former_runtime.packing import Layout, as_bfloat16, as_float
from digits import write_digits

ROOT = Path(__file__).parents[1]
WHY = cpu.unusable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(WHY is not None, reason=str(WHY))
LAYOUTS = [Layout(16, 32, 2), Layout(16, 32, 1), Layout(8, 16, 1), Layout(4, 8, 1)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return sorted((write_digits(tmp_path_factory.mktemp("digits")) / "val").rglob("*.png"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, images: list[Path]) -> Path:
    """A network with channels that are no whole vectors, in both precisions."""
    out = tmp_path_factory.mktemp("exported")
    small = "conv2former_t:dims=[24, 40, 48, 72],depths=[1, 2, 1, 1],num_classes=7,kernel_size=5"
    found = export(
        small, out, ExportOptions(("runtime", "runtime-bf16"), images[:4], size=(64, 64)), say=lambda _: None
    )
    assert [each.ok for each in found] == [True, True] and found[0].comparison.difference < 1e-5
    return out


def test_the_isotropic_network_and_maps(tmp_path: Path, images: list[Path]) -> None:
    name = "conv2former_is:dim=48,depth=2,num_classes=5"
    (found,) = export(name, tmp_path, ExportOptions(("runtime",), images[:2], size=(64, 64)), say=lambda _: None)
    assert found.comparison.difference < 1e-5
    path = tmp_path / "model.safetensors"
    path.write_bytes(_damaged(path.read_bytes(), r"\"sizes\": [3, 16, 48]", r"\"sizes\": [3, 12, 48]"))
    with pytest.raises(UserError, match="weights are not those"):
        conv2former_runtime.load(path)
    model = timm.create_model("conv2former_t", dims=(24, 40, 48, 72), depths=(1, 1, 1, 1), num_classes=0).eval()
    assert isinstance(model, Conv2Former)
    x = torch.randn(2, 3, 72, 100)
    with torch.no_grad():
        wanted = model.forward_intermediates(x, intermediates_only=True)
    steps = list(writer._steps(model.fuse(), "conv2former_t"))
    arrays = {f"{i}.{j}": each for i, s in enumerate(steps) for j, each in enumerate(writer._arrays(*s, half=False))}
    facts = dict(labels=[], input_size=(3, 64, 64), min_size=32, mean=[0.5] * 3, std=[0.5] * 3)
    facts |= dict(crop_pct=1.0, crop_mode="center", interpolation="bicubic")
    file.write(tmp_path / "maps", file.describe("float32", [step for step, _ in steps], **facts), arrays)
    maps = conv2former_runtime.load(tmp_path / "maps")
    for one, other, again in zip(maps(x.numpy()), wanted, maps.features(x.numpy()), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
        assert np.array_equal(one, again)
    with pytest.raises(UserError, match="without a classifier"):
        list(maps.predict(images[:1]))


def test_another_kind_of_processor(exported: Path, tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    """Weights that were packed for others are packed anew; what is computed is equal."""
    x = np.random.default_rng(0).standard_normal((2, 3, 64, 64), np.float32)
    for name in ("model.safetensors", "model.bf16.safetensors"):
        model = conv2former_runtime.load(exported / name)
        description, weights = file.read(exported / name)
        here = Layout(**description["layout"])
        there = next(layout for layout in LAYOUTS if layout != here and layout.together == 1)
        arrays = {}
        for i, (step, tensors) in enumerate(zip(description["steps"], weights, strict=True)):
            for j, parts in enumerate(file.step_parts(step)):
                arrays[f"{i}.{j}"] = there.pack(parts, list(here.unpack(parts, tensors[j])))
        description["layout"] = vars(there)
        file.write(tmp_path / name, description, arrays)
        caplog.clear()
        other = conv2former_runtime.load(tmp_path / name)
        assert "another kind of processor" in caplog.text
        assert np.array_equal(other(x), model(x))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_packing_loses_nothing(layout: Layout) -> None:
    draw = np.random.default_rng(0)
    for parts in (packing.stem_parts(3, 20, 40), *packing.block_parts(24, 88, 5), packing.downsample_parts(24, 40)):
        arrays = [as_bfloat16(draw.standard_normal(shape, np.float32)) for _, shape in parts]
        packed = layout.pack(parts, arrays)
        assert packed.ctypes.data % 64 == packed.nbytes % 64 == 0 and packed.nbytes == layout.size(parts)
        for one, other in zip(arrays, layout.unpack(parts, packed), strict=True):
            assert np.array_equal(as_float(one), as_float(other))


def test_bfloat16_is_rounded_as_pytorch_does() -> None:
    x = torch.cat([torch.randn(10_000) * 10.0**3, torch.tensor([float("nan"), float("inf"), -0.0, 3.4e38])])
    assert np.array_equal(as_float(as_bfloat16(x.numpy())), x.to(torch.bfloat16).float().numpy(), equal_nan=True)


def test_it_prints_what_predict_prints(exported: Path, finished: Path, data: Path, tmp_path: Path) -> None:
    """In a process that cannot import PyTorch; a file that is no image is one line."""
    export(str(finished), tmp_path / "out", ExportOptions(("runtime",)), say=lambda _: None)
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    given = [*sorted((data / "val").rglob("*.png"))[:5], bad]
    model = tmp_path / "out" / "model.safetensors"
    script = "import sys; sys.modules['torch'] = sys.modules['conv2former'] = None; import runpy; runpy.run_module"
    script += "('conv2former_runtime', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script, model, *given, "--top-k=3"], capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "1 of 6 files could not be read"
    for row, wanted in zip(rows, predict(finished, given, top_k=3), strict=True):
        tops = [[row.pop("top", [])], [wanted.pop("top", [])]]
        assert row == wanted
        for one, other in zip(*map(np.ravel, tops), strict=True):
            assert (one["label"], one["index"]) == (other["label"], other["index"])
            assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)


def test_one_image_or_many(exported: Path, images: list[Path]) -> None:
    model = conv2former_runtime.load(exported / "model.safetensors")
    (wanted,) = model.predict([images[0]])
    with images[0].open("rb") as file, Image.open(images[0]) as opened:
        for one in (images[0], str(images[0]), images[0].read_bytes(), file, opened):
            assert [*model.predict(one)] == [wanted]
    assert len([*model.predict(path for path in images)]) == len(images)
    with pytest.raises(TypeError, match="a path, bytes or a binary file"):
        next(model.predict([np.zeros((4, 4, 3), np.uint8)]))


def test_whoever_reads_its_rows_may_stop(exported: Path, images: list[Path]) -> None:
    command = [sys.executable, "-m", "conv2former_runtime", exported / "model.safetensors", *images * 20]  # in batches
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr and json.loads(process.stdout.readline())["ok"]
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 0


def _damaged(content: bytes, old: str, new: str) -> bytes:
    assert old.encode() in content and len(old) == len(new)
    return content.replace(old.encode(), new.encode(), 1)


def _in_fours(content: bytes) -> bytes:
    """The same bytes, said to be a fourth as many numbers of four bytes."""
    found = re.search(rb'"dtype": "U8", "shape": \[(\d+)\]', content)
    assert found
    words = b'"dtype":"F32", "shape": [%d]' % (int(found[1]) // 4)
    return content.replace(found[0], words.ljust(len(found[0])), 1)


DAMAGES = {
    "empty": lambda b: b"",
    "no header": lambda b: b"\xff" * 100,
    "cut in the header": lambda b: b[:100],
    "cut in the weights": lambda b: b[: len(b) // 2],
    "no JSON": lambda b: b[:8] + b"x" + b[9:],
    "text": lambda b: b"this is a text, and not a network at all",
    "wider": lambda b: _damaged(b, r"\"sizes\": [24, 96, 5]", r"\"sizes\": [24, 97, 5]"),
    "no kernel": lambda b: _damaged(b, r"\"sizes\": [24, 96, 5]", r"\"sizes\": [24, 96, 4]"),
    "more blocks": lambda b: _damaged(b, r"\"count\": 2", r"\"count\": 9"),
    "no such layer": lambda b: _damaged(b, r"\"op\": \"stem\"", r"\"op\": \"step\""),
    "a text as a size": lambda b: _damaged(b, r"\"sizes\": [24, 96, 5]", r"\"sizes\": \"24,96,5\""),
    "negative": lambda b: _damaged(b, r"\"sizes\": [24, 96, 5]", r"\"sizes\": [24, -9, 5]"),
    "other vectors": lambda b: _damaged(b, r"\"lanes\": ", r"\"lanes\":9"),
    "a stem that skips images": lambda b: _damaged(b, r"\"strides\": [2, 1]", r"\"strides\": [9, 9]"),
    "smaller images": lambda b: _damaged(b, r"\"min_size\": 32", r"\"min_size\": 10"),
    "weights of another size": lambda b: _damaged(b, '"dtype": "U8"', '"dtype":"F32"'),
    "weights of another kind": lambda b: _in_fours(b),
    "no eps": lambda b: _damaged(b, r"\"eps\": 1e-06", r"\"eps\": 10.06"),
    "a crop of nothing": lambda b: _damaged(b, r"\"crop_pct\": 0.9", r"\"crop_pct\": 0.0"),
    "an unknown interpolation": lambda b: _damaged(b, r"\"bicubic\"", r"\"bycubic\""),
    "no mean": lambda b: _damaged(b, r"\"mean\":", r"\"moan\":"),
    "another version": lambda b: _damaged(b, r"\"version\": 1", r"\"version\": 2"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_file_that_is_no_network_is_one_line(kind: str, exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGES[kind]((exported / "model.safetensors").read_bytes()))
    with pytest.raises(UserError) as caught:
        conv2former_runtime.load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value) and len(str(caught.value)) < 400


def test_mistakes(exported: Path, images: list[Path]) -> None:
    model = conv2former_runtime.load(exported / "model.safetensors", threads=1)
    for shape, what in {(1, 4, 64, 64): "must be", (3, 64, 64): "must be", (1, 3, 16, 64): "needs 32"}.items():
        with pytest.raises(ValueError, match=what):
            model(np.zeros(shape, np.float32))
    assert model(np.zeros((0, 3, 64, 64), np.float32)).shape == (0, 7)
    with pytest.raises(UserError, match="No such file"):
        conv2former_runtime.load("nowhere.safetensors")
    assert load_file(exported / "model.safetensors")  # safetensors' own reader takes it
    with pytest.raises(UserError, match="fused"):
        export("conv2former_n", exported / "x", ExportOptions(("runtime",), images[:1], fuse=False), say=lambda _: None)
    with pytest.raises(UserError, match="a classification model on resnet18"):
        export("resnet18", exported / "x", ExportOptions(("runtime",), images[:1]), say=lambda _: None)


# ---- the example server


def _ask(address: str, content: bytes | None = None) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(address, content, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_the_server(exported: Path, images: list[Path]) -> None:
    """What many clients get at once is what each would get alone; what is wrong is a 4xx."""
    model = exported / "model.safetensors"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "examples" / "server" / "server.py", model, f"--port={port}", "--max-upload-mb=1"]
    server = subprocess.Popen(command)
    here = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            try:
                assert _ask(f"{here}/health")[1]["ok"]
                break
            except urllib.error.URLError:
                assert server.poll() is None
                time.sleep(0.1)
        with ThreadPoolExecutor(16) as clients:
            asked = [path.read_bytes() for path in images[:20]]
            answers = list(clients.map(lambda content: _ask(f"{here}/predict?top_k=3", content), asked))
        wanted = conv2former_runtime.load(model).predict([str(path) for path in images[:20]], top_k=3)
        for (status, answer), row in zip(answers, wanted, strict=True):
            assert status == 200
            for one, other in zip(answer["top"], row["top"], strict=True):
                assert one["label"] == other["label"]
                assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)
        for content, status, word in (
            (b"no image", 422, "text"),
            (b"", 422, "empty"),
            (bytes(2_000_000), 413, "larger"),
        ):
            found, answer = _ask(f"{here}/predict", content)
            assert found == status and word in answer["detail"] and "Traceback" not in str(answer)
        assert _ask(f"{here}/nowhere")[0] == 404
        assert server.poll() is None
    finally:
        server.terminate()
        server.wait(30)


# ---- wheels

PROBE = """
import sys
if "before" in sys.argv: import torch
from conv2former_runtime.library import load, built
library = load()
assert not isinstance(library, str), library
if "after" in sys.argv: import torch
import numpy as np, conv2former_runtime
model = conv2former_runtime.load(sys.argv[1], threads=2)
x = np.random.default_rng(0).standard_normal((2, 3, 64, 64), np.float32)
np.save(sys.argv[2], model(x))
pools = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line}
print(built(), len(pools), sep="|")
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runtime's wheel alone in an environment without PyTorch."""
    root = tmp_path_factory.mktemp("wheel")
    source = ROOT / "src" / "conv2former_runtime"
    shutil.copytree(source, root / "source", ignore=shutil.ignore_patterns("build", "libs", "*.egg-info"))
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", root]
    subprocess.run([*wheel, root / "source"], check=True)
    (made,) = root.glob("*.whl")
    assert "-py3-none-manylinux_2_" in made.name and made.stat().st_size < 2e6
    venv.create(root / "env", with_pip=True)
    pip = [root / "env" / "bin" / "python", "-m", "pip", "install", "-q", "--no-compile", made]
    subprocess.run(pip, check=True)
    return root / "env"


def _probe(python: Path | str, exported: Path, tmp_path: Path, *words: str, **environment: str) -> tuple[str, Any]:
    known = dict(PATH="/nowhere", CXX="no-such-compiler", HOME="/proc", OMP_NUM_THREADS="2") | environment
    command = [python, "-c", PROBE, exported / "model.safetensors", tmp_path / "out.npy", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=known, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), np.load(tmp_path / "out.npy")


@pytest.mark.slow
def test_a_wheel_brings_kernels(bare: Path, exported: Path, tmp_path: Path) -> None:
    """No compiler, a home that cannot be written, each of the builds, both orders of import; a damaged file."""
    reference = conv2former_runtime.load(exported / "model.safetensors")
    wanted = reference(np.random.default_rng(0).standard_normal((2, 3, 64, 64), np.float32))
    python, site = bare / "bin" / "python", next((bare / "lib").glob("python*/site-packages"))
    seen = set()
    for level in ("x86-64-v3", "x86-64-v4", "x86-64-v4-bf16"):
        said, found = _probe(python, exported, tmp_path, CONV2FORMER_CPU=level)
        seen.add(said)
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert "the build for x86-64-v3 that came with the package|1" in seen
    for words in (("before",), ("after",)):  # with PyTorch in the process there is one pool of threads too
        said, found = _probe(sys.executable, exported, tmp_path, *words, PYTHONPATH=str(site))
        assert said.startswith("the build for") and said.endswith("|1")
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    for broken in (site / "conv2former_runtime" / "libs").glob("x86*.so"):
        broken.write_bytes(broken.read_bytes()[:5000])
    done = subprocess.run(
        [python, "-m", "conv2former_runtime", exported / "model.safetensors", "x"],
        capture_output=True,
        text=True,
        env=dict(PATH="/nowhere", HOME="/proc"),
    )
    assert done.returncode == 2 and "is damaged: install the package again" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "error: this processor cannot run the network: there is no C++ compil"
    )


@pytest.mark.slow
def test_processes_share_the_weights(exported: Path) -> None:
    """They are mapped: nothing of the file is copied into the process's own memory."""
    path = exported / "model.safetensors"
    model = conv2former_runtime.load(path)
    assert library.load() is library.load() and model(np.zeros((1, 3, 64, 64), np.float32)).shape == (1, 7)
    lines = Path("/proc/self/smaps").read_text().split("\n")
    start = next(i for i, line in enumerate(lines) if line.endswith(str(path)))
    private = [line for line in lines[start : start + 24] if line.startswith("Private_Dirty")]
    assert private and private[0].split()[1] == "0" and os.path.getsize(path) > 100_000
