"""One configuration's step, as a function without arguments."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.nn import functional as F

import conv2former  # noqa: F401  registers the names
from conv2former import ops
from conv2former.errors import UserError

# mode -> what must be installed for it
MODES: dict[str, tuple[str, ...]] = {
    "eager": (),
    "compile": (),
    "cudagraphs": (),
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "openvino-int8": ("nncf", "openvino"),
    "aotinductor": (),
}
EXPORTED = ("onnxruntime", "openvino", "openvino-int8", "aotinductor")  # inference on the CPU alone
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Step = Callable[[], Any]


@dataclass(frozen=True)
class Configuration:
    """What one worker measures."""

    model: str  # timm's name
    model_args: dict[str, Any]  # for timm.create_model, that the image size needs
    mode: str  # a key of MODES
    training: bool  # a training step instead of a forward pass
    dtype: str  # a key of DTYPES
    batch_size: int
    image_size: int  # side, pixels
    threads: int  # of PyTorch or of the other runtime on the CPU
    device: str
    ops: str  # the operations' backend in eager and compiled models
    fuse: bool  # whether the model is re-parameterized before inference
    named_kernels: bool = False  # whether the profiler is to see Inductor's C++ kernels by name

    @property
    def group(self) -> tuple[str, int, int]:
        """Configurations are compared with each other where they share this: dtype, batch size and image size."""
        return self.dtype, self.batch_size, self.image_size

    def label(self) -> str:
        return f"{self.model}, {self.mode}, {self.dtype}, batch size {self.batch_size}, {self.image_size} px"


def prepare(c: Configuration) -> Step:
    """Builds a model with random weights and what runs a step of it; the first steps may still compile or tune.

    Raises:
        UserError: A mode that has no code for the dtype.
    """
    torch.manual_seed(0)
    torch.set_num_threads(c.threads)
    torch.backends.cudnn.benchmark = True
    ops.set_backend("reference" if c.mode in EXPORTED else c.ops)
    model = timm.create_model(c.model, **c.model_args).to(c.device)
    images = torch.randn(c.batch_size, 3, c.image_size, c.image_size, device=c.device)
    if c.training:
        return _training_step(model, images, c)
    model = model.eval().requires_grad_(False)
    if c.fuse:
        model = reparameterize_model(model, inplace=True)
    if c.mode in EXPORTED:
        if c.mode != "aotinductor":  # as `export` writes it
            from conv2former.tools.export.channels_first import channels_first  # with pydantic, which eager needs not

            model = channels_first(model)
        make = dict(onnxruntime=_onnxruntime_step, aotinductor=_aotinductor_step).get(c.mode, _openvino_step)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing's, about sizes that are constants here
            return make(model, images, c)
    model = model.to(DTYPES[c.dtype]).to(memory_format=torch.channels_last)
    images = images.to(DTYPES[c.dtype], memory_format=torch.channels_last)
    network = _network(model, c)
    return torch.no_grad()(lambda: network(images))


def _network(model: nn.Module, c: Configuration) -> Callable[[Tensor], Tensor]:
    """The model as its mode runs it."""
    if c.mode == "eager":
        return model
    if c.mode == "cudagraphs":
        return torch.compile(model, mode="reduce-overhead")
    # inference on a CPU takes the weights for constants, which are packed beforehand
    options: dict[str, Any] = {"freezing": not c.training} if torch.device(c.device).type == "cpu" else {}
    return torch.compile(model, options=options | ({"cpp.enable_kernel_profile": True} if c.named_kernels else {}))


def _training_step(model: nn.Module, images: Tensor, c: Configuration) -> Step:
    """Forward pass, cross entropy, backward pass and a step of AdamW; bfloat16 is autocast's."""
    model = model.train().to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(c.batch_size, device=c.device)
    optimizer = torch.optim.AdamW(model.parameters())
    network = _network(model, c)

    def step() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=c.dtype == "bfloat16"):
            logits = network(images)
            loss = F.cross_entropy(logits.float(), labels % logits.shape[-1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def _openvino_step(model: nn.Module, images: Tensor, c: Configuration) -> Step:
    int8 = c.mode == "openvino-int8"
    if int8 and c.dtype != "float32":
        raise UserError("it has a precision of its own: it is measured beside float32 alone")
    import openvino

    from conv2former.checkpoints.exported import compiled_for_openvino
    from conv2former.tools.export.formats import left_in_float

    program = openvino.convert_model(model, example_input=images, input=list(images.shape))
    if int8:
        import nncf

        with contextlib.redirect_stdout(sys.stderr):  # its progress
            scope = left_in_float(model)
            program = nncf.quantize(program, nncf.Dataset([images.numpy()]), subset_size=1, ignored_scope=scope)
    settings = dict(INFERENCE_NUM_THREADS=c.threads, PERFORMANCE_HINT="LATENCY")
    compiled = compiled_for_openvino(program, "bf16" if c.dtype == "bfloat16" else "f32", **settings)
    request, array = compiled.create_infer_request(), images.numpy()
    return lambda: request.infer([array], share_inputs=True, share_outputs=True)[0]


def _aotinductor_step(model: nn.Module, images: Tensor, c: Configuration) -> Step:
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    model, images = model.to(DTYPES[c.dtype]), images.to(DTYPES[c.dtype])
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.pt2")
        aoti_compile_and_package(torch.export.export(model, (images,), strict=False), package_path=path)
        program = aoti_load_package(path)
    return lambda: program(images)


def _onnxruntime_step(model: nn.Module, images: Tensor, c: Configuration) -> Step:
    if c.dtype != "float32":
        raise UserError("ONNX Runtime has few CPU kernels for bfloat16: it is measured in float32 alone")
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = c.threads
    # else its threads wait in a loop for the next step, while another worker is being timed
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (images,), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed)[0]
