"""Recipes: every shipped one builds, and no mistake in one passes silently."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from timm.layers import DropPath

from conv2former.config import Start
from conv2former.engine.automatic import choices
from conv2former.engine.batch import plan_batch
from conv2former.engine.dry_run import build_without_memory
from conv2former.engine.optim import build_optimizer, build_schedule, scaled_lr
from conv2former.errors import UserError
from conv2former.models.conv2former import ConvMod
from conv2former.recipes import Recipe, load_recipe, recipe_names
from conv2former.tasks.classification.network import build_model

# the paper's rows, typed from its tables: (model, kernel, stochastic depth, top-1)
SIZES = {"n": (7, 0.1, 81.5), "t": (11, 0.15, 83.2), "s": (11, 0.3, 84.1), "b": (11, 0.7, 84.4)}  # Tables 3 and 10
KERNELS = {  # Fig. 4a: numbers for its ends in Sec. 3.3, for B's 7 in Table 5, none printed for the others
    "t": {5: 82.8, 7: None, 9: None, 15: None, 21: 83.4},
    "b": {5: 84.1, 7: 84.2, 9: None, 15: None, 21: 84.5},
}
SUMS = {"n": None, "t": 82.7, "s": None, "b": None}  # Fig. 4b; T's number in Table 6
WEIGHTINGS = {"sigmoid": 82.3, "l1": 82.8, "linear": 82.2}  # Table 6
ISOTROPIC = {"is": (0.1, 81.2), "is_conv3": (0.1, 82.0), "ib": (0.2, 82.7), "ib_conv3": (0.2, 83.0)}  # Table 7
SCRATCH = (
    {f"imagenet1k_{s}": (f"conv2former_{s}", kernel, rate, top1) for s, (kernel, rate, top1) in SIZES.items()}
    | {
        f"imagenet1k_{s}_k{kernel}": (f"conv2former_{s}", kernel, SIZES[s][1], top1)
        for s, numbers in KERNELS.items()
        for kernel, top1 in numbers.items()
    }
    | {f"imagenet1k_{s}_sum": (f"conv2former_{s}_sum", *SIZES[s][:2], top1) for s, top1 in SUMS.items()}
    | {f"imagenet1k_t_{w}": (f"conv2former_t_{w}", 11, 0.15, top1) for w, top1 in WEIGHTINGS.items()}
    | {f"imagenet1k_{s}": (f"conv2former_{s}", 11, rate, top1) for s, (rate, top1) in ISOTROPIC.items()}
)
PRETRAINING = {"s": 0.1, "b": 0.2, "l": 0.1}  # Table 10
FINETUNING = {  # Tables 4 and 11
    (224, "s"): (0.2, 84.9),
    (224, "b"): (0.2, 86.2),
    (224, "l"): (0.3, 87.0),
    (384, "b"): (0.2, 87.0),
    (384, "l"): (0.3, 87.7),
}
IMAGENET = sorted(
    [*SCRATCH, *(f"imagenet22k_{s}" for s in PRETRAINING), *(f"imagenet1k_ft{size}_{s}" for size, s in FINETUNING)]
)
# Tables 8 and 12: (stochastic depth, box AP), Tables 9 and 13: (stochastic depth, mIoU)
COCO = {"coco_mask_rcnn_t": (0.2, 48.0)} | {
    f"coco_cascade_mask_rcnn_{s}": row for s, row in {"t": (0.2, 51.4), "s": (0.6, 52.8), "b": (0.9, 52.8)}.items()
}
ADE20K = {
    f"ade20k_upernet_{s}": row
    for s, row in {"t": (0.2, 48.0), "s": (0.3, 50.3), "b": (0.5, 51.0), "l": (0.4, 54.3)}.items()
}
OURS = [
    "camvid",
    "cifar",
    "finetune",
    "finetune_detection",
    "finetune_segmentation",
    "quickstart",
    "smoke_detection",
    "smoke_segmentation",
]
# exact counts with 1,000 classes
PARAMETERS = {
    "imagenet1k_n": 14_992_840,
    "imagenet1k_t": 26_697_204,
    "imagenet1k_s": 50_032_692,
    "imagenet1k_b": 90_029_112,
    "imagenet1k_t_sum": 26_697_204,
    "imagenet1k_t_sigmoid": 26_697_204,
    "imagenet1k_t_l1": 26_697_204,
    "imagenet1k_t_linear": 26_697_204,
    "imagenet1k_t_k5": 26_137_332,
    "imagenet1k_t_k7": 26_277_300,
    "imagenet1k_t_k9": 26_463_924,
    "imagenet1k_t_k15": 27_303_732,
    "imagenet1k_t_k21": 28_563_444,
    "imagenet1k_b_k5": 88_370_232,
    "imagenet1k_b_k7": 88_784_952,
    "imagenet1k_b_k9": 89_337_912,
    "imagenet1k_b_k15": 91_826_232,
    "imagenet1k_b_k21": 95_558_712,
    "imagenet1k_ft224_s": 50_032_692,
    "imagenet1k_ft224_b": 90_029_112,
    "imagenet1k_ft224_l": 198_893_736,
    "imagenet1k_ft384_b": 90_029_112,
    "imagenet1k_ft384_l": 198_893_736,
    "imagenet22k_l": 198_893_736 + 1281 * (21_841 - 1000),
    # 150 classes; the paper prints 56, 79, 120 and 231 M (Table 9)
    "ade20k_upernet_t": 55_511_096,
    "ade20k_upernet_s": 78_846_584,
    "ade20k_upernet_b": 120_182_396,
    "ade20k_upernet_l": 230_832_876,
}
PEERS = [
    "resnet50d",
    *(f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base", "large")),
    *(f"convnext_{size}" for size in ("tiny", "small", "base", "large")),
    *("deit_small_patch16_224", "deit_base_patch16_224", "regnety_160", "focalnet_base_lrf"),
    *("efficientnet_b7", "nfnet_f0", "coatnet_3_224"),
]


def builds(recipe: Recipe, classes: int) -> Any:
    """Builds network, optimizer and schedule of a recipe, checks their rates and returns the network."""
    model = build_without_memory(recipe, classes=classes).model
    peak = scaled_lr(recipe.optim, plan_batch(recipe, world=recipe.claim.processes))
    optimizer = build_optimizer(model, recipe.optim, lr=peak)
    schedule = build_schedule(optimizer, recipe.schedule, steps_per_epoch=10)
    schedule.step_update(recipe.schedule.total(10) // 2)
    assert all(0 < group["lr"] <= peak for group in optimizer.param_groups)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    kept = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1 and name not in kept), name
    return model


def test_every_row_of_the_paper_has_a_recipe() -> None:
    assert recipe_names() == sorted([*IMAGENET, *COCO, *ADE20K, *OURS])


# a row of each kind, and all recipes for own images; the others, of more of the same, are slow tests
BUILT = [
    *(f"imagenet1k_{kind}" for kind in ("t", "t_k21", "t_sum", "is_conv3", "ft224_s", "ft384_b")),
    *("imagenet22k_s", "coco_mask_rcnn_t", "coco_cascade_mask_rcnn_s", "ade20k_upernet_t", *OURS),
]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in BUILT else pytest.mark.slow) for name in recipe_names()]
)
def test_every_recipe_builds_its_model_optimizer_and_schedule(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    classes = recipe.claim.classes or 10
    model = builds(recipe, classes)
    assert model.num_classes == classes
    if name in PARAMETERS:
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    rates = rates or [0.0]  # timm leaves the layer out where it does nothing
    assert rates[-1] == max(rates) == pytest.approx(recipe.model.drop_path_rate)


@pytest.mark.parametrize("name", recipe_names())
def test_every_claim_says_what_it_must(name: str) -> None:
    claim = load_recipe(name).claim
    words = claim.command.split()
    assert words[:4] == ["conv2former", "train", "--recipe", name]
    assert claim.hardware and claim.time and len(claim.notes) > 80
    if name in IMAGENET:
        assert words[4:6] == ["--data", "imagenet22k" if "22k" in name else "imagenet"]
        assert words[6:] == ["--out", f"runs/{name}"]
        assert claim.time == claim.measured == "not run"
        assert re.match(r"(Table [34567]|Fig\. 4)", claim.source)
    elif name in COCO | ADE20K:
        rate, paper = (COCO | ADE20K)[name]
        assert (load_recipe(name).model.drop_path_rate, claim.paper, claim.measured) == (rate, paper, "not run")
        assert words[4:] == ["--data", name.partition("_")[0], "--out", f"runs/{name}"]
        assert re.match("Table 8" if name in COCO else "Table 9", claim.source)
    else:
        assert claim.paper is None and (claim.source == "not in the paper" or "smoke" in name)


@pytest.mark.parametrize("name", SCRATCH)
def test_rows_trained_on_imagenet_1k(name: str) -> None:
    """Sec. 4.1; Tables 3, 5, 6, 7, 10; Fig. 4."""
    recipe = load_recipe(name)
    model, kernel, rate, top1 = SCRATCH[name]
    assert (recipe.model.name, recipe.model.drop_path_rate, recipe.claim.paper) == (model, rate, top1)
    if name in BUILT:
        built = build_without_memory(recipe, classes=1000).model
        assert {m.dwconv.kernel_size[0] for m in built.modules() if isinstance(m, ConvMod)} == {kernel}
    else:  # built in the slow tests below
        assert recipe.model.args.get("kernel_size", kernel) == kernel
    assert recipe.model.weights is None
    assert (recipe.claim.images, recipe.claim.classes, recipe.claim.processes) == (1_281_167, 1000, 8)
    assert (recipe.schedule.epochs, recipe.schedule.warmup_epochs) == (300, 20)
    assert (recipe.data.input_size, recipe.data.crop_pct) == (224, 0.9)
    settings(recipe, batch=1024, rate=1e-3, weight_decay=0.05, mixup=0.8, cutmix=1.0)


@pytest.mark.parametrize("size", PRETRAINING)
def test_rows_trained_on_imagenet_22k(size: str) -> None:
    """Sec. 4.1, Table 10."""
    recipe = load_recipe(f"imagenet22k_{size}")
    assert (recipe.model.name, recipe.model.drop_path_rate) == (f"conv2former_{size}", PRETRAINING[size])
    assert recipe.claim.paper is None and recipe.data.val_fraction > 0
    assert (recipe.claim.images, recipe.claim.classes) == (14_197_122, 21_841)
    assert (recipe.schedule.epochs, recipe.schedule.warmup_epochs, recipe.data.input_size) == (90, 5, 224)
    settings(recipe, batch=4096, rate=4e-3, weight_decay=0.05, mixup=0.8, cutmix=1.0)


@pytest.mark.parametrize(("pixels", "size"), FINETUNING)
def test_rows_fine_tuned_on_imagenet_1k(pixels: int, size: str) -> None:
    """Sec. 4.1, Tables 4 and 11."""
    recipe = load_recipe(f"imagenet1k_ft{pixels}_{size}")
    rate, top1 = FINETUNING[pixels, size]
    assert (recipe.model.name, recipe.model.drop_path_rate) == (f"conv2former_{size}", rate)
    assert recipe.claim.paper == top1
    before = load_recipe(f"imagenet22k_{size}").claim.command
    assert before.endswith(f"--out {recipe.model.weights}")
    assert (recipe.claim.images, recipe.claim.classes, recipe.claim.processes) == (1_281_167, 1000, 8)
    assert (recipe.schedule.epochs, recipe.schedule.warmup_epochs) == (30, 0)
    assert (recipe.data.input_size, recipe.data.crop_pct) == (pixels, 0.9 if pixels == 224 else 1.0)
    settings(recipe, batch=512, rate=5e-5, weight_decay=1e-8, mixup=0.0, cutmix=0.0)


def settings(recipe: Recipe, *, batch: int, rate: float, weight_decay: float, mixup: float, cutmix: float) -> None:
    """What all of a kind share; the batch and the rate are the same on any number of processes."""
    optim, augment = recipe.optim, recipe.augment
    for world in (1, 8, 32, recipe.claim.processes):
        planned = plan_batch(recipe, world=world)
        assert planned.total == batch and planned.per_process <= optim.batch_size
        assert scaled_lr(optim, planned) == pytest.approx(rate)
    assert (optim.name, optim.weight_decay, optim.layer_decay, optim.ema_decay) == ("adamw", weight_decay, None, None)
    assert (augment.mixup, augment.cutmix, augment.label_smoothing, augment.random_erasing) == (
        mixup,
        cutmix,
        0.1,
        0.25,
    )
    assert augment.auto_augment == "rand-m9-mstd0.5-inc1"
    assert (recipe.engine.precision, recipe.engine.compile) == ("bf16", "auto")


@pytest.mark.parametrize(
    "peer",
    [
        pytest.param(peer, marks=() if re.search("resnet50d|tiny|deit_small|b7", peer) else pytest.mark.slow)
        for peer in PEERS
    ],
)
def test_the_papers_peers_train_under_its_recipe(peer: str) -> None:
    recipe = load_recipe("imagenet1k_t", overrides=[f"model.name={peer}", "model.args={}"])
    assert builds(recipe, 1000).num_classes == 1000


@pytest.mark.parametrize("images", [40, 500, 5_000, 500_000])
@pytest.mark.parametrize("name", ["finetune", "finetune_detection", "finetune_segmentation"])
@pytest.mark.parametrize("weights", [True, False])
def test_fine_tuning_takes_any_number_of_images(name: str, images: int, weights: bool) -> None:
    """What is left open is decided: a batch that the images fill, enough steps to learn, and a reason for each."""
    recipe = load_recipe(name)
    found = recipe.choices(Start(images=images, weights=weights))
    assert set(recipe.auto) <= found.keys() and all(reason for _, reason in found.values())
    decided = recipe.settled({key: value for key, (value, _) in found.items()})
    assert not decided.auto
    steps = images // plan_batch(decided, world=1).total
    assert steps >= 1 and 60 <= decided.schedule.total(steps) <= 2_000_000
    assert decided.model.freeze_batchnorm <= weights and bool(decided.model.fit_head) <= weights


@pytest.mark.parametrize("gpu", [True, False])
def test_the_sizes_of_a_detectors_training_follow_the_one_that_is_set(gpu: bool) -> None:
    recipe = load_recipe("finetune_detection", overrides=["data.short_side=640"])
    usual = recipe.choices(Start(gpu=gpu))
    factor = 640 / usual["data.short_side"][0]
    found = choices(recipe, None, 1000)  # on a CPU
    found = recipe.choices(Start(gpu=gpu, short_side=640)) if gpu else found
    assert max(found["augment.short_sides"][0]) == 640 and found["data.long_side"][1] == "data.short_side=640"
    for key in ("data.long_side", "augment.long_side", "augment.crop_sizes", "augment.crop_short_sides"):
        value, before = np.array(found[key][0]), np.array(usual[key][0])
        assert value == pytest.approx(before * factor, abs=1)


def test_what_is_set_stays_and_auto_can_be_asked_for() -> None:
    recipe = load_recipe("finetune", overrides=["schedule.epochs=3", "optim.base_lr=auto", "data.mean=[0,0,0]"])
    assert not {"schedule.epochs", "data.mean"} & set(recipe.auto) and {"optim.base_lr", "data.std"} < set(recipe.auto)
    assert recipe.schedule.warmup_epochs == 0.3, "a tenth of the epochs that were set"
    in_steps = load_recipe("finetune_segmentation", overrides=["schedule.steps=50"])
    assert in_steps.schedule.total(10) == 50 and in_steps.schedule.warmup_epochs == 0
    assert "epochs: 3" in recipe.to_yaml() and "base_lr: auto" in recipe.to_yaml()
    with pytest.raises(UserError, match=r"'optim.weight_decay': .*got 'auto'"):
        load_recipe("finetune", overrides=["optim.weight_decay=auto"])


@pytest.mark.parametrize("name", recipe_names())
def test_the_resolved_recipe_reads_back_the_same(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "resolved.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(str(path)) == recipe
    assert load_recipe(str(path)).digest() == recipe.digest()


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


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("schedule.epochs=12", "schedule.milestones: 27 does not lie within the 12 epochs"),
        ("schedule.steps=100", "warmup_steps (500) must be less than steps (100)"),
        ("schedule.steps=1000", "give schedule.epochs or its counterpart in steps, not both"),
        ("schedule.warmup_epochs=1", "give schedule.warmup_steps or schedule.warmup_epochs, not both"),
        ("schedule.kind=cosine", "schedule.milestones and schedule.kind=multistep require each other"),
        ("schedule.milestones=[]", "give both or neither"),
        ("data.std=[0,1,1]", "data.std"),
        ("task=[a]", "unknown task"),
        ("augment.crop_sizes=[600,384]", "must be the least and the most"),
        ("detector.kind=yolo", "detector.kind"),
        ("segmenter.channels=3", "unknown key 'segmenter'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_recipe("coco_mask_rcnn_t", overrides=[setting])
    assert "\n" not in str(caught.value)


def test_steps_and_polynomials() -> None:
    """The rates of Tables 8 and 9: two drops by ten; a straight line that warm-up cuts into."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2, 2))], lr=1.0)

    def rates(name: str, *steps: int) -> list[float]:
        schedule = build_schedule(optimizer, load_recipe(name).schedule, steps_per_epoch=100)
        found = []
        for step in steps:
            schedule.step_update(step)
            found.append(optimizer.param_groups[0]["lr"])
        return found

    low = 1e-7
    expected = [low, low + (1 - low) / 2, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    assert rates("coco_mask_rcnn_t", 0, 250, 500, 2699, 2700, 3299, 3300, 3599) == pytest.approx(expected)
    line = [0.0, 0.5, 1 - 1500 / 160000, 0.5, 1 / 160000]
    assert rates("ade20k_upernet_t", 0, 750, 1500, 80000, 159999) == pytest.approx(line)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown recipe 'quickstrat'; did you mean 'quickstart'"):
        load_recipe("quickstrat")
    with pytest.raises(UserError, match="there are: ade20k"):
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


@pytest.mark.parametrize("section", ["[]", "0", "false", "''"])
def test_a_section_is_a_mapping_or_nothing(section: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\ntask: classification\nmodel: {{name: conv2former_test}}\ndata: {section}\n")
    with pytest.raises(UserError, match="'data': Input should be a valid dictionary"):
        load_recipe(str(path))
    path.write_text(path.read_text().replace(f"data: {section}", "data:"))
    assert "data.mean" in load_recipe(str(path)).auto


def test_an_unknown_optimizer() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"optim\.name 'adamz'"):
        build_optimizer(model, load_recipe("quickstart", overrides=["optim.name=adamz"]).optim, lr=1.0)


def test_a_recipe_of_ones_own_does_not_claim_what_its_base_claims(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nbase: imagenet1k_t\noptim: {weight_decay: 0.1}\n")
    recipe = load_recipe(path)
    assert recipe.name == "mine" and recipe.optim.weight_decay == 0.1 and recipe.optim.base_lr == 1e-3
    assert (recipe.claim.source, recipe.claim.paper, recipe.claim.measured) == (
        "based on imagenet1k_t",
        None,
        "not run",
    )
    assert str(path) in recipe.claim.command and recipe.claim.images == 1_281_167


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it has the key '255' twice, of which one would be lost"):
        load_recipe("finetune_segmentation", overrides=["data.mask_values={255: crack, 0: wall, 255: wall}"])
    file = tmp_path / "recipe.yaml"
    file.write_text("base: quickstart\noptim:\n  base_lr: 1\n  base_lr: 2\n")
    with pytest.raises(UserError, match="it has the key 'base_lr' twice"):
        load_recipe(str(file))


@pytest.mark.parametrize(
    "setting", ["engine.checkpoint_minutes=inf", "optim.base_lr=inf", "data.mean=[nan, 0, 0]", "optim.betas=[0.9, 1]"]
)
def test_numbers_that_are_none_are_refused(setting: str) -> None:
    with pytest.raises(UserError, match=setting.partition("=")[0]):
        load_recipe("quickstart", overrides=[setting])
