"""Settings of the engine that make training faster: what `auto` comes to, what old runs keep, what PyTorch is told."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
import yaml
from lightning.fabric.plugins.precision import MixedPrecision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from conv2former.engine import torch_settings
from conv2former.engine.launch import make_fabric, on_nvidia_gpu, world_size
from conv2former.engine.optim import build_optimizer
from conv2former.engine.run_dir import RunDir
from conv2former.engine.torch_settings import applied, check_cuda_graphs, fused_optimizer, start_lines
from conv2former.engine.train import train
from conv2former.errors import UserError
from conv2former.recipes import Recipe, load_recipe
from conv2former.tasks import task_class
from conv2former.tasks.classification.config import AugmentSection
from conv2former.tasks.classification.task import ClassificationTask
from conv2former.tools.reproduce.jobs import Job, _finished
from digits import tiny_recipe
from runs import assert_same_run, state, stopped_run
from scenes import small_detector, small_segmenter

pytestmark = pytest.mark.usefixtures("quick")


# computed before there were engine.compile=auto, engine.compile_mode and what came after them
HASHES = {
    "quickstart": "84b3e11ffda840ec",
    "cifar": "44ab944f80ce39cf",
    "imagenet1k_t": "fc66d493cd7b548e",
    "imagenet1k_ft384_b": "055279ddfddb09fa",
    "imagenet22k_l": "bd34cb91c0a0ac14",
    "coco_mask_rcnn_t": "f477a3b19390d194",
    "ade20k_upernet_t": "e5f1542b236cac13",
}
COMPILED = "b5f39d62ecc04540"  # imagenet1k_t with engine.compile=true
SINCE = ("compile_mode", "float32_matmul_precision", "cudnn_benchmark")  # settings of the engine that came later
SHORT = ("schedule.epochs=1", "schedule.warmup_epochs=0")


@pytest.mark.parametrize("name", HASHES)
def test_a_recipes_hash_is_what_it_was(name: str) -> None:
    assert load_recipe(name, overrides=["engine.compile=false"]).digest() == HASHES[name]
    assert load_recipe(name).digest() == HASHES[name], "rows of reproduce are looked up by it"


def test_a_run_of_the_earlier_finetune_keeps_its_hash() -> None:
    """What was written in that recipe, and is decided by the images today."""
    model = ["model.needs_weights=false", "model.fit_head=false", "model.drop_path_rate=0.1", "data.val_fraction=0.1"]
    augment = ["scale=[0.35,1.0]", "auto_augment=rand-m7-mstd0.5-inc1", "random_erasing=0.1", "label_smoothing=0.1"]
    optim = ["base_lr=2e-4", "batch_size=64", "layer_decay=0.8", "head_lr=1", "ema_decay=null"]
    schedule = ["schedule.epochs=30", "schedule.warmup_epochs=3", "model.freeze_batchnorm=false"]
    settings = [*model, *(f"augment.{value}" for value in augment), *(f"optim.{value}" for value in optim), *schedule]
    recipe = load_recipe("finetune", overrides=settings)
    assert set(recipe.auto) <= {"data.mean", "data.std"} and recipe.digest() == "88182bf777488c83"


def test_what_differs_from_before_changes_the_hash() -> None:
    compiled = load_recipe("imagenet1k_t", overrides=["engine.compile=true"])
    assert compiled.digest() == COMPILED
    other = load_recipe("imagenet1k_t", overrides=["engine.compile=true", "engine.compile_mode=max-autotune"])
    assert other.digest() not in (COMPILED, HASHES["imagenet1k_t"])
    for setting in ("engine.float32_matmul_precision=high", "engine.cudnn_benchmark=true"):
        assert load_recipe("quickstart", overrides=[setting]).digest() != HASHES["quickstart"]


def test_a_run_from_before_these_settings_resumes(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_run(tiny_recipe(), data, tmp_path / "run", monkeypatch)
    path = tmp_path / "run" / "recipe.yaml"
    raw = yaml.safe_load(path.read_text())
    for key in SINCE:
        del raw["engine"][key]
    path.write_text(yaml.safe_dump(raw))
    train(tiny_recipe(), data=None, out=tmp_path / "run", resume=True)
    assert_same_run(finished, tmp_path / "run")


def test_auto_is_on_with_an_nvidia_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(accelerator: str) -> bool:
        return on_nvidia_gpu(load_recipe("quickstart", overrides=[f"engine.accelerator={accelerator}"]))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not found("auto") and not found("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    assert found("auto") and found("cuda") and not found("cpu")
    monkeypatch.setattr(torch.version, "hip", "6.4")  # AMD's GPUs go by the name of CUDA, too
    assert not found("auto")


def test_auto_is_off_on_a_cpu_and_the_run_says_so(
    finished: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe("engine.compile=auto", "engine.compile_mode=max-autotune")
    train(recipe, data=data, out=tmp_path / "run")
    lines = [line for line in capfd.readouterr().err.splitlines() if "engine.compile" in line]
    assert lines == ["engine.compile=auto is off: the run is not on an NVIDIA GPU, so nothing is compiled"]
    own = RunDir(tmp_path / "run").recipe()
    assert own == tiny_recipe()
    assert RunDir(tmp_path / "run").facts()["recipe_hash"] == tiny_recipe().digest()
    assert_same_run(finished, tmp_path / "run")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What modules are told to compile with, instead of compiling."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: calls.append(options))
    return calls


def test_a_run_goes_on_with_what_auto_came_to(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    compiled: list[dict[str, Any]],
) -> None:
    """Started where there is a GPU, as far as a CPU can tell, and continued where there is none."""
    recipe = tiny_recipe("engine.compile=auto")
    with monkeypatch.context() as patch:
        patch.setattr("conv2former.engine.train.on_nvidia_gpu", lambda recipe: True)
        stopped_run(recipe, data, tmp_path / "run", monkeypatch)
    assert "engine.compile=auto is on" in capfd.readouterr().err
    assert RunDir(tmp_path / "run").recipe() == tiny_recipe("engine.compile=true")
    train(recipe, data=None, out=tmp_path / "run", resume=True)
    assert "engine.compile=auto" not in capfd.readouterr().err, "nothing is decided a second time"
    assert RunDir(tmp_path / "run").recipe().engine.compile is True
    assert compiled == [dict(mode="default")] * 2
    assert not (tmp_path / "run" / "recipes").exists(), "the recipe has not changed"
    with pytest.raises(UserError, match=r"engine.compile: run True, given False.*--force"):
        train(tiny_recipe("engine.compile=false"), data=None, out=tmp_path / "run", resume=True)


@pytest.mark.parametrize("setting", ["engine.compile=true", "engine.compile=false"])
def test_reproduce_knows_its_runs_whatever_auto_came_to(finished: Path, tmp_path: Path, setting: str) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").write_text(tiny_recipe(setting).to_yaml())
    assert _finished(Job(tiny_recipe("engine.compile=auto"), None, tmp_path / "run"))
    assert not _finished(Job(tiny_recipe("engine.compile=auto", "engine.seed=1"), None, tmp_path / "run"))
    asked_for = Job(tiny_recipe("engine.compile=false"), None, tmp_path / "run")
    assert _finished(asked_for) == (setting == "engine.compile=false")


@pytest.mark.parametrize("recipe", [tiny_recipe, small_segmenter, small_detector])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_the_mode_reaches_the_compiler(
    recipe: Callable[..., Recipe], mode: str, compiled: list[dict[str, Any]]
) -> None:
    chosen = recipe("engine.compile=true", f"engine.compile_mode={mode}")
    model = nn.Module()
    model.backbone, model.num_classes = nn.Identity(), 2
    task_class(chosen.task)(model, chosen, ["a", "b"]).compile(mode=chosen.engine.compile_mode)
    assert compiled == [dict(mode=mode) | (dict(dynamic=True) if recipe is small_detector else {})]


def test_a_mode_without_the_compiler_is_refused() -> None:
    with pytest.raises(UserError, match=re.escape("engine.compile_mode=reduce-overhead requires engine.compile=true")):
        tiny_recipe("engine.compile_mode=reduce-overhead")
    assert tiny_recipe("engine.compile_mode=reduce-overhead", "engine.compile=auto").engine.compile == "auto"


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_are_refused_where_gradients_are_added_up(mode: str) -> None:
    recipe = tiny_recipe("engine.compile=true", f"engine.compile_mode={mode}")
    with pytest.raises(UserError, match=rf"engine.compile_mode={mode} uses CUDA graphs.* the 2 forward passes"):
        check_cuda_graphs(recipe, accumulate=2, device=torch.device("cuda"))
    check_cuda_graphs(recipe, accumulate=1, device=torch.device("cuda"))
    check_cuda_graphs(recipe, accumulate=2, device=torch.device("cpu"))  # which has no such graphs
    without = tiny_recipe("engine.compile=true", "engine.compile_mode=max-autotune-no-cudagraphs")
    check_cuda_graphs(without, accumulate=2, device=torch.device("cuda"))


@pytest.mark.slow  # compiles
def test_a_machine_without_a_compiler_is_one_line(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/no/such/compiler",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    with pytest.raises(UserError, match=r"no/such/compiler.*--set engine\.compile=false") as caught:
        train(tiny_recipe("engine.compile=true", *SHORT), data=data, out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    recipe = tiny_recipe("engine.compile=false", *SHORT)
    assert train(recipe, data=None, out=tmp_path / "run", resume=True, force=True) is not None


Settings = tuple[str, bool]  # precision of float32 matrix products, cuDNN's search


def settings() -> Settings:
    """What PyTorch is set to now."""
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark


@pytest.fixture
def restored() -> Iterator[None]:
    """Puts PyTorch's settings back whatever a test does to them."""
    precision, benchmark = settings()
    torch.backends.cudnn.benchmark = False  # another test may have left it on
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.benchmark = benchmark


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[Settings]]:
    """The settings that training and validation steps have met."""
    met: dict[str, set[Settings]] = dict(training_step=set(), eval_step=set())
    for name, found in met.items():
        original = getattr(ClassificationTask, name)

        def spying(*args: Any, original: Any = original, found: set[Settings] = found) -> Any:
            result = original(*args)
            # neither the trial before the first step nor the report at the end
            if not isinstance(result, FakeTensor) and not torch.is_inference_mode_enabled():
                found.add(settings())
            return result

        monkeypatch.setattr(ClassificationTask, name, spying)
    return met


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(("before", "wanted"), [("highest", "high"), ("medium", "highest")])
def test_the_precision_of_products_is_the_recipes_and_is_put_back(
    data: Path, tmp_path: Path, seen: dict[str, set[Settings]], before: str, wanted: str
) -> None:
    torch.set_float32_matmul_precision(before)
    train(tiny_recipe(f"engine.float32_matmul_precision={wanted}", *SHORT), data=data, out=tmp_path / "run")
    assert seen == dict(training_step={(wanted, False)}, eval_step={(wanted, False)})
    assert settings() == (before, False)


@pytest.mark.usefixtures("restored")
def test_settings_are_put_back_when_a_run_fails(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: dict[str, set[Settings]]
) -> None:
    recipe = tiny_recipe("engine.float32_matmul_precision=high", "engine.cudnn_benchmark=true")
    stopped_run(recipe, data, tmp_path / "run", monkeypatch)
    # the search is for training alone
    assert seen == dict(training_step={("high", True)}, eval_step={("high", False)})
    assert settings() == ("highest", False)


@pytest.mark.usefixtures("restored")
def test_cudnn_searches_where_it_is_asked_to() -> None:
    before = settings()
    for asked in (False, True):
        with applied(tiny_recipe(f"engine.cudnn_benchmark={asked}".lower())):
            assert settings() == ("highest", asked)
        assert settings() == before
    torch.backends.cudnn.benchmark = True
    with applied(tiny_recipe()):  # what the caller has asked for stays on
        assert settings() == ("highest", True)


def test_pytorchs_newer_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses() -> str:
        raise RuntimeError("mixed use of the old and new settings")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuses)
    with pytest.raises(UserError, match=r"fp32_precision of torch.backends.*do not set it"), applied(tiny_recipe()):
        pass


@pytest.mark.parametrize(
    ("setting", "capability", "said"),
    [
        ("engine.precision=32", (8, 0), True),
        ("engine.precision=32", (7, 5), False),
        ("engine.precision=bf16", (8, 0), False),
        ("engine.float32_matmul_precision=high", (8, 0), False),
    ],
)
def test_a_gpu_run_in_float32_says_that_it_has_no_tf32(
    monkeypatch: pytest.MonkeyPatch, setting: str, capability: tuple[int, int], said: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch_settings, "fast_bfloat16", lambda: True)  # what else is said see test_habits.py
    recipe = tiny_recipe(setting)
    lines = start_lines(recipe, recipe, torch.device("cuda"))
    assert len(lines) == said and all("--set engine.float32_matmul_precision=high" in line for line in lines)
    assert start_lines(recipe, recipe, torch.device("cpu")) == []


@pytest.mark.parametrize(
    ("device", "settings", "fused"),
    [
        ("cuda", ("engine.precision=32", "optim.clip_grad=1"), True),
        ("cuda", ("engine.precision=bf16", "optim.clip_grad=1"), True),
        ("cuda", ("engine.precision=16",), True),
        ("cuda", ("engine.precision=16", "optim.clip_grad=1"), False),
        ("cpu", ("engine.precision=32",), False),
    ],
)
def test_which_runs_have_a_fused_optimizer(device: str, settings: tuple[str, ...], fused: bool) -> None:
    assert fused_optimizer(tiny_recipe(*settings), torch.device(device)) == fused


def test_lightning_refuses_what_we_leave_unfused() -> None:
    """The reason for one of the rows above, which a later Lightning may take away."""
    optimizer = build_optimizer(nn.Linear(2, 2), tiny_recipe().optim, lr=1.0, fused=True)
    precision = MixedPrecision("16-mixed", device="cpu")
    with pytest.raises(NotImplementedError, match="clipping"):
        precision.unscale_gradients(optimizer)


def test_the_engine_builds_it_where_it_may(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any(group["fused"] for group in state(finished)["optimizer"]["param_groups"]), "this is a CPU"
    monkeypatch.setattr("conv2former.engine.trainer.fused_optimizer", lambda recipe, device: True)
    train(tiny_recipe(*SHORT), data=data, out=tmp_path / "run")
    assert all(group["fused"] for group in state(tmp_path / "run")["optimizer"]["param_groups"])


def trained(optimizer: torch.optim.Optimizer, model: nn.Module, *, steps: int) -> list[torch.Tensor]:
    """The weights after some steps on the same numbers."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 8, generator=generator)).square().mean().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_a_checkpoint_does_not_decide_which_kernel_steps(name: str) -> None:
    """Fused on a CPU, which PyTorch can: the state of one goes into the other, both ways."""
    optim = tiny_recipe(f"optim.name={name}").optim
    results = []
    for first, second in ((False, False), (True, False), (False, True)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
        before = build_optimizer(model, optim, lr=0.01, fused=first)
        trained(before, model, steps=2)
        after = build_optimizer(model, optim, lr=0.01, fused=second)
        after.load_state_dict(before.state_dict())
        assert {bool(group["fused"]) for group in before.param_groups} == {first}
        assert {bool(group["fused"]) for group in after.param_groups} == {second}
        results.append(trained(after, model, steps=2))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("name", ["lamb", "lookahead_adamw", "nadamw"])
def test_optimizers_without_such_a_kernel_are_built_as_ever(name: str) -> None:
    model = nn.Linear(8, 8)
    optimizer = build_optimizer(model, tiny_recipe(f"optim.name={name}").optim, lr=0.01, fused=True)
    assert not any(group.get("fused") for group in optimizer.param_groups)
    before = model.weight.detach().clone()
    trained(optimizer, model, steps=1)
    assert not torch.equal(model.weight, before)


YES_AND_NO = "YAML reads yes, no, on and off as true and false"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "schedule.epochs=1:30",
            "'schedule.epochs': Input should be a valid integer, unable to parse string as an integer, got '1:30'",
        ),
        ("schedule.epochs=true", f"'schedule.epochs': {YES_AND_NO}: give a number, got True"),
        ("engine.devices=yes", f"'engine.devices': {YES_AND_NO}: give a number, got True"),
        ("optim.ema_decay=off", f"'optim.ema_decay': {YES_AND_NO}: give a number or null, got False"),
        ("augment=null", "'augment': Input should be a valid dictionary or instance of AugmentSection, got None"),
        ("data.mean=[0.5]", "'data.mean' lacks values, got [0.5]"),
        ("data.workers=100000", "'data.workers': Input should be less than or equal to 256, got 100000"),
        ("augment.ratio=[-1,2]", "augment.ratio (-1.0, 2.0) must be (least, most), above 0 and up to 100"),
        ("augment.auto_augment=rand-foo", "augment.auto_augment: 'foo' is no setting such as m9, mstd0.5 or inc1"),
    ],
)
def test_values_that_mean_something_else_are_refused(setting: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("finetune", overrides=[setting])
    assert str(caught.value) == f"recipe finetune: {message}"


def test_numbers_are_those_of_yaml_1_2() -> None:
    given = ["schedule.epochs=010", "optim.base_lr=1e-3", "engine.seed=0x10", "model.args.kernel_size=07"]
    recipe = load_recipe("finetune", overrides=given)
    found = recipe.schedule.epochs, recipe.optim.base_lr, recipe.engine.seed, recipe.model.args
    assert found == (10, 1e-3, 16, dict(kernel_size=7))
    assert recipe.schedule == load_recipe("finetune", overrides=["schedule.epochs=10"]).schedule


def test_an_empty_section_is_that_of_the_base(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\nbase: cifar\naugment:\n")
    assert load_recipe(str(tmp_path / "a.yaml")).augment == load_recipe("cifar").augment
    assert load_recipe("cifar").augment != AugmentSection()


def test_a_batch_script_of_slurm_without_srun_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number of tasks is that of the job; nobody has started the others, for which it would wait."""
    recipe = load_recipe("quickstart", overrides=["engine.devices=auto"])
    for name, value in dict(SLURM_NTASKS="2", SLURM_NNODES="1", SLURM_JOB_NAME="train.sh").items():
        monkeypatch.setenv(name, value)
    for name in ("SLURM_STEP_NUM_TASKS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="has 2 tasks, and srun has not started this process: write srun before"):
        make_fabric(recipe)
    assert world_size(recipe) == 2, "for a dry run"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")  # of srun, whose processes they are
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_NNODES", "2")
    assert world_size(recipe) == 4
    with pytest.raises(UserError, match=r"engine.nodes=1, but SLURM has started 2: add --set engine.nodes=auto"):
        world_size(load_recipe("quickstart", overrides=["engine.devices=auto", "engine.nodes=1"]))
    monkeypatch.setenv("SLURM_NNODES", "x")
    with pytest.raises(UserError, match="SLURM_NNODES=x in the environment is no number of processes"):
        world_size(recipe)
