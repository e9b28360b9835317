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
        raise ValueError("its tensors lie beyond its end")
    found = data[begin:end]
    if found.ctypes.data % ALIGNMENT:
        raise ValueError("its tensors are not aligned")
    return found.view(kind).reshape(shape)


def _for_here(description: Mapping[str, Any], arrays: list[list[Array]], path: Path) -> list[list[Array]]:
    """The weights in the order of this processor's kernels; raises ValueError where there are more or fewer."""
    here, there = layout(description["dtype"] == "bfloat16"), Layout(**description["layout"])
    if here != there:
        _log.warning(f"{path} was written for another kind of processor: its weights are packed anew, in memory")
    for step, tensors in zip(description["steps"], arrays, strict=True):
        if (
            step["op"] == "patches"
            and tensors[0].size < (step["sizes"][0] * step["sizes"][1] ** 2 + 1) * step["sizes"][2]
        ):
            raise ValueError("its weights are not those of its network")
        for i, parts in enumerate(step_parts(step)):
            if tensors[i].nbytes != there.size(parts):
                raise ValueError("its weights are not those of its network")
            if here != there:
                tensors[i] = here.pack(parts, list(there.unpack(parts, tensors[i])))
    return arrays


def describe(dtype: str, steps: Sequence[Mapping[str, Any]], **facts: Any) -> dict[str, Any]:
    """The description of a network whose weights are packed for this processor."""
    return dict(version=VERSION, dtype=dtype, layout=asdict(layout(dtype == "bfloat16")), steps=steps, **facts)


def _check(description: Mapping[str, Any]) -> None:
    """Raises ValueError or KeyError where the kernels would read beyond their tensors."""
    if description["dtype"] not in DTYPES or Layout(**description["layout"]) not in LAYOUTS:
        raise ValueError("its numbers are of an unknown kind")
    channels = None
    for step in description["steps"]:
        op, sizes = step["op"], step["sizes"]
        if any(type(size) is not int or not 1 <= size <= MAX_SIDE for size in [*sizes, *step.get("strides", ())]):
            raise ValueError("its sizes are out of range")
        if (channels is None) != (op in FIRST) or channels not in (None, sizes[0]):
            raise ValueError("its layers do not fit each other")
        if op == "blocks" and (sizes[2] % 2 == 0 or sizes[2] > 21 or not 1 <= step["count"] <= MAX_SIDE):
            raise ValueError("its kernels are out of range")
        if op == "head" and step is not description["steps"][-1]:
            raise ValueError("its classifier is not its last layer")
        channels = sizes[0] if op == "blocks" else sizes[-1]
        if op not in (*FIRST, "blocks", "downsample", "head"):
            raise ValueError(f"it has a layer {op!r}")
