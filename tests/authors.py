"""Our weights as the authors' program writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from conv2former.checkpoints.convert import NAMES


def authors_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``convert_authors_state_dict``, for the hierarchical networks."""
    renamed = {}
    for name, tensor in state_dict.items():
        for theirs, ours, linear in NAMES:
            module = re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(ours))
            if match := re.fullmatch(rf"{module}(?P<tail>(?:\.\w+)?)", name):
                name = theirs.format(**match.groupdict()) + match["tail"]
                tensor = tensor[:, :, None, None] if linear and match["tail"] == ".weight" else tensor
                break
        renamed[name] = tensor
    return renamed
