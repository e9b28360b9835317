"""The files: how each is written, and how its own runtime reads it."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.export import Dim, ExportedProgram

from conv2former.errors import UserError, one_line
from conv2former.tools.export.subjects import Subject
from conv2former.tools.runtimes import compiled_for_openvino

KEY = "conv2former"  # of the metadata in a file
LEAST_OPEN = 96  # side at which a size is left open: 3 positions at stride 32, one would be taken for a constant
MAX_BATCH = 1024  # of a compiled program

Runtime = Callable[[np.ndarray], list[np.ndarray]]


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        name: As the user calls it.
        file: Its name in the folder.
        needs: Packages that must be installed.
        write: Writes the file.
        load: Its runtime: (B, 3, H, W) -> the outputs.
        limit: Largest difference to PyTorch, as a share of the largest value; above it the export has failed.
    """

    name: str
    file: str
    needs: tuple[str, ...]
    write: Callable[[Traced, Path], None]
    load: Callable[[Path], Runtime]
    limit: float

    def files(self, folder: Path) -> list[Path]:
        """All that the export writes into a folder; the first is the one to open."""
        first = folder / self.file
        return [first, first.with_suffix(".bin")] if first.suffix == ".xml" else [first]

    def check(self) -> None:
        """Raises UserError where a package is missing."""
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"--format {self.name} needs {', '.join(missing)}: pip install 'conv2former[export]'")


@dataclass
class Traced:
    """A subject as PyTorch's exporter sees it.

    Attributes:
        subject: What is exported.
        program: The exported program, batch (and perhaps size) free.
        dynamic_size: Whether the size is.
        calibration: Prepared pictures (1, 3, H, W), for formats with fewer bits.
    """

    subject: Subject
    program: ExportedProgram
    dynamic_size: bool
    calibration: Sequence[np.ndarray]

    @property
    def metadata(self) -> str:
        """As JSON."""
        return json.dumps(self.subject.metadata | dict(dynamic_size=self.dynamic_size))


def trace(subject: Subject, *, dynamic_size: bool, calibration: Sequence[np.ndarray]) -> Traced:
    """Runs PyTorch's exporter; raises UserError where it cannot follow the network."""
    size, free = subject.part.size, {0: cast(Any, Dim("batch", min=1, max=MAX_BATCH))}
    if dynamic_size:
        size = max(size[0], LEAST_OPEN), max(size[1], LEAST_OPEN)
        free |= {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    example = torch.zeros(2, 3, *size)  # two images: a batch of one would be taken for a constant
    try:
        program = torch.export.export(subject.part.network, (example,), dynamic_shapes=(free,), strict=False)
    except Exception as error:  # PyTorch names dozens of kinds
        name = subject.metadata["architecture"]
        raise UserError(f"torch.export cannot follow {name}: {one_line(error)[:300]}") from error
    return Traced(subject, program, dynamic_size, calibration)


def _write_onnx(traced: Traced, path: Path) -> None:
    import onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names: Any = dict(input_names=["images"], output_names=traced.subject.part.outputs)
        made = torch.onnx.export(traced.program, (), verbose=False, **names)
    assert made is not None
    model = made.model_proto
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, traced.metadata
    onnx.save(model, path)


def _load_onnx(path: Path) -> Runtime:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda batch: session.run(None, {name: batch})


def _openvino_model(traced: Traced) -> Any:
    import openvino

    model = openvino.convert_model(traced.program)
    if not traced.dynamic_size:
        model.reshape([-1, 3, *traced.subject.part.size])
    model.inputs[0].set_names({"images"})
    for output, name in zip(model.outputs, traced.subject.part.outputs, strict=True):
        output.set_names({name})
    model.set_rt_info(traced.metadata, [KEY])
    return model


def _write_openvino(traced: Traced, path: Path) -> None:
    import openvino

    openvino.save_model(_openvino_model(traced), path, compress_to_fp16=False)


def _write_openvino_int8(traced: Traced, path: Path) -> None:
    import nncf
    import openvino

    if not traced.calibration:
        raise UserError("int8 needs pictures to calibrate on: name a folder with --calibration DIR")
    # not as ModelType.TRANSFORMER: its smooth quantization made the error several times larger on a trained network
    dataset = nncf.Dataset(traced.calibration)
    model = nncf.quantize(_openvino_model(traced), dataset, subset_size=len(traced.calibration))
    model.set_rt_info(traced.metadata, [KEY])
    openvino.save_model(model, path, compress_to_fp16=False)


def _load_openvino(precision: str) -> Callable[[Path], Runtime]:
    def load(path: Path) -> Runtime:
        compiled = compiled_for_openvino(path, precision)
        return lambda batch: [np.array(part) for part in compiled(batch).values()]

    return load


def _write_torch(traced: Traced, path: Path) -> None:
    torch.export.save(traced.program, path, extra_files={f"{KEY}.json": traced.metadata})


def _load_torch(path: Path) -> Runtime:
    return _runtime(torch.export.load(path).module())


def _write_aotinductor(traced: Traced, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    settings = {"aot_inductor.metadata": {KEY: traced.metadata}}
    aoti_compile_and_package(traced.program, package_path=str(path), inductor_configs=settings)


def _load_aotinductor(path: Path) -> Runtime:
    from torch._inductor import aoti_load_package

    return _runtime(aoti_load_package(str(path)))


def _runtime(program: Any) -> Runtime:
    def run(batch: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            found = program(torch.from_numpy(batch))
        return [part.numpy() for part in (found if isinstance(found, (tuple, list)) else (found,))]

    return run


OPENVINO = ("openvino",)
FORMATS = {
    format.name: format
    for format in (
        Format("onnx", "model.onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _load_onnx, 1e-4),
        Format("openvino", "model.xml", OPENVINO, _write_openvino, _load_openvino("f32"), 1e-4),
        Format("openvino-bf16", "model.bf16.xml", OPENVINO, _write_openvino, _load_openvino("bf16"), 0.1),
        Format(
            "openvino-int8", "model.int8.xml", (*OPENVINO, "nncf"), _write_openvino_int8, _load_openvino("f32"), 0.3
        ),
        Format("torch", "model.pt2", (), _write_torch, _load_torch, 1e-4),
        Format("aotinductor", "model.aoti.pt2", (), _write_aotinductor, _load_aotinductor, 1e-4),
    )
}
