"""Exported files: they compute what PyTorch does, carry what a user needs, and are not kept where they do not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
import timm
import torch
from PIL import Image

from command import run_command
from conv2former.checkpoints.exported import open_runtime
from conv2former.data.images import decode
from conv2former.engine.evaluate import evaluate
from conv2former.engine.machine import fast_bfloat16
from conv2former.engine.predict import predict
from conv2former.errors import UserError
from conv2former.ops import cpu, use_backend
from conv2former.tasks.detection.export import compare as compare_detections
from conv2former.tasks.detection.task import EXPORT_NOTE
from conv2former.tools.export import FORMATS, Exported, ExportOptions, export
from conv2former.tools.export.channels_first import channels_first
from conv2former.tools.export.check import compare
from conv2former.tools.export.formats import Format
from conv2former.tools.export.subjects import open_subject
from scenes import certain

EXAMPLE = Path(__file__).parents[1] / "examples" / "onnx_classify.py"


def run(source: object, out: Path, *formats: str, **options: Any) -> dict[str, Exported]:
    found = export(str(source), out, ExportOptions(formats=formats, **options), say=lambda line: None)
    return {exported.format: exported for exported in found}


@pytest.fixture(scope="module")
def everything(
    finished: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Exported], Path]:
    """The classifier in every format, and the folder of the files; not to be changed."""
    left_out = {"aotinductor"}  # compiled for a minute: among the slow tests
    left_out |= set() if fast_bfloat16() else {"openvino-bf16"}  # OpenVINO refuses it
    names = [name for name in FORMATS if name not in left_out]
    out = tmp_path_factory.mktemp("everything")
    return run(finished, out, *names, data=data, calibration=data / "train"), out


def test_a_classifier_in_every_runtime(everything: tuple[dict[str, Exported], Path]) -> None:
    found, _ = everything
    for name, exported in found.items():
        assert exported.ok and exported.comparison.pictures == 16, name
        assert exported.top1 is not None and exported.top1[2] == 16
        assert exported.comparison.agreement is not None and exported.comparison.agreement >= 0.9
    for name in ("onnx", "openvino", "torch"):
        assert found[name].comparison.difference < 1e-5
        assert found[name].top1 is not None and found[name].top1[0] == found[name].top1[1]
    weights = {name: found[name].files[1].stat().st_size for name in ("openvino", "openvino-int8")}
    assert weights["openvino-int8"] < 0.5 * weights["openvino"]


@pytest.mark.slow
def test_a_compiled_classifier(finished: Path, tmp_path: Path) -> None:
    assert run(finished, tmp_path, "aotinductor")["aotinductor"].comparison.difference < 1e-5


@pytest.mark.slow
def test_the_file_says_how_to_use_it(finished: Path, tmp_path: Path) -> None:
    run(finished, tmp_path, "onnx", "openvino", "torch")
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model)
    entries = [json.loads({e.key: e.value for e in model.metadata_props}["conv2former"])]
    entries.append(
        json.loads(openvino.Core().read_model(tmp_path / "model.xml").get_rt_info(["conv2former"]).astype(str))
    )
    extra = {"conv2former.json": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    entries.append(json.loads(extra["conv2former.json"]))
    config = json.loads((finished / "best" / "config.json").read_text())
    for entry in entries:
        assert entry["labels"] == config["label_names"]
        assert entry["input_size"] == [3, 16, 16] and entry["task"] == "classification"
        assert entry["mean"] == pytest.approx(config["pretrained_cfg"]["mean"])
        assert {"std", "interpolation", "crop_pct", "crop_mode"} <= set(entry)
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert shape[0].dim_param and [dim.dim_value for dim in shape][1:] == [3, 16, 16]


def alone(example: Path, *words: Path) -> subprocess.CompletedProcess[str]:
    """An example in a process that can import neither PyTorch nor this package."""
    code = (
        "import runpy, sys\n"
        "for name in ('torch', 'timm', 'torchvision', 'conv2former'): sys.modules[name] = None\n"
        f"sys.argv = ['x', *{[str(word) for word in words]!r}]\n"
        f"runpy.run_path({str(example)!r}, run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.slow
def test_the_example_needs_neither_torch_nor_us(finished: Path, data: Path, tmp_path: Path) -> None:
    run(finished, tmp_path, "onnx")
    files = sorted((data / "val").rglob("*.png"))[:5]
    wide = tmp_path / "wide.png"  # what is cropped, and turned
    Image.open(files[0]).convert("RGB").resize((90, 40)).save(wide)
    answer = alone(EXAMPLE, tmp_path / "model.onnx", *files, wide)
    lines = answer.stdout.splitlines()
    assert len(lines) == 6, answer.stderr
    for line, ours in zip(lines, predict(finished, [*files, wide], top_k=1), strict=True):
        label, share = line.rpartition(": ")[2].rsplit(" ", 1)
        assert label == ours["top"][0]["label"] and float(share) == pytest.approx(
            ours["top"][0]["probability"], abs=2e-3
        )
    assert len(EXAMPLE.read_text().split('"""')[2].strip().splitlines()) <= 32


@pytest.mark.slow
def test_other_sizes_and_batches(tmp_path: Path, data: Path) -> None:
    """In ONNX also where the file's size leaves the last map one position, which PyTorch would take for a constant."""
    run("conv2former_test", tmp_path, "onnx", dynamic_size=True, size=(32, 32), images=[data / "val"])
    subject = open_subject(("conv2former_test", {}), "", size=None, fuse=True, dynamic_size=True)
    runtime = FORMATS["onnx"].load(tmp_path / "model.onnx")
    for shape in ((1, 3, 32, 32), (1, 3, 64, 96), (3, 3, 100, 72)):
        batch = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        assert np.abs(runtime(batch)[0] - subject.reference(batch)[0]).max() < 1e-5


@pytest.mark.slow
def test_another_fixed_size(tmp_path: Path, data: Path) -> None:
    run("test_convnext", tmp_path, "onnx", size=(96, 96), images=[data / "val"])
    dims = onnx.load(tmp_path / "model.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims][1:] == [3, 96, 96]


@pytest.mark.slow
def test_a_segmenter(segmenter: Path, tmp_path: Path) -> None:
    found = run(segmenter, tmp_path, "onnx", "openvino", "torch")
    assert all(exported.comparison.difference < 1e-5 for exported in found.values())
    assert found["onnx"].comparison.agreement == 1.0
    runtime = FORMATS["onnx"].load(tmp_path / "model.onnx")
    entry = {e.key: e.value for e in onnx.load(tmp_path / "model.onnx").metadata_props}["conv2former"]
    size = json.loads(entry)["input_size"][1:]
    assert runtime(np.zeros((1, 3, *size), np.float32))[0].shape == (1, len(json.loads(entry)["labels"]), *size)


def test_a_detector_up_to_its_pyramid(detector: Path, tmp_path: Path) -> None:
    said: list[str] = []
    (found,) = export(str(detector), tmp_path, ExportOptions(formats=["torch"], size=(64, 96)), say=said.append)
    assert said == [f"note: {EXPORT_NOTE}"] and found.ok and found.comparison.agreement is None
    assert len(FORMATS["torch"].load(tmp_path / "model.pt2")(np.zeros((1, 3, 64, 96), np.float32))) == 5


@pytest.mark.slow
def test_a_detector_that_finds_nothing(detector: Path, tmp_path: Path) -> None:
    """One that was hardly trained is sure of nothing: rows without a box, and a note that little was compared."""
    said: list[str] = []
    source = certain(tmp_path / "model", "detector.score_threshold=0.9999999")
    options = ExportOptions(size=(64, 96), images=[next((detector.parent / "data" / "val2017").iterdir())])
    (found,) = export(str(source), tmp_path / "out", options, say=said.append)
    assert found.ok and found.comparison.agreement is None and "nothing was found" in said[0]
    boxes, scores, labels, masks = open_runtime(tmp_path / "out" / "model.onnx")(
        np.zeros((1, 3, 64, 96), np.float32), np.array([64, 96])
    )
    assert not boxes.any() and not scores.any() and (labels == -1).all() and not masks.any()


@pytest.mark.slow
def test_the_example_draws_what_predict_finds(detector: Path, tmp_path: Path) -> None:
    """Neither torch nor this package is needed; boxes are in the pixels of the photo."""
    source = certain(tmp_path / "model")
    photo = tmp_path / "photo.png"
    Image.open(next((detector.parent / "data" / "val2017").iterdir())).convert("RGB").save(photo)  # 128 x 96
    export(str(source), tmp_path, ExportOptions(size=(96, 128), images=[photo]), say=lambda line: None)
    answer = alone(EXAMPLE.with_name("onnx_detect.py"), tmp_path / "model.onnx", photo)
    assert answer.returncode == 0, answer.stderr
    (ours,) = predict(source, [photo])
    lines = answer.stdout.splitlines()[1:]
    assert len(lines) == len(ours["objects"]) > 0
    for line, found in zip(lines, ours["objects"], strict=True):
        label, score, *_ = line.split()
        box = json.loads(line[line.index("[") :])
        assert label == found["label"] and float(score) == pytest.approx(found["score"], abs=2e-3)
        assert box == pytest.approx(found["box"], abs=0.5)
    assert Image.open(tmp_path / "photo.found.png").size == (128, 96)
    assert len(EXAMPLE.with_name("onnx_detect.py").read_text().splitlines()) < 80


COCO = Path(os.environ.get("COCO_VAL", "none"))  # a folder of photographs, and a run of a trained detector
RUN = Path(os.environ.get("COCO_RUN", "none"))


@pytest.mark.slow
@pytest.mark.skipif(not (COCO.is_dir() and RUN.is_dir()), reason="set COCO_VAL and COCO_RUN")
def test_a_trained_detector_on_twenty_photographs(tmp_path: Path) -> None:
    for found in run(RUN, tmp_path, "onnx", "openvino", images=[COCO], count=20).values():
        assert found.ok and found.comparison.pictures == 20
        assert found.comparison.agreement == 1.0 and found.comparison.difference < 1e-4


def test_detections_are_matched() -> None:
    """By hand, of an image of 100 pixels: order does not matter, class and place do."""
    boxes = np.array([[0, 0, 50, 50], [20, 20, 90, 90], [0, 0, 0, 0]], np.float32)
    scores, labels = np.array([0.9, 0.5, 0], np.float32), np.array([1, 0, -1])
    ours = [boxes, scores, labels]
    turned = [part[[1, 0, 2]] for part in ours]
    assert compare_detections(ours, turned, 100) == (0.0, 2, 2)
    moved = [boxes + np.float32([1, 0, 1, 0]), scores + np.float32(0.002), labels]
    assert compare_detections(ours, moved, 100) == (pytest.approx(0.01), 2, 2)
    other = [boxes, scores, np.array([1, 1, -1])]
    assert compare_detections(ours, other, 100) == (0.0, 1, 3)
    nothing = [0 * boxes, 0 * scores, np.full(3, -1)]
    assert compare_detections(ours, nothing, 100) == (0.0, 0, 2)
    assert compare_detections(nothing, nothing, 100) == (0.0, 0, 0)
    broken = [boxes, scores * np.nan, labels]
    assert compare_detections(ours, broken, 100)[0] == compare_detections(broken, ours, 100)[0] == float("inf")
    assert compare_detections(ours, [boxes[:2], scores, labels], 100)[0] == float("inf")


@pytest.mark.slow
def test_a_file_that_differs_is_not_kept(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(finished, tmp_path, "onnx", tolerance=0.0)["onnx"]
    assert not found.ok and not list(tmp_path.iterdir())

    def wrong(path: Path) -> Any:
        runtime = onnx_format.load(path)
        return lambda batch: [1.01 * part for part in runtime(batch)]

    onnx_format = FORMATS["onnx"]
    monkeypatch.setitem(FORMATS, "onnx", Format(**vars(onnx_format) | dict(load=wrong)))
    found = run(finished, tmp_path, "onnx")["onnx"]
    assert not found.ok and found.comparison.difference == pytest.approx(0.01, rel=0.01)


def test_differences_are_found(finished: Path, data: Path) -> None:
    """By hand: the largest error as a share of the largest value, the share of equal classes."""
    subject = open_subject(finished, "", size=None, fuse=False, dynamic_size=False)
    pictures = [subject.prepare(decode(path)) for path in sorted((data / "val").rglob("*.png"))[:5]]
    ours = subject.reference(np.stack(pictures))[0]
    shifted = compare(lambda batch: [subject.reference(batch)[0] + 0.5], subject, pictures)
    assert shifted.difference == pytest.approx(0.5 / np.abs(ours).max(), rel=1e-4) and shifted.agreement == 1.0
    turned = compare(lambda batch: [-subject.reference(batch)[0]], subject, pictures)
    assert turned.difference == pytest.approx(2.0, rel=1e-4) and turned.agreement == 0.0
    broken = compare(lambda batch: [np.full_like(subject.reference(batch)[0], np.nan)], subject, pictures)
    assert broken.difference == float("inf")

    def one_differs(batch: np.ndarray) -> list[np.ndarray]:
        mark = np.array([np.array_equal(picture, pictures[0]) for picture in batch])
        return [np.where(mark[:, None], -1, 1) * subject.reference(batch)[0]]

    assert compare(one_differs, subject, pictures).agreement == 0.8


def test_each_output_is_held_to_its_own_size(detector: Path) -> None:
    subject = open_subject(detector, "", size=(64, 96), fuse=False, dynamic_size=False)
    pictures = [np.random.default_rng(0).normal(size=(3, 64, 96)).astype(np.float32)]

    def without_the_last(batch: np.ndarray) -> list[np.ndarray]:
        *maps, last = subject.reference(batch)
        return [*maps, 0 * last]

    assert compare(without_the_last, subject, pictures).difference == 1.0
    nothing = [np.full((1, 2), np.nan, np.float32)] * 5
    subject.reference = lambda batch: nothing  # type: ignore[method-assign]
    assert compare(lambda batch: [np.zeros((1, 2), np.float32)] * 5, subject, pictures).difference == float("inf")


def test_an_error_leaves_nothing_and_harms_nothing(finished: Path, data: Path, tmp_path: Path) -> None:
    run(finished, tmp_path / "out", "runtime")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    (tmp_path / "out" / "README.md").write_text("mine")
    (tmp_path / "classless").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "classless" / "a.png")
    with pytest.raises(UserError):
        run(finished, tmp_path / "out", "runtime", images=[data / "val"], data=tmp_path / "classless")
    assert not run(finished, tmp_path / "out", "runtime", tolerance=-1.0)["runtime"].ok
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    run(finished, tmp_path / "out", "runtime")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "export.json",
        "model.safetensors",
    ]
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    with pytest.raises(UserError, match="holds a saved model"):
        run(finished, finished / "best", "runtime")


def test_the_card_names_the_files_of_earlier_calls(finished: Path, tmp_path: Path) -> None:
    run(finished, tmp_path, "runtime")
    place, card = tmp_path / "export.json", tmp_path / "README.md"
    record = json.loads(place.read_text())
    (row,) = record["files"]
    earlier = record | dict(files=[row | dict(format="torch", file="model.pt2"), row])
    for there, weights, files in ((False, "", 1), (True, "", 2), (True, "of another model", 1)):
        place.write_text(json.dumps(earlier | dict(weights=weights or record["weights"])))
        (tmp_path / "model.pt2").touch() if there else None
        run(finished, tmp_path, "runtime")
        assert len(json.loads(place.read_text())["files"]) == files
        assert card.read_text().count("model.safetensors | runtime |") == 1
        assert card.read_text().count("model.pt2 | torch |") == files - 1
    place.write_text('["damaged"')
    run(finished, tmp_path, "runtime")
    assert len(json.loads(place.read_text())["files"]) == 1


def test_a_name_that_is_both_is_refused(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished / "best", tmp_path / "conv2former_test")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"write \./conv2former_test for the path"):
        run("conv2former_test", tmp_path / "out", "runtime", images=[data / "val"])
    assert run("./conv2former_test", tmp_path / "out", "runtime", images=[data / "val"])["runtime"].ok
    assert "digit-3" in (tmp_path / "out" / "README.md").read_text()


BAD = [
    (["{run}", "--format", "onx"], "did you mean 'onnx'"),
    (["nowhere"], "nowhere"),
    (["conv2former_test"], "--images"),
    (["{run}", "--images", "{empty}"], "no images in"),
    (["{run}", "--images", "{broken}"], "broken.png"),
    (["{run}", "--size", "16", "32"], "makes squares"),
    (["{run}", "--data", "{empty}"], "no images"),
    (["{detector}", "--dynamic-size"], "a detection model takes one size"),
    (["{segmenter}", "--data", "{empty}"], "counts top-1"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_mistakes_end_in_one_line(
    arguments: list[str],
    message: str,
    finished: Path,
    segmenter: Path,
    detector: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    places = dict(run=finished, segmenter=segmenter, detector=detector)
    places |= dict(empty=tmp_path / "empty", broken=tmp_path / "broken.png")
    words = [word.format(**places) for word in arguments]
    assert run_command(monkeypatch, "export", *words, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ") and message in error[-1]


def test_a_missing_package_is_named(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs onnx, onnxscript, onnxruntime: pip install"):
        run(finished, tmp_path, "onnx")


def test_what_other_runtimes_get_is_equal_on_nchw() -> None:
    """The same weights in memory, no transpose, values equal to 1e-5; parts that are not fused stay."""
    for name in ("conv2former_n", "conv2former_n_sum"):
        sizes: Any = dict(dims=(24, 40, 48, 72), depths=(1, 2, 1, 1), kernel_size=5)
        model = timm.create_model(name, num_classes=10, **sizes).eval()
        x = torch.randn(2, 3, 64, 96)
        with torch.no_grad(), use_backend("reference"):
            wanted, maps = model(x), model.forward_intermediates(x, intermediates_only=True)
            made = channels_first(model.fuse())
            torch.testing.assert_close(made(x), wanted, atol=1e-5, rtol=1e-5)
            for one, other in zip(made.forward_intermediates(x, intermediates_only=True), maps, strict=True):
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        assert {p.data_ptr() for p in made.parameters()} == {p.data_ptr() for p in model.parameters()}
        program = torch.export.export(made, (x,))
        permutes = [node for node in program.graph.nodes if "permute" in str(node.target)]
        assert bool(permutes) == name.endswith("sum")


def test_a_file_that_names_other_classes_is_not_kept(finished: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The difference is small, and the top classes change."""
    monkeypatch.setitem(FORMATS, "runtime", replace(FORMATS["runtime"], load=_rolled(FORMATS["runtime"].load)))
    found = run(finished, tmp_path / "out", "runtime", tolerance=10.0)["runtime"]
    assert not found.ok and "--agreement" in found.wrong and not (tmp_path / "out" / "model.safetensors").exists()
    assert run(finished, tmp_path / "out", "runtime", tolerance=10.0, agreement=0.0)["runtime"].ok


def _rolled(load: Any) -> Any:
    """A runtime that answers with the next class."""

    def loaded(path: Path) -> Any:
        runtime = load(path)
        return lambda batch: [np.roll(logits, 1, axis=1) for logits in runtime(batch)]

    return loaded


def test_predict_and_evaluate_take_exported_files(
    everything: tuple[dict[str, Exported], Path], finished: Path, data: Path, tmp_path: Path
) -> None:
    """They answer as the run does; a file that may run code, and one of another kind, are refused in a line."""
    files = {"onnx": "model.onnx", "openvino": "model.xml"}
    if fast_bfloat16():  # OpenVINO refuses it elsewhere
        files["openvino-bf16"] = "model.bf16.xml"
    if not cpu.unusable(torch.device("cpu")):
        files["runtime"] = "model.safetensors"
    _, out = everything
    given = sorted((data / "val").rglob("*.png"))[:6]
    wanted, (figures, _) = list(predict(finished, given)), evaluate(finished, data=data / "val", workers=0)
    for name in files.values():
        for one, other in zip(predict(out / name, given), wanted, strict=True):
            near = 0.03 if "bf16" in name else 1e-4
            assert one["file"] == other["file"] and one["top"][0]["label"] == other["top"][0]["label"]
            assert one["top"][0]["probability"] == pytest.approx(other["top"][0]["probability"], abs=near)
        found, report = evaluate(out / name, data=data / "val", workers=0)
        assert report is None and found.metrics["top1"] == figures.metrics["top1"]
    with pytest.raises(UserError, match="may run code"):
        list(predict(out / "model.pt2", given))
    (tmp_path / "other.onnx").write_bytes(b"no network")
    with pytest.raises(UserError, match=r"other\.onnx cannot be opened"):
        list(predict(tmp_path / "other.onnx", given))
