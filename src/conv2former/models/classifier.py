"""The head of the networks: the released network's classifier, of which the paper says nothing."""

from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

from conv2former.models.fused import fusable_head
from conv2former.models.layers import Layer, LayerNorm, init_weights
from conv2former.ops import head

torch.fx.wrap("head")  # a fused head stays one operation in a symbolic trace


class Head(nn.Module):
    """Classifier: 1x1 convolution to ``hidden_size``, GELU, LayerNorm, global pooling, dropout, linear.

    Without classes (0) there is no linear layer. ``hidden_size`` is the width of the 1x1 convolution, 1280 in the
    released network. ``pool_type`` is a pooling of timm's, or '' for none: the output is then (B, classes, H, W).
    """

    fused = False  # see `fuse`

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        hidden_size: int,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        norm_layer: Layer = LayerNorm,
        act_layer: Layer = nn.GELU,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.hidden_size = hidden_size
        self.conv: Any = nn.Linear(in_features, hidden_size)
        self.act: nn.Module = act_layer()
        self.norm: Any = norm_layer(hidden_size)
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type)

    def reset(self, num_classes: int, pool_type: str | None = None, *, reset_other: bool = False) -> None:
        """Makes a new linear layer, and a new pooling where ``pool_type`` is given.

        ``reset_other`` takes out the convolution and its norm too, so that the head passes its input through.
        """
        if pool_type is not None:
            self.global_pool = SelectAdaptivePool2d(
                pool_type=pool_type, flatten=bool(pool_type), input_fmt="NHWC" if pool_type else "NCHW"
            )
        if reset_other:
            self.conv, self.act, self.norm = nn.Identity(), nn.Identity(), nn.Identity()
        width = self.hidden_size if isinstance(self.conv, nn.Linear) else self.in_features
        self.num_features = width * self.global_pool.feat_mult()
        if num_classes > 0:
            self.fc: Any = nn.Linear(self.num_features, num_classes)
            init_weights(self.fc)
        else:
            self.fc = nn.Identity()
        self.train(self.training)  # the new modules too

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C4, H, W) -> (B, num_classes); with ``pre_logits`` (B, hidden_size); unpooled (B, ..., H, W)."""
        x = x.permute(0, 2, 3, 1)
        if not torch.jit.is_scripting():  # noqa: SIM102  see `conv2former.ConvMod`
            if self.fused and not pre_logits and fusable_head(self):
                conv, norm, fc = self.conv, self.norm, self.fc
                return head(x, conv.weight, conv.bias, norm.weight, norm.bias, fc.weight, fc.bias, norm.eps)
        x = self.norm(self.act(self.conv(x)))
        x = self.drop(self.global_pool(x))
        if not pre_logits:
            x = self.fc(x)
        return x.permute(0, 3, 1, 2) if self.global_pool.is_identity() else x

    @torch.jit.ignore
    def fuse(self) -> "Head":
        """In evaluation it is one operation from now on, as long as it is the paper's head (``fusable_head``)."""
        self.fused = True
        return self
