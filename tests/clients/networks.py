"""What the checks share: small networks whose every layer matters to the output, images, and comparisons."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

import conv2former  # noqa: F401  registers the names with timm

OURS, THEIRS = "conv2former_atto", "convnext_atto"
DEPTHWISE = {OURS: "dwconv", THEIRS: "conv_dw"}  # what the depthwise convolutions are called
# Narrower than 16 channels there are no fused kernels, and these are what a client must not be passed by with.
SMALL: dict[str, Any] = dict(dims=(16, 20, 24, 32), depths=(1, 1, 1, 1), ls_init_value=1.0, num_classes=4)


def network(name: str, **changes: Any) -> Any:
    """The small form of a timm model, in evaluation mode, the same at every call."""
    torch.manual_seed(0)
    return enlivened(timm.create_model(name, **SMALL | changes)).eval()


def enlivened(model: nn.Module) -> nn.Module:
    """Draws weights of a trained network's size, so that an error in any layer shows in the output."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=(parameter[0].numel()) ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.normal_(std=0.1)
    return model


def images(count: int = 4, side: int = 64) -> Tensor:
    """Random images (count, 3, side, side), the same at every call."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(2))


def labels(count: int = 4) -> Tensor:
    """A class for each image."""
    return torch.arange(count) % 4


def depthwise(model: nn.Module) -> dict[str, nn.Conv2d]:
    """All depthwise convolutions by their names."""
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    found = {name: conv for name, conv in convs.items() if 1 < conv.groups == conv.in_channels}
    assert found, "the network has no depthwise convolution"
    return found


def train(model: nn.Module, steps: int = 2, optimizer: torch.optim.Optimizer | None = None) -> list[float]:
    """Losses of some steps of gradient descent, all on the same images."""
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images()), labels())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def gradients(model: nn.Module, image: Tensor, label: Tensor) -> dict[str, Tensor]:
    """The gradients of the loss of one image."""
    loss = nn.functional.cross_entropy(model(image[None]), label[None])
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@torch.no_grad()
def rebuilt(changed: nn.Module, like: nn.Module) -> nn.Module:
    """``like`` with the weights that ``changed`` computes with, whatever makes them: masks, norms, parametrizations."""
    for name, tensor in [*like.named_parameters(), *like.named_buffers()]:
        owner, _, leaf = name.rpartition(".")
        tensor.copy_(getattr(changed.get_submodule(owner), leaf))
    return like


def same(found: Any, expected: Any, what: str, tolerance: float = 1e-4) -> None:
    """Fails where two tensors (or numbers) differ by more than this fraction of the largest expected value."""
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    assert found.shape == expected.shape, f"{what} has the shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    assert difference <= tolerance, f"{what} is wrong by {difference:.1e} of its largest value"


def different(found: Tensor, before: Tensor, what: str) -> None:
    """Fails where a change does not show."""
    difference = ((found - before).abs().max() / before.abs().max()).item()
    assert difference > 1e-3, f"{what} does not show in the output"
