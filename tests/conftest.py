"""Shared by all tests: a fixed seed, weights that look like trained ones, networks without memory."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import conv2former  # noqa: F401  registers the names
from conv2former.models import zoo
from conv2former.models.meta import SkipFilling

# The tests' tensors are small. On a busy machine more threads wait for each other: minutes instead of seconds.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
# Without a GPU, PyTorch built for one looks for its driver anew at each operation on fake tensors. Told that there is
# none, it does not. This is asked in a way that leaves a GPU as it is.
if not torch.cuda.device_count():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def fill() -> Callable[[nn.Module], nn.Module]:
    """A function that gives a network the weights of ``fill_weights`` and returns it."""
    return fill_weights


@torch.no_grad()
def fill_weights(module: nn.Module) -> nn.Module:
    """Sets all parameters and statistics by a formula, the same on every machine and in every version of PyTorch.

    At initialisation the layer scale of 1e-6 hides the blocks. Here it is 1 and every layer keeps the variance of
    its input, so that a mistake anywhere shows in the output.
    """
    for i, (name, tensor) in enumerate(module.state_dict().items()):
        if not tensor.is_floating_point():
            continue
        wave = math.sqrt(2) * torch.sin((torch.arange(tensor.numel(), dtype=torch.float64) + i + 1) ** 1.5)
        if tensor.ndim > 1:
            values = wave / math.sqrt(tensor[0].numel())
        elif name.endswith(("bias", "running_mean")):
            values = 0.1 * wave
        else:  # scales and variances
            values = 1 + 0.1 * wave
        tensor.copy_(values.view_as(tensor))
    return module


@pytest.fixture(scope="session")
def on_meta() -> Callable[..., nn.Module]:
    """A function that builds a network of full size on the meta device, by name and arguments, and keeps it.

    The tests share the network: they copy what they change. Nothing is filled: there are no values.
    """

    @functools.cache
    def build(name: str, **kwargs: Any) -> nn.Module:
        with torch.device("meta"), SkipFilling():
            return timm.create_model(name, **kwargs).eval()

    return build


@pytest.fixture(scope="session")
def counted() -> list[zoo.Row]:
    """All models with their counts."""
    return zoo.rows(variants=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 training and 16 validation images of four digits, in class folders; not to be changed."""
    from digits import write_digits  # imported here: the kernels' tests run where pydantic is not installed

    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the tiny recipe on them; not to be changed."""
    from conv2former.engine.train import train
    from digits import tiny_recipe

    out = tmp_path_factory.mktemp("runs") / "finished"
    train(tiny_recipe(), data=data, out=out)
    return out


@pytest.fixture(scope="session")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of a segmentation model, its images beside it in ``data``; not to be changed."""
    from conv2former.engine.train import train
    from scenes import small_segmenter, write_pairs

    root = tmp_path_factory.mktemp("segmenter")
    train(small_segmenter("schedule.epochs=1"), data=write_pairs(root / "data"), out=root / "run")
    return root / "run"


@pytest.fixture(scope="session")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of a detector, its images beside it in ``data``; not to be changed."""
    from conv2former.engine.train import train
    from scenes import small_detector, write_coco

    root = tmp_path_factory.mktemp("detector")
    train(small_detector("schedule.epochs=1"), data=write_coco(root / "data"), out=root / "run")
    return root / "run"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tried: dict[str, Any]) -> None:
    """Runs without what takes more time than a tiny training itself.

    The figures of a report are made but not drawn, and a network that was tried out in another test is not tried again.
    """
    from matplotlib.figure import Figure

    from conv2former.engine import train as engine
    from conv2former.engine.trial import try_out

    def try_once(task: Any) -> None:
        settings = task.recipe.model_dump(exclude={"name", "claim", "optim", "schedule", "engine"})
        engine_of = task.recipe.engine
        key = str((engine_of.strategy, engine_of.grad_checkpointing, len(task.classes), settings))
        if key not in tried:
            try_out(task)
            tried[key] = task.sharded_blocks
        task.sharded_blocks = tried[key]

    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).touch())
    monkeypatch.setattr(engine, "try_out", try_once)


@pytest.fixture(scope="session")
def tried() -> dict[str, Any]:
    """What ``try_out`` found, by recipe."""
    return {}
