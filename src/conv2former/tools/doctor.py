"""What ``conv2former doctor`` says: what is installed, what computes the operations and why; and compiling ahead."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import timm
import torch
from huggingface_hub import constants

import conv2former  # noqa: F401  registers the names
from conv2former import ops
from conv2former.engine.machine import fast_bfloat16, machine_facts
from conv2former.errors import UserError, nearest
from conv2former.models.meta import build_on_meta
from conv2former.ops import backend
from conv2former.ops.triton import Maps
from conv2former_runtime import build, library

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "bf16", "sve")
PROCESSES = 8  # that compile, at most


def report() -> list[str]:
    """What is installed, what computes and where files are kept, one fact a line; what is slow, and why, last."""
    facts = machine_facts()
    machine, gpu = facts["machine"], torch.cuda.is_available()
    compiler = build.compiler()
    reasons = {device: _reason(device) for device in ("cpu", "cuda")[: 1 + gpu]}
    lines = [
        ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        f"{machine['system']}, {machine['cpus']} processors, {torch.get_num_threads()} threads, "
        f"GPUs: {', '.join(machine['gpus']) or 'none'}",
        f"processor: {torch.backends.cpu.get_cpu_capability()}; of {', '.join(FEATURES)} it has: "
        f"{', '.join(_features()) or 'none'}",
        f"C++ compiler: {compiler or 'none'}",
        *(f"operations on {device}: {_operations(device, why)}" for device, why in reasons.items()),
        f"compiled kernels: {reasons['cpu'] or library.built()}",
        f"downloaded weights are kept in {constants.HF_HUB_CACHE}"
        + (", and nothing is downloaded (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else ""),
    ]
    if gpu:
        lines.append(f"compiled GPU kernels are kept in {os.environ.get('TRITON_CACHE_DIR') or '~/.triton/cache'}")
    slow = [f"operations on {device} are plain PyTorch: {why}" for device, why in reasons.items() if why]
    if not gpu:
        slow.append("there is no GPU: training of large networks takes weeks")
    if not fast_bfloat16() and not gpu:
        slow.append("this processor has no fast bfloat16: engine.precision=bf16 is many times slower than 32")
    elif not {"avx512_bf16", "amx_bf16", "bf16"} & _features() and not gpu:
        slow.append("this processor does not compute in bfloat16: engine.precision=bf16 saves nothing")
    if torch.get_num_threads() < (os.cpu_count() or 1) // 2:
        slow.append(f"PyTorch uses {torch.get_num_threads()} of {os.cpu_count()} processors: see OMP_NUM_THREADS")
    return lines + [f"slow: {why}" for why in slow]


def _features() -> set[str]:
    """Those of ``FEATURES`` that Linux names."""
    try:
        words = re.search(r"^(?:flags|Features)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        return set()
    return set(FEATURES) & set(words[1].split() if words else ())


def _reason(device: str) -> str | None:
    """Why the fused operations cannot be used on a device; None where they can."""
    return backend.module(backend.BY_DEVICE[device]).unusable(torch.device(device))


def _operations(device: str, why: str | None) -> str:
    """What computes the operations, and the reason if it is not the fused code."""
    try:
        chosen = ops.backend_for(device)
    except UserError as error:
        return f"none, because {error}"
    if backend.current() != "auto":
        return f"{chosen}, because {backend.VARIABLE} says so"
    return f"{chosen}, because {why}" if why else chosen


def warm(name: str, *, size: int, dtype: str) -> str:
    """Compiles the GPU kernels that training a network of ours on images of ``size`` pixels needs; says so in a line.

    Raises:
        UserError: No such network or dtype, or no GPU that the kernels run on.
    """
    known = timm.list_models("conv2former_*")
    if name not in known:
        raise UserError(f"--warm {name}: there is no such network of ours{nearest(name, known)}")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise UserError(f"--dtype {dtype} is unknown: use bfloat16, float16 or float32")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("--warm compiles nothing under Triton's interpreter: unset TRITON_INTERPRET")
    if why := backend.module("triton").unusable(torch.device("cuda")):
        raise UserError(f"--warm needs an NVIDIA GPU that the kernels run on: {why}")
    from conv2former.ops.triton.warm import warm

    began = time.perf_counter()
    count = warm(maps(name, size=size, dtype=getattr(torch, dtype)), processes=min(PROCESSES, os.cpu_count() or 1))
    seconds = time.perf_counter() - began
    return f"{count} programs of {name} at {size} pixels in {dtype} are compiled, in {seconds:.0f} s"


def maps(name: str, *, size: int, dtype: torch.dtype) -> list[Maps]:
    """The maps of a network's stages."""
    model = build_on_meta(name)
    found = []
    for stage, info in zip(model.stages, model.feature_info[-len(model.stages) :], strict=True):
        mod, mlp = stage.blocks[0].mod, stage.blocks[0].mlp
        sizes = info["num_chs"], mlp.fc1.out_features, mod.dwconv.kernel_size[0]
        found.append(Maps(size // info["reduction"], *sizes, dtype))
    return found
