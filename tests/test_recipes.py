"""Recipes: every shipped one builds, and no mistake in one passes silently."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml

from conv2former.errors import UserError
from conv2former.recipes import load_recipe, recipe_names
from conv2former.recipes.batch import plan_batch
from conv2former.tasks.classification import build_model, build_optimizer, build_schedule, scaled_lr


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_builds_its_model_optimizer_and_schedule(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.claim.command.startswith(f"conv2former train --recipe {name} ")
    with torch.device("meta"):
        model, _ = build_model(recipe.model, classes=list("abcdefghij"))
    optimizer = build_optimizer(model, recipe.optim, lr=scaled_lr(recipe.optim, plan_batch(recipe, world=8)))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1), parameter_name
    schedule = build_schedule(optimizer, recipe.schedule, steps_per_epoch=10)
    schedule.step_update(recipe.schedule.epochs * 10 // 2)
    assert all(
        0 < group["lr"] <= scaled_lr(recipe.optim, plan_batch(recipe, world=8)) for group in optimizer.param_groups
    )


@pytest.mark.parametrize("name", recipe_names())
def test_the_resolved_recipe_reads_back_the_same(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "resolved.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(str(path)) == recipe
    assert load_recipe(str(path)).digest() == recipe.digest()


def test_the_papers_settings() -> None:
    """Sec. 4.1, Table 10."""
    recipe = load_recipe("imagenet1k_t")
    optim, augment = recipe.optim, recipe.augment
    assert (optim.name, optim.base_lr, optim.base_batch, optim.weight_decay) == ("adamw", 1e-3, 1024, 0.05)
    assert scaled_lr(optim, plan_batch(recipe, world=8)) == 1e-3 and recipe.schedule.epochs == 300
    assert (augment.mixup, augment.cutmix, augment.label_smoothing, augment.random_erasing) == (0.8, 1.0, 0.1, 0.25)
    assert recipe.model.drop_path_rate == 0.15 and recipe.claim.paper == 83.2


def test_the_schedule_warms_up_and_falls_like_a_cosine() -> None:
    recipe = load_recipe("quickstart", overrides=["schedule.epochs=10", "schedule.warmup_epochs=2"])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2, 2))], lr=1.0)
    schedule = build_schedule(optimizer, recipe.schedule, steps_per_epoch=5)

    def rate(step: int) -> float:
        schedule.step_update(step)
        return optimizer.param_groups[0]["lr"]

    low = 1e-6
    assert [rate(0), rate(5), rate(10)] == pytest.approx([low, low + (1 - low) / 2, 1.0])
    assert rate(30) == pytest.approx(low + (1 - low) * 0.5 * (1 + math.cos(math.pi / 2)))
    assert rate(49) == pytest.approx(low + (1 - low) * 0.5 * (1 + math.cos(math.pi * 39 / 40)))
    assert rate(10) == pytest.approx(1.0), "a step's rate does not depend on the steps before"


def test_overrides_reach_every_depth() -> None:
    recipe = load_recipe(
        "quickstart",
        overrides=["optim.base_lr=2e-3", "model.args.kernel_size=9", "augment.auto_augment=null", "engine.compile=yes"],
    )
    assert recipe.optim.base_lr == 0.002  # YAML reads 2e-3 as a string
    assert recipe.model.args["kernel_size"] == 9 and recipe.model.args["stem_stride"] == 2
    assert recipe.engine.compile is True
    assert load_recipe("quickstart", overrides=["model.args.ls_init_value=1e-6"]).model.args["ls_init_value"] == 1e-6
    assert load_recipe("quickstart", overrides=["engine.precision=32"]).engine.precision == "32"


def test_the_digest_follows_the_settings_and_not_the_claim() -> None:
    recipe = load_recipe("quickstart")
    assert load_recipe("quickstart", overrides=["claim.measured=99.0"]).digest() == recipe.digest()
    assert load_recipe("quickstart", overrides=["engine.seed=1"]).digest() != recipe.digest()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=1", "unknown key 'optim.lr'; there are: name, base_lr"),
        ("optim.batchsize=1", "unknown key 'optim.batchsize'; did you mean 'batch_size'"),
        ("optimizer.name=sgd", "unknown key 'optimizer'; did you mean 'optim'"),
        ("optim.batch_size=many", "'optim.batch_size': .*valid integer.*got 'many'"),
        ("engine.devices=0", "'engine.devices': .*greater than 0, got 0"),
        ("optim.batch_size=0", "'optim.batch_size': .*greater than 0.*got 0"),
        ("schedule.warmup_epochs=20", "warmup_epochs .20.0. must be less than epochs .20."),
        ("engine.precision=fp8", "'engine.precision': .*'32', 'bf16' or '16'"),
        ("data.source=web", "'data.source'"),
        ("nonsense", "not of the form section.key=value"),
        ("optim..lr=1", "not of the form section.key=value"),
        ("name.first=x", "'name' holds a value, not a section"),
        ("model.args=[1", "the value is not YAML"),
    ],
)
def test_a_wrong_override_names_itself(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_recipe("quickstart", overrides=[override])
    assert "\n" not in str(error.value)


def test_mixing_needs_an_even_batch() -> None:
    with pytest.raises(UserError, match=r"optim.batch_size \(3\) must be even"):
        load_recipe("quickstart", overrides=["augment.mixup=0.8", "optim.batch_size=3"])


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown recipe 'quickstrat'; did you mean 'quickstart'"):
        load_recipe("quickstrat")
    with pytest.raises(UserError, match="there are: cifar"):
        load_recipe("zzz")


def test_recipe_files_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    with pytest.raises(UserError, match=r"cannot read recipe .*mine\.yaml: No such file"):
        load_recipe(str(path))
    path.write_text("name: [")
    with pytest.raises(UserError, match="is not YAML"):
        load_recipe(str(path))
    path.write_text("- a list")
    with pytest.raises(UserError, match="holds no sections"):
        load_recipe(str(path))
    raw = yaml.safe_load(load_recipe("quickstart").to_yaml())
    del raw["model"]["name"]
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=r"'model\.name' is missing"):
        load_recipe(str(path))


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text(f"name: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n")
    with pytest.raises(UserError, match="is not YAML"):
        load_recipe(str(path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (["model.name=conv2former_x"], "unknown model 'conv2former_x'; did you mean 'conv2former_"),
        (["model.args.kernel_size=4"], "model.args of conv2former_test: kernel_size is 4"),
        (["model.args.wings=2"], "model.args of conv2former_test: .*wings"),
        (["model.weights=/nowhere"], "/nowhere"),
    ],
)
def test_a_model_that_cannot_be_built(section: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(load_recipe("quickstart", overrides=section).model, classes=["a", "b", "c"])


def test_an_unknown_optimizer() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"optim\.name 'adamz'"):
        build_optimizer(model, load_recipe("quickstart", overrides=["optim.name=adamz"]).optim, lr=1.0)
