"""A training step asks the device for one number, when all of its work is launched: every other question would wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from conv2former.engine import trainer as engine
from conv2former.engine.train import train
from conv2former.recipes import Recipe
from conv2former.tasks.classification.task import ClassificationTask
from digits import tiny_recipe
from runs import EVERYTHING
from scenes import small_segmenter, write_pairs

pytestmark = pytest.mark.usefixtures("quick")

# whose answer a program on a GPU has to wait for; an index by a mask is one more
WAITING = {
    *("aten._local_scalar_dense", "aten.item", "aten.is_nonzero", "aten.equal", "aten.nonzero", "aten.masked_select"),
    *("aten._unique2", "aten.unique_consecutive", "aten.unique_dim", "aten.bincount", "aten.repeat_interleave"),
}
INDEXING = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"}
METHODS = {"cpu", "numpy", "tolist"}  # which a tensor on the CPU answers without an operation
ASKED = "tolist"
STEP = ["schedule.epochs=1", "schedule.warmup_epochs=0", "optim.clip_grad=1"]


class Operations(TorchDispatchMode):
    """Notes the operations that would wait; ``optimizer`` keeps its counters on the CPU, whatever the device."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__()
        self.optimizer, self.on = optimizer, True
        self.noted: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        masks = name in INDEXING and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if self.on and (name in WAITING or masks) and not self._is_counter(args[0]):
            self.noted.append(name)
        return func(*args, **kwargs or {})

    def _is_counter(self, tensor: Tensor) -> bool:
        return any(tensor is state.get("step") for state in self.optimizer.state.values())


class Methods(TorchFunctionMode):
    """Notes the methods that would wait."""

    def __init__(self, operations: Operations) -> None:
        super().__init__()
        self.operations = operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.operations.on and getattr(func, "__name__", "") in METHODS:
            self.operations.noted.append(func.__name__)
        return func(*args, **kwargs or {})


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What each training step of the test notes between its forward pass and the end of the optimizer's step."""
    found: list[list[str]] = []
    watched: list[Operations] = []
    step, log, backward = engine.Trainer._step, engine.Trainer._log, L.Fabric.backward

    def watched_step(self: engine.Trainer, *args: Any) -> None:
        operations = Operations(self.optimizer)
        watched.append(operations)
        found.append(operations.noted)
        with operations, Methods(operations):
            step(self, *args)

    def unwatched_log(self: engine.Trainer, *args: Any) -> None:
        watched[-1].on = False  # the optimizer's step is over; every 20 steps the mean loss is fetched here
        log(self, *args)

    def noted_backward(self: L.Fabric, *args: Any, **kwargs: Any) -> None:
        watched[-1].noted.append("backward")
        backward(self, *args, **kwargs)

    monkeypatch.setattr(engine.Trainer, "_step", watched_step)
    monkeypatch.setattr(engine.Trainer, "_log", unwatched_log)
    monkeypatch.setattr(L.Fabric, "backward", noted_backward)
    return found


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_asks_whether_the_loss_is_finite_and_nothing_else(
    data: Path, tmp_path: Path, steps: list[list[str]], accumulate: int
) -> None:
    recipe = tiny_recipe(*EVERYTHING, *STEP, f"optim.accumulate={accumulate}")
    train(recipe, data=data, out=tmp_path / "run")
    assert steps == [["backward"] * accumulate + [ASKED]] * (4 // accumulate)


def test_nor_does_a_step_of_segmentation(tmp_path: Path, steps: list[list[str]]) -> None:
    recipe: Recipe = small_segmenter("schedule.epochs=1", "optim.clip_grad=1")
    train(recipe, data=write_pairs(tmp_path / "data"), out=tmp_path / "run")
    assert len(steps) > 0 and all(noted == ["backward", ASKED] for noted in steps)


QUESTIONS: dict[str, Callable[[Tensor], Any]] = dict(
    item=lambda loss: loss.item(),
    float=lambda loss: float(loss.detach()),
    branch=lambda loss: bool(loss > 0),
    cpu=lambda loss: loss.cpu(),
    tolist=lambda loss: loss.tolist(),
    equal=lambda loss: torch.equal(loss, loss),
    nonzero=lambda loss: loss[None].nonzero(),
    mask=lambda loss: loss[None][loss[None] > 0],
    finite=lambda loss: torch.isfinite(loss).all().item(),
)


def test_a_question_would_be_noted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[list[str]]
) -> None:
    """Each in a step of its own, of one run."""
    original, left = ClassificationTask.training_step, list(QUESTIONS)

    def asking(self: ClassificationTask, *args: Any) -> Tensor:
        loss = original(self, *args)
        if steps and left:  # not before the first step, where what it needs is tried out
            QUESTIONS[left.pop(0)](loss)
        return loss

    monkeypatch.setattr(ClassificationTask, "training_step", asking)
    train(tiny_recipe(*STEP, "optim.batch_size=4"), data=data, out=tmp_path / "run")
    assert len(steps) == 16 and not left
    for question, noted in zip(QUESTIONS, steps, strict=False):
        assert len(noted) == 3 and noted[1:] == ["backward", ASKED], question
    assert all(noted == ["backward", ASKED] for noted in steps[len(QUESTIONS) :])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_nothing_waits_on_a_gpu(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """PyTorch raises an error at what waits, copies from the CPU among it, but not at the event of ``Fetched``."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    step, log, watched = engine.Trainer._step, engine.Trainer._log, []

    def watched_step(self: engine.Trainer, *args: Any) -> None:
        warm = self.state.step >= 2  # the first steps load kernels and make the optimizer's state
        watched.append(warm)
        torch.cuda.set_sync_debug_mode("error" if warm else "default")
        try:
            step(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def unwatched_log(self: engine.Trainer, *args: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        log(self, *args)

    monkeypatch.setattr(engine.Trainer, "_step", watched_step)
    monkeypatch.setattr(engine.Trainer, "_log", unwatched_log)
    settings = [*EVERYTHING, *STEP, "engine.accelerator=cuda", "engine.devices=1", f"engine.precision={precision}"]
    train(tiny_recipe(*settings), data=data, out=tmp_path / "run")
    assert watched == [False, False, True, True]
