"""What the networks' modules are made with: activations, norms, convolutions, initial values, the sizes of maps."""

import functools
from collections.abc import Callable

from timm.layers import get_act_layer, get_norm_layer, trunc_normal_
from timm.layers.trace_utils import _assert
from torch import Tensor, nn

Layer = Callable[..., nn.Module]
LayerNorm = functools.partial(nn.LayerNorm, eps=1e-6)


def check_image_size(x: Tensor, min_size: int) -> None:
    """Refuses images that would leave less than one position in the last stage (below the network's total stride)."""
    message = f"the image is smaller than {min_size} pixels, the network's total stride: resize it to at least that"
    _assert(x.shape[-2] >= min_size, message)  # two calls: `and` would be control flow, which torch.fx cannot trace
    _assert(x.shape[-1] >= min_size, message)


def channels_last(x: Tensor) -> Tensor:
    """The images (B, C, H, W) with channels last in memory. Unlike ``memory_format`` this works under ``vmap``."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def activation(layer: str | Layer | None) -> Layer:
    """What makes an activation: timm's name or a class. GELU is PyTorch's, which the fused operations know."""
    try:
        return nn.GELU if layer in (None, "gelu") else get_act_layer(layer)
    except KeyError:
        names = "a name of timm's, such as gelu, relu or silu"
        raise ValueError(f"act_layer is {layer!r}: use {names}, or a class") from None


def last_dim_norm(layer: str | Layer | None) -> Layer:
    """What makes a norm of the last dimension: a class or timm's name, but no norm of maps (B, C, H, W)."""
    names = "layernorm", "layernormfp32", "rmsnorm", "rmsnormfp32", "simplenorm", "simplenormfp32"
    if layer is None or layer == "layernorm":
        return LayerNorm
    if not isinstance(layer, str):
        return layer
    if layer not in names:
        raise ValueError(f"norm_layer is {layer!r}: use {', '.join(names)}, or a class for the last dimension")
    return functools.partial(get_norm_layer(layer), eps=1e-6)


def strides_and_dilations(stages: int, stem_stride: int, output_stride: int) -> list[tuple[int, int, tuple[int, int]]]:
    """Of each stage: total stride of its map, stride of its downsampling, dilations of that and of the blocks.

    From the output stride on, maps keep their size, and dilated kernels see as far as on smaller maps, as in timm's
    ConvNeXt. With an output stride of 32 every stage halves the map, however many there are.
    """
    if output_stride not in (8, 16, 32) or stem_stride > output_stride:
        possible = ", ".join(str(stride) for stride in (8, 16, 32) if stride >= stem_stride)
        raise ValueError(f"output_stride is {output_stride}: this network can have {possible}")
    found, reached, dilation = [], stem_stride, 1
    for i in range(stages):
        stride, before = 2, dilation
        if i and output_stride < 32 and reached >= output_stride:
            stride, dilation = 1, dilation * 2
        elif i:
            reached *= 2
        found.append((reached, stride, (before, dilation)))
    return found


def init_weights(module: nn.Module) -> None:
    """Truncated normal (std 0.02) for convolutions and linear layers, zero biases."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_path_rates(drop_path_rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Rates that rise linearly from 0 at the first block to ``drop_path_rate`` at the last, a list per stage."""
    last = max(sum(depths) - 1, 1)
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [[drop_path_rate * (start + j) / last for j in range(n)] for start, n in zip(starts, depths, strict=True)]


def depthwise_conv(dim: int, kernel_size: int, dilation: int) -> nn.Conv2d:
    """A depthwise convolution on NCHW that keeps the size of the map, which may be smaller than the kernel."""
    return nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2 * dilation, dilation=dilation, groups=dim)
