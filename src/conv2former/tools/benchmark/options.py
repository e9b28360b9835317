"""What the user asks for: checked before anything is built, then dealt into configurations."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from conv2former import ops
from conv2former.engine.devices import pick_device
from conv2former.errors import UserError, nearest, one_line
from conv2former.models import zoo
from conv2former.models.meta import build_on_meta
from conv2former.tools.benchmark.modes import DTYPES, EXPORTED, MODES, Configuration

DEFAULT_MODES = ("eager", "compile")


@dataclass(frozen=True)
class BenchmarkOptions:
    """What is to be measured."""

    models: Sequence[str]  # timm's names; the others are compared with the first
    modes: Sequence[str] = ()  # of MODES; none for eager and compile
    training: bool = False  # training steps instead of forward passes
    dtypes: Sequence[str] = ("float32",)  # of DTYPES
    batch_sizes: Sequence[int] = (8,)
    image_sizes: Sequence[int] = ()  # sides, pixels; none for the first model's own
    rounds: int = 10  # timed steps of each configuration
    threads: int | None = None  # on the CPU; None for PyTorch's own number
    device: str = "auto"
    ops: str = "auto"  # the operations' backend in eager and compiled models
    fuse: bool | None = None  # whether models are re-parameterized before inference; None for yes
    profile: bool = False  # whether one step of each eager or compiled configuration is profiled
    out: Path | None = None  # folder for files and plots


@dataclass(frozen=True)
class Plan:
    """The options, checked and dealt into configurations."""

    configurations: list[Configuration]  # in the order in which they are measured; a group's follow each other
    counts: dict[tuple[str, int], tuple[int, int]]  # parameters and one image's multiply-adds, by model and image size
    device: torch.device
    ops: str  # the backend that eager and compiled models will have there


def plan(options: BenchmarkOptions) -> Plan:
    """Checks the options.

    Raises:
        UserError: An unknown name, a package or device that is not there, a size that a model refuses, options that
            exclude each other.
    """
    models, modes = list(dict.fromkeys(options.models)), list(dict.fromkeys(options.modes or DEFAULT_MODES))
    for name in models:
        if not timm.is_model(name):
            raise UserError(f"unknown model {name!r}{nearest(name, timm.list_models())}")
    for what, names, known in (("--mode", modes, MODES), ("--dtype", options.dtypes, DTYPES)):
        for name in names:
            if name not in known:
                raise UserError(f"{what} {name!r} is unknown: use one of {', '.join(known)}")
    device = pick_device(options.device)
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"nothing is measured on {device}: use --device cpu or cuda")
    _check_modes(modes, options, device)
    if options.training and options.fuse:
        raise UserError("--fuse is for inference, training needs the network as it is: leave --fuse or --train out")
    with ops.use_backend(options.ops):
        backend = ops.backend_for(device)
    sizes = list(dict.fromkeys(options.image_sizes)) or [_own_size(models[0])]
    arguments = {(name, size): model_args(name, size) for name in models for size in sizes}
    counts = {key: _count(*key, given) for key, given in arguments.items()}
    configurations = [
        Configuration(
            model=name,
            model_args=arguments[name, size],
            mode=mode,
            training=options.training,
            dtype=dtype,
            batch_size=batch_size,
            image_size=size,
            threads=options.threads or torch.get_num_threads(),
            device=str(device),
            ops=options.ops,
            fuse=not options.training and options.fuse is not False,
            named_kernels=options.profile,
        )
        for dtype in dict.fromkeys(options.dtypes)
        for batch_size in dict.fromkeys(options.batch_sizes)
        for size in sizes
        for name in models
        for mode in modes
    ]
    return Plan(configurations, counts, device, backend)


def _check_modes(modes: Sequence[str], options: BenchmarkOptions, device: torch.device) -> None:
    for mode in modes:
        if mode in EXPORTED and options.training:
            raise UserError(f"{mode} does not train: leave --mode {mode} or --train out")
        if mode == "cudagraphs" and device.type != "cuda":
            raise UserError("CUDA graphs are recorded on an NVIDIA GPU alone: leave --mode cudagraphs out")
        if mode in EXPORTED and device.type != "cpu":
            raise UserError(f"{mode} is measured on the CPU alone: leave it out, or use --device cpu")
        if missing := [package for package in MODES[mode] if importlib.util.find_spec(package) is None]:
            raise UserError(f"--mode {mode} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if "bfloat16" in options.dtypes and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise UserError(f"{torch.cuda.get_device_name(device)} has no bfloat16: use --dtype float32")


def _own_size(name: str) -> int:
    cfg = timm.get_pretrained_cfg(name)
    return cfg.input_size[-1] if cfg else 224


def model_args(name: str, image_size: int) -> dict[str, Any]:
    """What ``timm.create_model`` must be told for images of a size: many networks with positions their ``img_size``."""
    if image_size == _own_size(name):
        return {}
    try:
        build_on_meta(name, img_size=image_size)
    except TypeError:  # a network that takes any size and has no such argument
        return {}
    except (ArithmeticError, AssertionError, ValueError) as error:
        raise _refused(name, image_size, error) from None
    return dict(img_size=image_size)


def _count(name: str, image_size: int, given: dict[str, Any]) -> tuple[int, int]:
    try:
        return zoo.count(name, image_size=image_size, **given)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError) as error:
        raise _refused(name, image_size, error) from None


def _refused(name: str, image_size: int, error: Exception) -> UserError:
    return UserError(f"{name} does not take images of {image_size} pixels, give another --size: {one_line(error)}")
