"""What of a trained model can be exported, what goes into it, and how its outputs are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

Arrays = Sequence[np.ndarray]


@dataclass(frozen=True)
class OneImage:
    """How a network is used that takes one image at a time, and more than its pixels.

    Attributes:
        inputs: Names of what it takes.
        feed: A normalised image (3, h, w) -> the inputs.
        reference: The inputs -> what PyTorch's own model makes of them, in the form of the outputs.
        compare: Outputs of ``reference`` and of the exported file -> the largest difference (infinite where a shape
            differs or a number is not finite), how many answers both give, and how many at least one gives.
    """

    inputs: list[str]
    feed: Callable[[np.ndarray], list[np.ndarray]]
    reference: Callable[..., list[np.ndarray]]
    compare: Callable[[Arrays, Arrays], tuple[float, int, int]]


@dataclass
class Exportable:
    """The part of a model that other runtimes can take.

    Attributes:
        network: Normalised images (B, 3, H, W) of float32 -> one tensor for each of ``outputs``. With ``one`` it takes
            what that says.
        outputs: Their names; ``logits`` are compared by the top class, too.
        size: (H, W) that it takes.
        resize: Image to image of that size; with ``one`` to one that is not larger.
        config: What a user of the file has to know of the preprocessing, beside the size.
        part: What of the model this is, where it is not all.
        note: What of the model is left out, and why.
        one: For a network that takes one image at a time; None for one that takes batches.
        any_size: Whether a file can take images of any size.
        in_onnx: More of the model, which ONNX can say and most other formats cannot; None where there is no more.
    """

    network: nn.Module
    outputs: list[str]
    size: tuple[int, int]
    resize: Callable[[Image.Image], Image.Image]
    config: dict[str, Any] = field(default_factory=dict)
    part: str = ""
    note: str = ""
    one: OneImage | None = None
    any_size: bool = True
    in_onnx: Exportable | None = None
