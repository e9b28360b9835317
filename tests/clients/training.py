"""Libraries that train a network: what they compute is compared with plain steps of gradient descent."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from networks import OURS, SMALL, different, enlivened, gradients, images, labels, network, same, train
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from conv2former.checkpoints import save_pretrained


def accelerated_steps(name: str) -> None:
    import accelerate

    plain = network(name).train()
    expected = train(plain)
    model = network(name).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    accelerator = accelerate.Accelerator(cpu=True)
    batches: Any = [(images(), labels())] * 2
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(batches, batch_size=None))
    for (x, y), loss_before in zip(loader, expected, strict=True):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
        same(loss.item(), loss_before, "the loss")
    same(accelerator.unwrap_model(model).eval()(images()), plain.eval()(images()), "the trained network's output")


def private_gradients(name: str, *, functorch: bool = True) -> None:
    from opacus import GradSampleModule
    from opacus.validators import ModuleValidator

    model = ModuleValidator.fix(network(name).train())
    assert not ModuleValidator.validate(model, strict=False), "Opacus does not take the network"
    expected = [gradients(model, x, y) for x, y in zip(images(), labels(), strict=True)]
    sampled = GradSampleModule(copy.deepcopy(model), force_functorch=functorch)
    nn.functional.cross_entropy(sampled(images()), labels()).backward()
    for key, parameter in sampled._module.named_parameters():
        same(parameter.grad_sample, torch.stack([one[key] for one in expected]), f"the gradient of {key}", 1e-3)


def private_gradients_by_default(name: str) -> None:
    private_gradients(name, functorch=False)


def private_step(name: str) -> None:
    from opacus import PrivacyEngine
    from opacus.validators import ModuleValidator

    model = ModuleValidator.fix(network(name).train())
    expected = [gradients(model, x, y) for x, y in zip(images(), labels(), strict=True)]
    by_hand = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(images(), labels()), batch_size=4),
        noise_multiplier=0.0,  # so that the step can be computed by hand
        max_grad_norm=0.5,
        poisson_sampling=False,
        grad_sample_mode="functorch",
    )
    for x, y in loader:
        nn.functional.cross_entropy(private(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        for one in expected:  # each image's gradient, cut to the norm, and their mean
            norm = torch.stack([gradient.norm() for gradient in one.values()]).norm()
            for key, parameter in by_hand.named_parameters():
                parameter -= 0.1 * (0.5 / norm).clamp(max=1.0) * one[key] / 4
    same(private.eval()(images()), by_hand.eval()(images()), "the output after a private step", 1e-3)


def per_sample(name: str) -> None:
    from torch.func import functional_call, grad, vmap

    model = network(name)
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, (weights, buffers), (x[None],)), y[None])

    found = vmap(grad(loss), (None, 0, 0))(weights, images(), labels())
    expected = [gradients(model, x, y) for x, y in zip(images(), labels(), strict=True)]
    for key in weights:
        same(found[key], torch.stack([one[key] for one in expected]), f"the gradient of {key}", 1e-3)


def sharded(name: str) -> None:
    """Each of two processes takes half of the images, with batch norm in evaluation mode: the mean loss is the same."""
    expected = train(network(name))
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_sharded_process, (name, folder), nprocs=2)
        losses = torch.stack([torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)])
    same(losses.mean(0), torch.tensor(expected), "the loss of sharded steps")


def _sharded_process(rank: int, name: str, folder: str) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model = network(name)
    blocks = [block for stage in model.stages for block in stage.blocks]
    leaves = [module for block in blocks for module in block.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for module in [*leaves, *blocks, model]:
        fully_shard(module, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters()), "a weight is not sharded"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images()[rank::2]), labels()[rank::2])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    torch.save(torch.stack(losses), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def segmentation(name: str) -> None:
    import segmentation_models_pytorch as smp

    x = images(2, 128)
    y = (x.mean(1) > 0).long()
    encoder: dict[str, Any] = dict(encoder_name=f"tu-{name}", encoder_weights=None, classes=2, ls_init_value=1.0)
    for kind in (smp.Unet, smp.FPN, smp.PAN, smp.DeepLabV3, smp.DeepLabV3Plus):
        model: Any = enlivened(kind(**encoder)).eval()
        stride = model.encoder.output_stride
        backbone = timm.create_model(name, features_only=True, output_stride=stride, ls_init_value=1.0).eval()
        backbone.load_state_dict(model.encoder.model.state_dict())
        maps = backbone(x)
        assert maps[-1].shape[-1] == 128 // stride, f"{kind.__name__}: the last map has not the stride {stride}"
        for found, expected in zip(model.encoder(x)[-len(maps) :], maps, strict=True):
            same(found, expected, f"{kind.__name__}: a map of the encoder")
        assert model(x).shape == (2, 2, 128, 128), f"{kind.__name__}: the output has another size than the image"
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        losses = []
        for _ in range(2):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        reached = [p.grad is not None and bool(p.grad.any()) for p in model.encoder.model.parameters()]
        assert all(reached), f"{kind.__name__}: no gradient reaches a weight of the encoder"
        assert losses[1] < losses[0], f"{kind.__name__} does not learn"


def _written(name: str, folder: str) -> Any:
    """A folder in timm's layout, and the model that is in it."""
    model, names = network(name), ["red", "green", "blue", "grey"]
    if name == OURS:
        save_pretrained(model, folder, label_names=names)
    else:
        arguments = {key: value for key, value in SMALL.items() if key != "num_classes"}
        timm.models.save_for_hf(
            model, folder, model_config=dict(label_names=names), model_args=arguments, safe_serialization=True
        )
    return model


def transformers_inference(name: str) -> None:
    from transformers import AutoModelForImageClassification, pipeline

    with tempfile.TemporaryDirectory() as parent:
        folder = f"{parent}/model"
        model = _written(name, folder)
        wrapped = AutoModelForImageClassification.from_pretrained(folder).eval()
        same(wrapped(pixel_values=images()).logits, model(images()), "the logits")
        pixels = (images(1, 256)[0].clamp(-2, 2) * 63 + 127).byte().permute(1, 2, 0).numpy()
        image = Image.fromarray(pixels)
        found = pipeline("image-classification", model=folder, device="cpu")(image, top_k=4)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        scores = dict(zip(["red", "green", "blue", "grey"], model(transform(image)[None])[0].softmax(0), strict=True))
    for entry in found:
        same(entry["score"], scores[entry["label"]], "the pipeline's score", 1e-3)


def transformers_training(name: str) -> None:
    from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as parent:
        plain = _written(name, f"{parent}/model").train()
        expected = train(plain, steps=1)
        model = AutoModelForImageClassification.from_pretrained(f"{parent}/model")
        data = [dict(pixel_values=x, labels=int(y)) for x, y in zip(images(), labels(), strict=True)]
        settings = TrainingArguments(
            output_dir=f"{parent}/run",
            use_cpu=True,
            max_steps=1,
            per_device_train_batch_size=4,
            optim="sgd",
            learning_rate=0.05,
            max_grad_norm=0.0,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        result = Trainer(model=model, args=settings, train_dataset=data).train()
    same(result.training_loss, expected[0], "the loss")
    same(model.eval()(images()).logits, plain.eval()(images()), "the trained network's output")


def clip(name: str, *, projection: str = "") -> None:
    """The image tower of a CLIP, whose embedding is the network's classifier or a linear layer behind the network."""
    import open_clip

    vision = dict(timm_model_name=name, timm_pool="avg", timm_proj=projection, image_size=64)
    text = dict(context_length=8, vocab_size=64, width=32, heads=2, layers=1)
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    enlivened(model.visual).eval()
    trunk = timm.create_model(name, num_classes=0 if projection else 16).eval()
    trunk.load_state_dict(model.visual.trunk.state_dict())
    found, embedded = model.encode_image(images()), trunk(images())
    if projection:
        embedded = embedded @ model.visual.head.proj.weight.detach().T
    same(found, embedded, "the embedding")
    found.square().sum().backward()
    embedded.square().sum().backward()
    for key, parameter in trunk.named_parameters():
        same(model.visual.trunk.get_parameter(key).grad, parameter.grad, f"the gradient of {key}", 1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer.zero_grad()
    open_clip.ClipLoss()(*model(images(), torch.arange(32).view(4, 8) + 1)).backward()
    optimizer.step()
    different(model.encode_image(images()), found, "the training step")


def clip_linear(name: str) -> None:
    clip(name, projection="linear")


def fastai_learner(name: str) -> None:
    from fastai.vision.all import ImageDataLoaders, accuracy, set_seed, vision_learner

    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for part, count in (("train", 96), ("valid", 16)):
            for colour, mean in (("blue", (60, 60, 160)), ("red", (160, 60, 60))):
                (Path(folder) / part / colour).mkdir(parents=True)
                for i in range(count // 2):
                    pixels = torch.tensor(mean) + 60 * (torch.rand(64, 64, 3) - 0.5)
                    Image.fromarray(pixels.byte().numpy()).save(Path(folder) / part / colour / f"{i}.png")
        loaders = ImageDataLoaders.from_folder(folder, bs=4, num_workers=0, device=torch.device("cpu"))
        learner = vision_learner(loaders, name, pretrained=False, metrics=accuracy)
        with learner.no_bar(), learner.no_logging():
            before = [parameter.clone() for parameter in learner.model[0].model.parameters()]
            learner.fit(4, 1e-4)
            _, top1 = learner.validate()
    assert top1 >= 0.9, f"it tells two colours apart in {top1:.0%} of the images only"
    after = list(learner.model[0].model.parameters())
    moved = sum(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert moved >= 0.9 * len(after), "most of the network's weights stay as they were"
