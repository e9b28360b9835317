"""Where a trained model computes."""

from __future__ import annotations

import torch

from conv2former.errors import UserError


def pick_device(name: str = "auto") -> torch.device:
    """'auto' is the GPU where there is one.

    Raises:
        UserError: A device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"device {name!r} is not there: use --device cpu") from None
    return device
