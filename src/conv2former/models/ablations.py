"""The alternatives that the paper compares its modulation with (Fig. 4b, Table 6).

Each is a modulation layer with the parameters of ``ConvMod`` and another way of putting A and V together. The rows of
the paper are registered, the sum for every size and the others for T (``conv2former_t_sum``), so that recipes and timm
reach them by name; any other network takes the class as ``mod_layer``. The remaining axis of the paper, the kernel size
(Fig. 4a, Table 5), is an argument of the network itself.
"""

from functools import partial

import torch
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from conv2former.models.conv2former import Conv2Former, ConvMod
from conv2former.models.variants import SIZES, create_conv2former, default_cfg, register

__all__ = ["L1Mod", "LinearMod", "SigmoidMod", "SumMod"]


class WeightingMod(ConvMod):
    """Weights A and values V put together by ``combine``."""

    def combine(self, a: Tensor, v: Tensor) -> Tensor:
        """(B, H, W, C) twice -> (B, H, W, C)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return self.proj(self.combine(self.modulation_weights(x), self.w2(x)))


class SumMod(WeightingMod):
    """Element-wise sum, ``Z = A + V`` (Fig. 4b; Table 6, row 1)."""

    def combine(self, a: Tensor, v: Tensor) -> Tensor:
        return a + v


class SigmoidMod(WeightingMod):
    """A sigmoid on A, ``Z = sigmoid(A) * V`` (Table 6, row 2)."""

    def combine(self, a: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(a) * v


class L1Mod(WeightingMod):
    """L1-normalised A, ``Z = A / ||A||_1 * V`` (Table 6, row 3).

    The paper leaves the axis open. Ours is the channels of each position: what one position gets then does not depend
    on the image's size (over the positions, weights trained at 224 would shrink threefold at 384), and it is the axis
    of the network's LayerNorms. Computed in float32.
    """

    def combine(self, a: Tensor, v: Tensor) -> Tensor:
        weights = nn.functional.normalize(a.float(), p=1.0, dim=-1, eps=1e-6)
        return (weights * v).to(v.dtype)


class LinearMod(WeightingMod):
    """A scaled linearly to (0, 1], ``Z = (A - min A + eps) / (max A - min A + eps) * V`` (Table 6, row 4).

    The axis, open in the paper, is the channels of each position, for the reasons given at ``L1Mod``; eps keeps the
    least weight above 0, as the half-open interval says. Computed in float32.
    """

    def combine(self, a: Tensor, v: Tensor) -> Tensor:
        eps = 1e-6
        a = a.float()
        low, high = a.amin(dim=-1, keepdim=True), a.amax(dim=-1, keepdim=True)
        weights = (a - low + eps) / (high - low + eps)
        return (weights * v).to(v.dtype)


WEIGHTINGS: dict[str, type[ConvMod]] = {"sum": SumMod, "sigmoid": SigmoidMod, "l1": L1Mod, "linear": LinearMod}

ROWS = [(size, "sum") for size in SIZES] + [("t", weighting) for weighting in WEIGHTINGS if weighting != "sum"]

default_cfgs = generate_default_cfgs(
    {f"conv2former_{size}_{weighting}.untrained": default_cfg() for size, weighting in ROWS}
)

for _size, _weighting in ROWS:
    _class = WEIGHTINGS[_weighting]
    register(
        f"conv2former_{_size}_{_weighting}",
        partial(create_conv2former, Conv2Former),
        SIZES[_size] | dict(mod_layer=_class),
        f"Conv2Former-{_size.upper()} with ``{_class.__name__}``.",
        module=__name__,
    )
