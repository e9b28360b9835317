"""Counts, loss and optimizer of the classification task."""

from __future__ import annotations

import random
from typing import Any, ClassVar

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from conv2former.engine.batch import plan_batch
from conv2former.engine.optim import build_optimizer, scaled_lr
from conv2former.engine.trial import try_out
from conv2former.errors import UserError
from conv2former.tasks.classification.data import NO_TARGET, Batch
from conv2former.tasks.classification.metrics import ClassificationMetric
from conv2former.tasks.classification.task import ClassificationTask
from digits import tiny_recipe


def metric(classes: int) -> ClassificationMetric:
    return ClassificationMetric([str(index) for index in range(classes)])


def test_counts_by_hand() -> None:
    """Six images in six classes: right, second, fifth, sixth place, right, and one class never seen."""
    order = torch.tensor(
        [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [3, 0, 1, 2, 4, 5]]
    )
    logits = torch.zeros(5, 6).scatter_(1, order, torch.arange(6, 0, -1.0).expand(5, 6))
    counts = metric(6)
    counts.update(logits, torch.tensor([0, 1, 4, 5, 3]))
    result = counts.compute()
    assert (result["images"], result["correct"], result["correct_top5"]) == (5, 2, 4)
    assert (result["top1"], result["top5"]) == (40.0, 80.0)
    rows = [(row["correct"], row["images"]) for row in result["per_class"].values()]
    assert rows == [(1, 1), (0, 1), (0, 0), (1, 1), (0, 1), (0, 1)]


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_counts_do_not_depend_on_the_batches(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = (
        torch.randn(101, classes, generator=generator),
        torch.randint(classes, (101,), generator=generator),
    )
    results = []
    for size in (101, 7, 1):
        counts = metric(classes)
        for first in range(0, 101, size):
            counts.update(logits[first : first + size], targets[first : first + size])
        results.append(counts.compute())
    for result in results[1:]:
        assert result.pop("loss") == pytest.approx(results[0]["loss"], rel=1e-6)
        assert result == {key: value for key, value in results[0].items() if key != "loss"}
    rank = (-logits).argsort(dim=1).argsort(dim=1)[torch.arange(101), targets]
    assert results[0]["correct"] == int((rank == 0).sum())
    assert results[0]["correct_top5"] == int((rank < 5).sum())
    assert results[0]["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)), rel=1e-5)


def test_two_processes_add_up() -> None:
    parts = [metric(3) for _ in range(2)]
    whole = metric(3)
    for seed, part in enumerate(parts):
        generator = torch.Generator().manual_seed(seed)
        logits, targets = (
            torch.randn(10 + seed, 3, generator=generator),
            torch.randint(3, (10 + seed,), generator=generator),
        )
        part.update(logits, targets)
        whole.update(logits, targets)
    merged = metric(3)
    for part in parts:  # what torchmetrics does with states of dist_reduce_fx="sum"
        merged.merge_state(part)
    assert merged.compute() == whole.compute()


def test_images_that_only_fill_up_are_not_counted() -> None:
    logits, targets = torch.randn(6, 3), torch.tensor([0, NO_TARGET, 2, 1, NO_TARGET, 0])
    masked, plain = metric(3), metric(3)
    masked.update(logits, targets)
    plain.update(logits[targets >= 0], targets[targets >= 0])
    assert masked.compute() == plain.compute() and masked.compute()["images"] == 4
    masked.update(logits[:1], torch.tensor([NO_TARGET]))  # a whole batch of them
    assert masked.compute() == plain.compute()


def test_erasing_is_done_on_the_batch() -> None:
    model = timm.create_model("conv2former_test", num_classes=4, stem_stride=2)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    task = ClassificationTask(model, tiny_recipe("augment.random_erasing=1.0"))
    pixels, targets = torch.full((2, 3, 16, 16), 128, dtype=torch.uint8), torch.tensor([0, 1])
    random.seed(0)
    task.training_step(Batch(pixels, targets, targets))
    changed = (seen[0] != task.normalizer(pixels)).any(dim=1).flatten(1).sum(dim=1)
    assert (changed >= 4).all() and (changed < 256 / 2).all()  # 2% to a third of the image


def test_mixup_keeps_the_loss_of_the_mixed_labels() -> None:
    model = timm.create_model("conv2former_test", num_classes=4, stem_stride=2)
    task = ClassificationTask(model, tiny_recipe("augment.mixup=0.8", "augment.cutmix=1.0"))
    pixels, targets = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8), torch.tensor([0, 1, 2, 3])
    images = task.normalizer(pixels)
    np.random.seed(0)
    loss = task.training_step(Batch(pixels, targets, targets))
    np.random.seed(0)
    mixed, soft = task.mixup(images.clone(), targets)
    logits = model(mixed)
    torch.testing.assert_close(loss, -(soft * logits.log_softmax(1)).sum(1).mean())
    assert torch.allclose(soft.sum(1), torch.ones(4)) and not torch.equal(mixed, images)


def test_names_of_classes_are_as_many_as_the_outputs() -> None:
    model = timm.create_model("conv2former_test", num_classes=5)
    with pytest.raises(UserError, match="2 names of classes for a model of 5"):
        ClassificationTask(model, tiny_recipe(), ["a", "b"])


class Remembering(nn.Module):
    """A network that keeps a tensor from call to call, and counts."""

    num_classes = 4
    pretrained_cfg: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.kept is None:
            self.kept = torch.ones(3, device=x.device)
        return self.head(self.norm(x).mean((2, 3)) * self.kept)


def test_the_trial_leaves_the_network_as_it_was() -> None:
    network = Remembering()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    task = ClassificationTask(network, tiny_recipe("augment.mixup=0.8"))
    try_out(task)
    assert network.kept is None and all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    batch = task.example_batch(4)
    loss = task.train().training_step(batch)
    assert type(loss) is Tensor and network.calls == 1
    with pytest.raises(UserError, match=r"cannot be trained on images of 16 x 16 pixels: .*reduction dim"):
        network.head = nn.Linear(7, 4)
        try_out(task)
    with pytest.raises(UserError, match=r"3 channels \(RGB\): leave model.args.in_chans out"):
        try_out(ClassificationTask(Remembering(), tiny_recipe("model.args={in_chans: 1}")))


def test_learning_rate_scales_with_the_effective_batch() -> None:
    recipe = tiny_recipe("optim.base_lr=1e-3", "optim.base_batch=1024", "optim.batch_size=64", "optim.accumulate=2")
    assert scaled_lr(recipe.optim, plan_batch(recipe, world=8)) == pytest.approx(1e-3)
    assert scaled_lr(recipe.optim, plan_batch(recipe, world=4)) == pytest.approx(5e-4)


def test_layer_decay_gives_earlier_blocks_smaller_rates() -> None:
    model = timm.create_model("conv2former_test")
    optimizer = build_optimizer(model, tiny_recipe("optim.layer_decay=0.5").optim, lr=1.0)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    order = [
        "stem.conv1",
        "stages.0.blocks.0.mod.w1",
        "stages.2.blocks.0.mod.w1",
        "stages.2.blocks.1.mod.w1",
        "head.fc",
    ]
    scales = [scale[id(model.get_submodule(name).weight)] for name in order]
    assert scales == sorted(scales) and len(set(scales)) == len(scales) and scales[-1] == 1.0


def test_a_task_trains_in_a_plain_loop() -> None:
    model = timm.create_model("conv2former_test", num_classes=4, stem_stride=2)
    task = ClassificationTask(model, tiny_recipe())
    pixels, numbers = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8), torch.arange(8)
    batch, before = Batch(pixels, numbers % 4, numbers), model.head.fc.weight.clone()
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    task.training_step(batch).backward()
    optimizer.step()
    assert not torch.equal(model.head.fc.weight, before)
    counts = task.eval().metric(None)
    with torch.no_grad():
        task.eval_step(batch, counts)
    assert counts.result().details["images"] == 8 and counts.result().records.indices.tolist() == list(range(8))
