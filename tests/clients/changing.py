"""Libraries that change a network or look into it: every change must show, and be exactly what was asked for."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from networks import DEPTHWISE, OURS, depthwise, different, images, labels, network, rebuilt, same, train
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from conv2former.ops import use_backend


def offloading(name: str) -> None:
    import accelerate

    model, x = network(name), images()
    expected = model(x)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.parameters()), (
        "parameters stay where they are computed with"
    )
    same(offloaded(x), expected, "the output with offloaded parameters")
    with tempfile.TemporaryDirectory() as folder:
        places = {part: "cpu" if part == "stem" else "disk" for part, _ in model.named_children()}
        on_disk = accelerate.dispatch_model(copy.deepcopy(model), places, main_device="cpu", offload_dir=folder)
        assert any(parameter.is_meta for parameter in on_disk.parameters()), "nothing is on the disk"
        same(on_disk(x), expected, "the output with parameters on the disk")
    hooked, hook = accelerate.cpu_offload_with_hook(copy.deepcopy(model), execution_device="cpu")
    same(hooked(x), expected, "the output with a hook that offloads")
    hook.remove()


def pruning(name: str) -> None:
    model, x = network(name), images()
    before = model(x)
    convs: dict[str, Any] = dict(depthwise(model))
    for conv in convs.values():
        prune.l1_unstructured(conv, "weight", amount=0.5)
    train(model.train())
    for conv in convs.values():
        masked = conv.weight_mask == 0
        gradient = conv.weight_orig.grad
        assert gradient is not None and gradient[~masked].any(), "a pruned convolution learns nothing"
        assert masked.any() and not gradient[masked].any(), "a pruned weight has a gradient"
    model.eval()
    found = model(x)
    assert not any(conv.weight[conv.weight_mask == 0].any() for conv in convs.values()), "a pruned weight is not zero"
    plain = network(name)
    same(found, rebuilt(model, plain)(x), "the output of the pruned network")
    different(found, before, "the pruning")
    for conv in convs.values():
        prune.remove(conv, "weight")
    same(model(x), found, "the output after prune.remove")


def _normed(name: str, change: Callable[[nn.Module], nn.Module]) -> None:
    model, x = network(name), images()
    before = model(x)
    for conv in depthwise(model).values():
        change(conv)
    different(model(x), before, "the norm of the weights")
    losses = train(model.train())
    assert losses[1] < losses[0], "the network with normed weights does not learn"
    model.eval()
    found = model(x)
    same(found, rebuilt(model, network(name))(x), "the output with normed weights")
    with use_backend("reference"):
        same(found, model(x), "the output with normed weights, against plain PyTorch")


def spectral_hook(name: str) -> None:
    _normed(name, spectral_norm)


def spectral_parametrization(name: str) -> None:
    _normed(name, parametrizations.spectral_norm)


def lora_depthwise(name: str) -> None:
    import peft

    plain, x = network(name, dims=(16, 16, 32, 32)), images()
    before = plain(x)
    config = peft.LoraConfig(
        r=128, lora_alpha=128, target_modules=[DEPTHWISE[name]]
    )  # the rank is a multiple of the channels
    model = peft.get_peft_model(copy.deepcopy(plain), config)
    _train_adapters(model, len(depthwise(plain)))
    found = model.eval()(x)
    different(found, before, "the training of the adapters")
    for layer, conv in depthwise(plain).items():
        _put(plain, layer, _merged(conv, model.base_model.model.get_submodule(layer)))
    _copy_buffers(model.base_model.model, plain)
    same(found, plain(x), "the output with adapters")


@torch.no_grad()
def _merged(conv: nn.Conv2d, adapted: Any) -> nn.Conv2d:
    """A convolution of all channels, because peft's adapter mixes them. peft itself does not merge it."""
    down, up = (part["default"].weight for part in (adapted.lora_A, adapted.lora_B))
    both = torch.einsum("cr,crihw->cihw", up.flatten(1), down.unflatten(0, (conv.groups, -1)))
    merged = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding)  # type: ignore[arg-type]
    merged.weight.copy_(torch.diag_embed(conv.weight[:, 0].permute(1, 2, 0)).permute(2, 3, 0, 1))
    merged.weight += adapted.scaling["default"] * both
    merged.bias = conv.bias
    return merged


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def lora_linear(name: str) -> None:
    import peft

    plain, x = network(name), images()
    before = plain(x)
    targets = ["fc1", "fc2", *(["w1", "w2", "proj"] if name == OURS else [])]
    model = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets))
    _train_adapters(model, len(targets) * len(plain.stages))
    found = model.eval()(x)
    different(found, before, "the training of the adapters")
    with model.disable_adapter():
        _copy_buffers(model.base_model.model, plain)
        same(model(x), plain(x), "the output with adapters turned off")
    same(model.merge_and_unload()(x), found, "the output of merged adapters")


def _train_adapters(model: nn.Module, expected: int) -> None:
    """Two steps: the first reaches B alone, because B begins with zeros."""
    train(model.train(), optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5))
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    assert len(adapters) == 2 * expected, f"{len(adapters)} adapters instead of {2 * expected}"
    assert all(p.grad is not None and p.grad.any() for p in adapters), "an adapter has no gradient"


def _copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Running statistics, which training changed too."""
    found = {name.replace(".base_layer", ""): buffer for name, buffer in source.named_buffers()}
    for name, buffer in target.named_buffers():
        buffer.copy_(found[name])


def layer_activation(name: str) -> None:
    from captum.attr import LayerActivation

    model, x = network(name), images()
    block = model.stages[1].blocks[0]
    layers = [block.mod.dwconv, block.mod.act, block.mlp.dwconv] if name == OURS else [block.conv_dw, block.mlp.act]
    for layer in layers:
        seen: list[tuple[Tensor, Tensor]] = []
        handle = layer.register_forward_hook(lambda _, args, output, seen=seen: seen.append((args[0], output)))
        model(x)
        handle.remove()
        assert seen, f"a {type(layer).__name__} is not called"
        found = LayerActivation(model, layer).attribute(x)
        same(found, seen[0][1], "the layer's activation")
        same(found, layer(seen[0][0]), "the layer's activation, computed from its input")


def integrated_gradients(name: str) -> None:
    from captum.attr import IntegratedGradients

    model, x, y = network(name), images(), labels()
    start = x.roll(1, 0)
    found = IntegratedGradients(model).attribute(x, start, target=y, n_steps=200, internal_batch_size=64)
    expected = (model(x) - model(start)).gather(1, y[:, None])[:, 0]
    same(found.flatten(1).sum(1), expected, "the sum of the attributions", tolerance=0.01)
