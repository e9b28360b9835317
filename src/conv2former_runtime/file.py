"""The file of a network: safetensors, whose header describes the network, and whose tensors are packed weights.

Weights are packed in the order that one kind of processor reads (``packing``), so that they are used where the file is
mapped, and processes share them. A processor of another kind packs them anew.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from conv2former_runtime.errors import UserError
from conv2former_runtime.packing import (
    ALIGNMENT,
    Array,
    Layout,
    Part,
    block_parts,
    downsample_parts,
    head_parts,
    layout,
    stem_parts,
)

KEY = "conv2former_runtime"  # of the header's metadata
VERSION = 1
MAX_HEADER = 16 << 20  # bytes
MAX_SIDE = 1 << 16  # of any size in a description
DTYPES = ("float32", "bfloat16")
MAX_KERNEL = 21  # of a modulation
MAX_IMAGE = 4096  # side of images that are prepared, pixels
SIZES = dict(stem=3, patches=3, blocks=3, downsample=2, head=3)  # how many each layer has
EPS = ("blocks", "downsample", "head")
FIRST = ("stem", "patches")  # layers that take an image
LAYOUTS = [Layout(lanes, 2 * lanes, together) for lanes in (4, 8, 16) for together in (1, 2)]
_NAMES = {"U8": np.uint8, "F32": np.float32}

_log = logging.getLogger("conv2former")


def step_parts(step: Mapping[str, Any]) -> list[list[Part]]:
    """How the tensors of a step of the network are packed; a step of no packed weights has none."""
    sizes = step["sizes"]
    if step["op"] == "blocks":
        return [part for _ in range(step["count"]) for part in block_parts(*sizes)]
    known: dict[str, Any] = dict(stem=stem_parts, downsample=downsample_parts, head=head_parts)
    return [known[step["op"]](*sizes)] if step["op"] in known else []


def write(path: Path, description: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
    """Writes a file; the description is JSON, and each tensor begins at a multiple of ``ALIGNMENT`` bytes.

    Raises:
        OSError: It cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {KEY: json.dumps(description)}}
    kinds, end = {np.dtype(kind): name for name, kind in _NAMES.items()}, 0
    for name, array in tensors.items():
        assert array.nbytes % ALIGNMENT == 0, name
        header[name] = dict(dtype=kinds[array.dtype], shape=array.shape, data_offsets=[end, end + array.nbytes])
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).data)


def is_network(path: Path) -> bool:
    """Whether a file has the header of one."""
    try:
        return KEY in _header(path)[0]["__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def read(path: Path) -> tuple[dict[str, Any], list[list[Array]]]:
    """The description and, for each step, its weights, mapped.

    Raises:
        UserError: It is no such file, or a damaged one.
    """
    try:
        header, start = _header(path)
        description = json.loads(header["__metadata__"][KEY])
        if description["version"] != VERSION:
            raise UserError(f"{path} was written by another version of conv2former: export it again")
        _check(description)
        data = np.memmap(path, np.uint8, "r", offset=start) if os.path.getsize(path) > start else np.empty(0, np.uint8)
        arrays = [
            [_tensor(data, header[f"{i}.{j}"]) for j in range(_count(step))]
            for i, step in enumerate(description["steps"])
        ]
        return description, _for_here(description, arrays, path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as error:
        # whatever is wrong with a file that anybody may have made
        hint = "give a file that `conv2former export RUN --format runtime --out FOLDER` has written"
        if str(path).endswith(".onnx"):
            hint = "run it with ONNX Runtime, as examples/onnx_classify.py does, or " + hint
        raise UserError(f"{path} is no network for this runtime, or a damaged one ({error}): {hint}") from None


def _header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= MAX_HEADER:
            raise ValueError("its header is too long or missing")
        text = file.read(size)
    if len(text) < size:
        raise ValueError("it is cut off")
    return json.loads(text), 8 + size


def _count(step: Mapping[str, Any]) -> int:
    """Tensors of a step."""
    return len(step_parts(step)) or 1


def _tensor(data: Array, entry: Mapping[str, Any]) -> Array:
    kind, (begin, end), shape = _NAMES[entry["dtype"]], entry["data_offsets"], entry["shape"]
    if not 0 <= begin <= end <= data.size or math.prod(shape) * np.dtype(kind).itemsize != end - begin:
        raise ValueError("its tensors are not where it says")
    found = data[begin:end]
    if found.ctypes.data % ALIGNMENT:
        raise ValueError("its tensors are not aligned")
    return found.view(kind).reshape(shape)


def _for_here(description: Mapping[str, Any], arrays: list[list[Array]], path: Path) -> list[list[Array]]:
    """The weights of each step in the order of this processor's kernels.

    Raises:
        ValueError: There are more or fewer, or they are of another kind.
    """
    here, there = layout(description["dtype"] == "bfloat16"), Layout(**description["layout"])
    if here != there:
        _log.warning(f"{path} was written for another kind of processor: its weights are packed anew, in memory")
    return [
        _step_for_here(step, tensors, here, there) for step, tensors in zip(description["steps"], arrays, strict=True)
    ]


def _step_for_here(step: Mapping[str, Any], tensors: list[Array], here: Layout, there: Layout) -> list[Array]:
    parts = step_parts(step)
    if not parts:  # the weights of `patches` are not packed
        ins, side, outs = step["sizes"]
        spare = tensors[0].size - (ins * side**2 + 1) * outs  # numbers that fill the tensor up
        sound = tensors[0].dtype == np.float32 and 0 <= spare < ALIGNMENT
    else:
        sound = all(
            tensor.dtype == np.uint8 and tensor.shape == (there.size(part),)
            for part, tensor in zip(parts, tensors, strict=True)
        )
    if not sound:
        raise ValueError("its weights are not those of its network")
    if here != there:
        tensors = [
            here.pack(part, list(there.unpack(part, tensor))) for part, tensor in zip(parts, tensors, strict=True)
        ] or tensors
    return tensors


def describe(dtype: str, steps: Sequence[Mapping[str, Any]], **facts: Any) -> dict[str, Any]:
    """The description of a network whose weights are packed for this processor."""
    return dict(version=VERSION, dtype=dtype, layout=asdict(layout(dtype == "bfloat16")), steps=steps, **facts)


def _check(description: Mapping[str, Any]) -> None:
    """Raises ValueError or KeyError where the kernels would read or write beyond their arrays, or images be refused."""
    if description["dtype"] not in DTYPES or Layout(**description["layout"]) not in LAYOUTS:
        raise ValueError("its numbers are of an unknown kind")
    channels, stride = None, 1
    for step in description["steps"]:
        op, sizes = step["op"], step["sizes"]
        if op not in SIZES:
            raise ValueError(f"it has a layer {str(op)[:40]!r}")
        if len(sizes) != SIZES[op] or not all(_is_size(size, MAX_SIDE) for size in sizes):
            raise ValueError("its sizes are out of range")
        if (channels is None) != (op in FIRST) or channels not in (None, sizes[0]):
            raise ValueError("its layers do not fit each other")
        if op in EPS and not (isinstance(step["eps"], float) and 0 < step["eps"] < 1):
            raise ValueError("a normalisation has no eps")
        if op == "blocks" and not (sizes[2] % 2 and sizes[2] <= MAX_KERNEL and _is_size(step["count"], MAX_SIDE)):
            raise ValueError("its kernels are out of range")
        if op == "stem" and (len(step["strides"]) != 2 or any(each not in (1, 2, 4) for each in step["strides"])):
            raise ValueError("its strides are out of range")
        if op == "head" and (step is not description["steps"][-1] or sizes[2] != len(description["labels"])):
            raise ValueError("its classifier does not fit")
        stride *= {"stem": 2 * math.prod(step.get("strides", ())), "patches": sizes[1], "downsample": 2}.get(op, 1)
        channels = sizes[0] if op == "blocks" else sizes[-1]
    if channels is None or not _is_size(description["min_size"], MAX_SIDE) or description["min_size"] < stride:
        raise ValueError("it has no layers, or takes images that are too small for them")
    _check_preprocessing(description, description["steps"][0]["sizes"][0])


def _check_preprocessing(facts: Mapping[str, Any], channels: int) -> None:
    size, numbers = facts["input_size"], (facts["mean"], facts["std"])
    if len(size) != 3 or size[0] != channels or not all(_is_size(side, MAX_IMAGE) for side in size):
        raise ValueError("the size of its images is out of range")
    if any(
        len(each) != channels or not all(isinstance(x, float | int) and abs(x) < 1e6 for x in each) for each in numbers
    ):
        raise ValueError("its mean or std is no list of numbers")
    if min(facts["std"]) <= 0 or not 0.05 <= facts["crop_pct"] <= 1 or facts["crop_mode"] not in ("center", "squash"):
        raise ValueError("its preprocessing is out of range")
    if facts["interpolation"] not in ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"):
        raise ValueError("its interpolation is unknown")
    if not all(isinstance(label, str) for label in facts["labels"]):
        raise ValueError("its labels are no texts")


def _is_size(value: Any, most: int) -> bool:
    return type(value) is int and 1 <= value <= most
