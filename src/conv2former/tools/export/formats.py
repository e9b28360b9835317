"""The files: how each is written, and how its own runtime reads it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.export import Dim, ExportedProgram

from conv2former.checkpoints.exported import (
    KEY,
    Runtime,
    open_runtime,
    open_torch,
    torch_runtime,
)
from conv2former.errors import failing
from conv2former.models.conv2former import Conv2Former
from conv2former.tools.export.channels_first import channels_first
from conv2former.tools.export.runtime import write_runtime
from conv2former.tools.export.subjects import Subject

Program = Callable[[], ExportedProgram]  # traced when first asked for
LEAST_OPEN = 96  # side at which a size is left open: 3 positions at stride 32, one would be taken for a constant
MAX_BATCH = 1024  # of a compiled program


@dataclass(frozen=True)
class Format:
    """A kind of file."""

    name: str  # as the user calls it
    file: str  # its name in the folder
    needs: tuple[str, ...]  # packages that must be installed
    write: Callable[[Subject, Program, Path], None]
    # largest difference to PyTorch, as a fraction of the largest value; above it the export has failed
    tolerance: float
    agreement: float = 0.99  # least fraction of equal top classes of a classifier, as ``tolerance``
    channels_first: bool = False  # the form in which it is written
    load: Callable[[Path], Runtime] = open_runtime
    onnx: bool = False  # whether it can take what only ONNX can say (``Exportable.in_onnx``)

    def files(self, folder: Path) -> list[Path]:
        """All that the export writes into a folder; the first is the one to open."""
        first = folder / self.file
        return [first, first.with_suffix(".bin")] if first.suffix == ".xml" else [first]


def trace(subject: Subject, *, first: bool) -> ExportedProgram:
    """Runs PyTorch's exporter, the batch (and perhaps the size) free; raises UserError where it cannot follow.

    With ``first`` the fused parts compute on NCHW (``channels_first``).
    """
    network = channels_first(subject.part.network) if first else subject.part.network
    size, free = subject.part.size, {0: cast(Any, Dim("batch", min=1, max=MAX_BATCH))}
    if subject.dynamic_size:
        size = max(size[0], LEAST_OPEN), max(size[1], LEAST_OPEN)
        free |= {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    example = [torch.zeros(2, 3, *size)]  # two images: a batch of one would be taken for a constant
    if one := subject.part.one:
        example = [*map(torch.from_numpy, one.feed(np.zeros((3, *size), np.float32)))]
    with failing(f"torch.export cannot follow {subject.metadata['architecture']}"):
        return torch.export.export(network, tuple(example), dynamic_shapes=None if one else (free,), strict=False)


def _write_onnx(subject: Subject, program: Program, path: Path) -> None:
    import onnx
    from onnxscript.optimizer import fold_constants, inline, remove_unused_nodes

    names: Any = dict(input_names=["images"], output_names=subject.part.outputs)
    if one := subject.part.one:
        from conv2former.tools.export.onnx_ops import translations

        names |= dict(input_names=one.inputs, custom_translation_table=translations())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # without ``optimize``, whose rewriting takes as long as all the rest and makes nothing faster in ONNX Runtime
        made = torch.onnx.export(program(), (), verbose=False, optimize=False, **names)
        assert made is not None
        inline(made.model)
        fold_constants(made.model)
        remove_unused_nodes(made.model)
    model = made.model_proto
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, json.dumps(subject.metadata)
    onnx.save(model, path)


def _write_openvino(subject: Subject, program: Program, path: Path, *, int8: bool = False) -> None:
    import openvino

    if subject.part.one:  # OpenVINO knows operators of ours by their form in ONNX
        source = path.with_name(FORMATS["onnx"].file)  # which may have been written for itself
        if not source.exists():
            _write_onnx(subject, program, source)
        model = openvino.convert_model(source)
    else:
        model = openvino.convert_model(program())
        if not subject.dynamic_size:
            model.reshape([-1, 3, *subject.part.size])
        model.inputs[0].set_names({"images"})
        for output, name in zip(model.outputs, subject.part.outputs, strict=True):
            output.set_names({name})
    if int8:
        import nncf

        # not as ModelType.TRANSFORMER: its smooth quantization made the error several times larger on a trained network
        images = [image[None] for image in subject.calibration or subject.images]
        options: Any = dict(subset_size=len(images), ignored_scope=left_in_float(subject.task.backbone))
        model = nncf.quantize(model, nncf.Dataset(images), **options)
    model.set_rt_info(json.dumps(subject.metadata), [KEY])
    openvino.save_model(model, path, compress_to_fp16=False)


def left_in_float(network: Any) -> Any:
    """What stays in float: our depthwise convolutions; OpenVINO computes such large kernels no faster in 8 bits."""
    import nncf

    types = ["GroupConvolution"] if isinstance(network, Conv2Former) else []
    return nncf.IgnoredScope(types=types, validate=False)


def _write_torch(subject: Subject, program: Program, path: Path) -> None:
    torch.export.save(program(), path, extra_files={f"{KEY}.json": json.dumps(subject.metadata)})


def _write_aotinductor(subject: Subject, program: Program, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    settings = {"aot_inductor.metadata": {KEY: json.dumps(subject.metadata)}}
    aoti_compile_and_package(program(), package_path=str(path), inductor_configs=settings)


def _load_aotinductor(path: Path) -> Runtime:
    from torch._inductor import aoti_load_package

    return torch_runtime(aoti_load_package(str(path)))


_ONNX, _OPENVINO = ("onnx", "onnxscript", "onnxruntime"), ("openvino",)
_LIKE_ONNX: Any = dict(channels_first=True, onnx=True)
_FEW_BITS: Any = dict(agreement=0.9, channels_first=True)
_write_int8, _write_half = partial(_write_openvino, int8=True), partial(write_runtime, half=True)
FORMATS = {
    format.name: format
    for format in (
        Format("onnx", "model.onnx", _ONNX, _write_onnx, 1e-4, **_LIKE_ONNX),
        Format("openvino", "model.xml", _OPENVINO, _write_openvino, 1e-4, **_LIKE_ONNX),
        Format("openvino-bf16", "model.bf16.xml", _OPENVINO, _write_openvino, 0.1, **_FEW_BITS),
        Format("openvino-int8", "model.int8.xml", (*_OPENVINO, "nncf"), _write_int8, 0.3, **_FEW_BITS),
        Format("torch", "model.pt2", (), _write_torch, 1e-4, load=open_torch),
        Format("runtime", "model.safetensors", (), write_runtime, 1e-4),
        Format("runtime-bf16", "model.bf16.safetensors", (), _write_half, 0.1, agreement=0.9),
        Format("aotinductor", "model.aoti.pt2", (), _write_aotinductor, 1e-4, load=_load_aotinductor),
    )
}
