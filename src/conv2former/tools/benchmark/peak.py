"""What a machine can do at most, measured."""

from __future__ import annotations

import time

import torch
from torch.nn import functional as F

SIDE = {"cpu": 2048, "cuda": 8192}
TIMES = 5


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds per second of a product of square matrices, the best of several.

    On a CPU also as a 1x1 convolution, which another library computes: on some processors at twice the rate. (On a GPU
    that would be TF32.)
    """
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    x = a.view(1, side // 32, 32, side).permute(0, 3, 1, 2)  # channels last
    seconds = []
    products = [lambda: a @ b, lambda: F.conv2d(x, b[:, :, None, None])]
    for product in products[: 2 if device.type == "cpu" else 1]:
        for i in range(1 + TIMES):
            started = time.perf_counter()
            product()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i:
                seconds.append(time.perf_counter() - started)
    return side**3 / min(seconds)
