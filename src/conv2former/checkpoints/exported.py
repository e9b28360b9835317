"""Exported files, opened by their own runtimes: what ``conv2former export`` has written is read here."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from conv2former.checkpoints.hub import find_model
from conv2former.checkpoints.schema import ExportedModel, first_fault
from conv2former.errors import UserError, attempt, failing, one_line
from conv2former.files import parse_json
from conv2former_runtime import file as runtime_file
from conv2former_runtime.model import Model

Runtime = Callable[..., list[np.ndarray]]  # (B, 3, H, W), or what else the file takes -> the outputs
KEY = "conv2former"  # of the metadata in a file
NEEDS = {".onnx": "onnxruntime", ".xml": "openvino"}


def is_exported(path: Path) -> bool:
    """Whether a path is a file that ``export`` writes, by its name and, of safetensors, its header."""
    if path.suffix in (*NEEDS, ".pt2"):
        return True
    return path.suffix == ".safetensors" and runtime_file.is_network(path)


def refuse_exported(path: Path) -> None:
    """For what needs the network itself; raises UserError."""
    if is_exported(path):
        raise UserError(f"{path} is an exported file: give the run, or the saved model, that it was made of")


def fingerprint(path: Path | str) -> str:
    """What tells weights apart: 16 digits of a SHA-256, of a saved model's or an exported file; raises UserError."""
    file, digest = Path(path) if is_exported(Path(path)) else find_model(path)[1], hashlib.sha256()
    with attempt(f"read {file}"):
        for part in (file, file.with_suffix(".bin")) if file.suffix == ".xml" else (file,):
            with part.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def open_exported(path: Path) -> tuple[dict[str, Any], Runtime]:
    """What a file says of its model, checked (``task``, ``architecture``, ``labels``, the preprocessing); its runtime.

    Raises:
        UserError: It cannot be opened, or says nothing of that kind. It is a ``.pt2``: PyTorch reads pickles in it,
            which may run code.
    """
    if path.suffix == ".pt2":
        raise UserError(f"{path} may run code when it is opened: give an .onnx, .xml or .safetensors file of the model")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if (needed := NEEDS.get(path.suffix)) and importlib.util.find_spec(needed) is None:
        raise UserError(f"{path} needs {needed}: pip install {needed}")
    with failing(f"{path} cannot be opened"):
        text, runtime = _OPEN[path.suffix](path)
    try:
        return ExportedModel.model_validate(parse_json(text)).model_dump(), runtime
    except ValidationError as error:
        raise UserError(f"{path} is not from `conv2former export`: {first_fault(error)}") from None
    except ValueError as error:
        raise UserError(f"{path} is not from `conv2former export`: {one_line(error)}") from None


def _onnx(path: Path) -> tuple[str, Runtime]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    text = session.get_modelmeta().custom_metadata_map.get(KEY, "")
    return text, lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))


def _openvino(path: Path) -> tuple[str, Runtime]:
    import openvino

    model = openvino.Core().read_model(path)
    compiled = compiled_for_openvino(model, "bf16" if path.name.endswith(".bf16.xml") else "f32")
    text = model.get_rt_info([KEY]).astype(str) if model.has_rt_info([KEY]) else ""
    return text, lambda *arrays: [np.array(output) for output in compiled(arrays).values()]


def _runtime(path: Path) -> tuple[str, Runtime]:
    model = Model(path)
    return json.dumps(model.facts), lambda batch: [found] if isinstance(found := model(batch), np.ndarray) else found


_OPEN: dict[str, Callable[[Path], tuple[str, Runtime]]] = {".onnx": _onnx, ".xml": _openvino, ".safetensors": _runtime}


def open_runtime(path: Path) -> Runtime:
    """The runtime alone of a file that was just written: whatever it raises is raised."""
    return _OPEN[path.suffix](path)[1]


def open_torch(path: Path) -> Runtime:
    return torch_runtime(torch.export.load(path).module())


def torch_runtime(program: Callable[..., Any]) -> Runtime:
    """A function of tensors as one of arrays."""

    @torch.no_grad()
    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        found = program(*map(torch.from_numpy, arrays))
        return [output.numpy() for output in (found if isinstance(found, tuple | list) else (found,))]

    return run


def compiled_for_openvino(model: Any | Path, precision: str, **settings: Any) -> Any:
    """A model of OpenVINO's, or of a file, compiled for the CPU with further properties of OpenVINO.

    Raises:
        UserError: It computes in another precision than 'f32' or 'bf16', as asked for, on this processor.
    """
    import openvino

    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision} | settings)
    taken = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if taken != precision:
        raise UserError(f"OpenVINO computes in {taken} on this processor, not in {precision}")
    return compiled


class ExportedNetwork(nn.Module):
    """What an exported file computes, in the place of PyTorch's network; it cannot be trained.

    Attributes:
        path: The file.
        facts: What it says of its model, checked.
        size: (H, W) that it takes, or one of the sizes.

    Raises:
        UserError: The file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.facts, self.runtime = open_exported(path)
        self.num_classes = len(self.facts["labels"])
        self.pretrained_cfg = self.facts | dict(label_names=self.facts["labels"])
        self.size: tuple[int, int] = self.facts["input_size"][1:]

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> logits (B, classes), of pixels (B, classes, H, W), computed on the CPU."""
        size = (images.shape[-2], images.shape[-1])
        if not self.facts["dynamic_size"] and size != self.size:
            taken, here = ("{} x {}".format(*sides) for sides in (self.size, size))
            raise UserError(
                f"{self.path} takes images of {taken} alone and here is one of {here} (height x width): export the run "
                f"with --dynamic-size, or --size {size[0]} {size[1]} where all have that size"
            )
        pixels = () if self.facts["task"] == "classification" else size
        logits = self.compute(images.float().cpu().numpy(), shapes=[(len(images), self.num_classes, *pixels)])[0]
        return logits.to(images.device)

    def compute(self, *inputs: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """The outputs, of these shapes, on the CPU; raises UserError where they are others, or the runtime fails."""
        with failing(f"{self.path} cannot be computed"):
            found = self.runtime(*map(np.ascontiguousarray, inputs))
            tensors = [torch.from_numpy(np.ascontiguousarray(output)) for output in found]
        if (given := [tuple(tensor.shape) for tensor in tensors]) != [*shapes]:
            raise UserError(f"{self.path} gives {given[:4]} and says {[*shapes]}: export the run again")
        return tensors
