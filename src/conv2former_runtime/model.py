"""A network from a file, computed by the kernels: numpy alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from conv2former_runtime import file as files
from conv2former_runtime import layers
from conv2former_runtime.errors import UserError
from conv2former_runtime.library import load
from conv2former_runtime.packing import Array, as_bfloat16, as_float, layout

Floats = npt.NDArray[np.float32]


class Model:
    """A network for inference: ``model(images)`` gives logits, or the maps of its stages where it has no classifier.

    Attributes:
        labels: Names of the classes.
        input_size: (3, H, W) of the images it was made for. It takes other sizes too.
        steps: Names of its layers.
        facts: What else the file says: the preprocessing, the architecture.

    Args:
        path: A file that ``conv2former export --format runtime`` has written.
        threads: How many compute; all processors of this process, or OMP_NUM_THREADS, unless given.

    Raises:
        UserError: No such file, or no kernels for this processor.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None) -> None:
        if isinstance(why := load(), str):
            raise UserError(f"this processor cannot run the network: {why}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads={threads}: it must be 1 or more")
        self.facts, weights = files.read(Path(path))
        self.labels: list[str] = list(self.facts["labels"])
        self.input_size: tuple[int, ...] = tuple(self.facts["input_size"])
        self.threads = threads or _threads()
        self._half = self.facts["dtype"] == "bfloat16"
        self.steps = [step["op"] for step in self.facts["steps"]]
        steps = zip(self.facts["steps"], weights, strict=True)
        self._steps = [(step, self._as_layers_take_them(step, tensors)) for step, tensors in steps]

    def __call__(self, images: Floats) -> Any:
        """Normalised images (B, 3, H, W) -> logits (B, classes), or a list of maps (B, C, H / stride, W / stride).

        Raises:
            ValueError: The images have another shape, or are too small for the network.
        """
        found: list[Floats] = list(self._run(images, maps=self.steps[-1] != "head"))
        return found[0] if self.steps[-1] == "head" else found

    def features(self, images: Floats) -> list[Floats]:
        """The map (B, C, H / stride, W / stride) behind each stage."""
        return list(self._run(images, maps=True))

    def _run(self, images: Floats, *, maps: bool) -> Iterator[Floats]:
        """The maps behind the stages, or the logits alone."""
        if images.ndim != 4 or images.shape[1] != self._steps[0][0]["sizes"][0]:
            raise ValueError(f"images must be (B, {self._steps[0][0]['sizes'][0]}, H, W), not {images.shape}")
        least = self.facts["min_size"]
        if min(images.shape[2:]) < least:
            raise ValueError(f"images of {images.shape[2]} x {images.shape[3]} pixels: the network needs {least}")
        x = self._numbers(np.ascontiguousarray(images.transpose(0, 2, 3, 1), np.float32))
        for step, weights in self._steps:
            if step["op"] == "head" and maps:
                return
            x = _STEPS[step["op"]](self, x, step, weights)
            if step["op"] == "blocks" and maps:
                yield np.ascontiguousarray(as_float(x).transpose(0, 3, 1, 2))
        if not maps:
            yield as_float(x)

    def _as_layers_take_them(self, step: Mapping[str, Any], tensors: list[Array]) -> list[Array]:
        """A tensor for each branch of the blocks; of other layers, whose weights lie in one tensor, each by itself."""
        parts = files.step_parts(step)
        return layout(self._half).views(parts[0], tensors[0]) if len(parts) == 1 else tensors

    def _numbers(self, x: Floats) -> Array:
        return as_bfloat16(x) if self._half else x

    # ---- the layers, on maps (B, H, W, C)

    def _stem(self, x: Array, step: Mapping[str, Any], weights: Sequence[Array]) -> Array:
        _, mid, outs = step["sizes"]
        out = self._empty(*layers.stem_shape(x.shape, outs, step["strides"]))
        layers.stem(x, weights, out, half=self._half, mid=mid, strides=step["strides"], threads=self.threads)
        return out

    def _patches(self, x: Array, step: Mapping[str, Any], weights: Sequence[Array]) -> Array:
        """The embedding of the isotropic networks by one convolution: each patch by itself."""
        ins, side, outs = step["sizes"]
        rows, columns = x.shape[1] // side, x.shape[2] // side
        x = as_float(x)[:, : rows * side, : columns * side].reshape(len(x), rows, side, columns, side, ins)
        patches = x.swapaxes(2, 3).reshape(len(x), rows, columns, -1)
        weight, bias, _ = np.split(weights[0].ravel(), np.cumsum([side * side * ins * outs, outs]))
        return self._numbers(patches @ weight.reshape(-1, outs) + bias)

    def _blocks(self, x: Array, step: Mapping[str, Any], weights: Sequence[Array]) -> Array:
        _, hidden, kernel_size = step["sizes"]
        out, between = self._empty(*x.shape), self._empty(*x.shape)
        sizes: dict[str, Any] = dict(hidden=hidden, kernel_size=kernel_size, eps=step["eps"])
        layers.blocks(x, weights, between, out, half=self._half, **sizes, threads=self.threads)
        return out

    def _downsample(self, x: Array, step: Mapping[str, Any], weights: Sequence[Array]) -> Array:
        out = self._empty(len(x), x.shape[1] // 2, x.shape[2] // 2, step["sizes"][1])
        layers.downsample(x, weights, out, half=self._half, eps=step["eps"], threads=self.threads)
        return out

    def _head(self, x: Array, step: Mapping[str, Any], weights: Sequence[Array]) -> Array:
        _, hidden, classes = step["sizes"]
        out = self._empty(len(x), classes)
        layers.head(x, weights, out, half=self._half, hidden=hidden, eps=step["eps"], threads=self.threads)
        return out

    def _empty(self, *shape: int) -> Array:
        return np.empty(shape, np.uint16 if self._half else np.float32)


def _threads() -> int:
    """OMP_NUM_THREADS, or the processors of this process."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_STEPS: dict[str, Callable[..., Array]] = dict(
    stem=Model._stem, patches=Model._patches, blocks=Model._blocks, downsample=Model._downsample, head=Model._head
)
