"""Files for ``conv2former_runtime``, which needs no PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from conv2former.errors import UserError
from conv2former.models.conv2former import Conv2Former
from conv2former.models.fused import FusedBlocks, FusedDownsample, FusedStem, fusable_head
from conv2former.ops.cpu.inference import branches
from conv2former.ops.cpu.packing import as_array
from conv2former.tools.export.subjects import Subject
from conv2former_runtime import file
from conv2former_runtime.library import load
from conv2former_runtime.packing import Array, as_float, layout

Step = tuple[dict[str, Any], list[list[Tensor]]]  # what the file says of a layer, and the weights of each tensor in it


def write_runtime(subject: Subject, program: Any, path: Path, *, half: bool = False) -> None:
    """Writes the fused network in float32 or, with ``half``, bfloat16.

    Raises:
        UserError: It is no classifier of ours, not fused, or there are no kernels on this machine.
    """
    network: Any = subject.part.network
    name, config = subject.metadata["architecture"], subject.part.config
    if not isinstance(network, Conv2Former):
        raise UserError(
            f"--format runtime is for classifiers on a Conv2Former, this is a {subject.task.name} model on {name}: use "
            "onnx or openvino"
        )
    if config.get("crop_mode") not in ("center", "squash"):
        raise UserError(f"--format runtime knows no crop_mode {config.get('crop_mode')!r}: use onnx or openvino")
    if isinstance(why := load(), str):
        raise UserError(f"--format runtime packs the weights for this processor, and there are no kernels: {why}")
    if half:
        network = copy.deepcopy(network).to(torch.bfloat16)
    steps = [*_steps(network, name)]
    described: list[dict[str, Any]] = []
    tensors: dict[str, Array] = {}
    for i, (step, weights) in enumerate(steps):
        for j, array in enumerate(_arrays(step, weights, half=half)):
            tensors[f"{i}.{j}"] = array
        described.append(step)
    facts = subject.metadata | dict(min_size=getattr(network.stem, "min_size", None) or network.stem.stride)
    file.write(path, file.describe("bfloat16" if half else "float32", described, **facts), tensors)


def _arrays(step: dict[str, Any], weights: Sequence[Sequence[Tensor]], *, half: bool) -> Iterator[Array]:
    parts = file.step_parts(step)
    for i, each in enumerate(weights):
        arrays = [as_array(weight) for weight in each]
        if parts:
            yield layout(half).pack(parts[i], arrays)
        else:
            flat = np.concatenate([as_float(array).ravel() for array in arrays])
            yield np.pad(flat, (0, -flat.size % file.ALIGNMENT))


def _steps(network: Any, name: str) -> Iterator[Step]:
    """The layers of a fused network; raises UserError where one is not fused."""
    yield _stem(network.stem, name)
    for stage in network.stages:
        if isinstance(down := stage.downsample, FusedDownsample):
            sizes = [down.weight.shape[1], down.weight.shape[0]]
            yield dict(op="downsample", sizes=sizes, eps=down.eps), [[down.weight, down.bias]]
        elif not isinstance(down, nn.Identity):
            raise _unlike(name, "a downsampling")
        blocks: Any = stage.blocks
        if not isinstance(blocks, FusedBlocks):
            raise _unlike(name, "a row of blocks")
        sizes = [blocks.dim, blocks.hidden, blocks.kernel_size]
        rows: list[Any] = [block.weights for block in blocks]
        weights = [branch for row in rows for branch in branches(row, *sizes)]
        yield dict(op="blocks", sizes=sizes, eps=blocks.eps, count=len(rows)), weights
    head = network.head
    if isinstance(head.fc, nn.Identity):
        return
    if not fusable_head(head):
        raise _unlike(name, "the classifier")
    parts: list[Tensor] = [
        head.conv.weight,
        head.conv.bias,
        head.norm.weight,
        head.norm.bias,
        head.fc.weight,
        head.fc.bias,
    ]
    sizes = [parts[0].shape[1], parts[0].shape[0], parts[4].shape[0]]
    yield dict(op="head", sizes=sizes, eps=head.norm.eps), [parts]


def _stem(stem: Any, name: str) -> Step:
    if isinstance(stem, FusedStem):
        weights = list(stem.weights())
        sizes = [weights[0].shape[1], weights[0].shape[0], weights[4].shape[0]]
        return dict(op="stem", sizes=sizes, strides=[stem.stride1, stem.stride2]), [weights]
    conv = getattr(stem, "proj", None)
    if not isinstance(conv, nn.Conv2d) or conv.kernel_size != conv.stride or conv.bias is None:
        raise _unlike(name, "the stem")
    outs, ins, side, _ = conv.weight.shape
    weight = conv.weight.permute(2, 3, 1, 0).reshape(-1)  # rows, columns, channels of a patch; outputs
    bias: Tensor = conv.bias
    return dict(op="patches", sizes=[ins, side, outs]), [[weight, bias]]


def _unlike(name: str, part: str) -> UserError:
    return UserError(f"--format runtime needs {name} fused, and {part} is not the paper's (or --no-fuse was given)")
