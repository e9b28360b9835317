"""A row's recipe as the paper has it, or shrunk so that one machine can train it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from conv2former.config import Recipe
from conv2former.models.variants import SIZES
from conv2former.recipes.load import load_recipe, parse_recipe, with_settings
from conv2former.tasks.detection.config import DetectionRecipe

Scale = Literal["full", "small"]

DIVISOR = 4  # of widths and depths
HEAD = 1280 // DIVISOR
LAYER_SCALE = 0.1  # with 1e-6 blocks wake up only after more steps than so short a run has
ISOTROPIC_SIZE = 128  # pixels: a map of 8x8 at stride 16
RESNET_SIZE = 64  # its stem has stride 4 and cannot be told otherwise

# all of the small recipe but the network, of each task
SMALL = dict(
    classification=("cifar", ["schedule.epochs=5", "schedule.eval_every=5"]),
    segmentation=("camvid", ["schedule.epochs=10", "schedule.eval_every=10"]),
    detection=(
        "finetune_detection",
        [
            *("data.short_side=320", "data.long_side=512", "augment.short_sides=[256,320]", "augment.long_side=512"),
            *("optim.base_lr=2e-4", "optim.layer_decay=null", "schedule.epochs=12", "schedule.eval_every=12"),
            *("model.freeze_batchnorm=false", "model.needs_weights=false", "optim.head_lr=1"),
            *("augment.crop_short_sides=[400,500,600]", "augment.crop_sizes=[384,600]"),
            *("optim.global_batch=8", "schedule.warmup_epochs=1"),
        ],
    ),
)
# what these recipes are for, for the titles of figures
SMALL_DATA = dict(classification="CIFAR-10", segmentation="CamVid", detection="other data")


def where(task: str, scale: Scale) -> str:
    """What our rows were trained on, in words."""
    return "at full scale" if scale == "full" else f"small networks on {SMALL_DATA[task]}"


def at_scale(name: str, model: str | None, scale: Scale, settings: Sequence[str]) -> Recipe | None:
    """The shipped recipe ``name``, perhaps with another timm model; None where there is no small form of the model.

    'small' takes everything but the network from another shipped recipe (``SMALL``), leaves pre-training out and
    divides the network's widths and depths by ``DIVISOR``. ``settings`` are further ``section.key=value``.
    """
    swap = [f"model.name={model}", "model.args={}"] if model else []
    if scale == "full":
        return load_recipe(name, overrides=[*swap, *settings])
    full = load_recipe(name, overrides=swap)
    base, changes = SMALL[full.task]
    shrunk = _shrunk(full.model.name, dense=full.task != "classification")
    if shrunk is None:
        return None
    args, own_changes = shrunk
    raw = load_recipe(base, overrides=[*changes, *own_changes]).raw()
    raw["name"] = f"{name}{'-' + model if model else ''}_small"
    raw["model"] |= dict(name=full.model.name, args=args | full.model.args)
    command = f"conv2former train --recipe {raw['name']}.yaml --data DIR --out RUN"
    raw["claim"] |= dict(source=full.claim.source, command=command, notes=in_words(full.task), paper=None)
    raw["claim"] |= dict(measured="not run", time="not run")
    if isinstance(full, DetectionRecipe):
        raw["detector"] = full.detector.model_dump(mode="json")
    return with_settings(parse_recipe(raw, raw["name"]), list(settings))


def in_words(task: str, scale: Scale = "small") -> str:
    """What a scale means, for the head of a table."""
    if scale == "full":
        return "the paper's settings, by the recipes of the rows"
    base, changes = SMALL[task]
    other_sizes = f", stem stride 2 (but ResNets at {RESNET_SIZE} px, isotropic models at {ISOTROPIC_SIZE} px)"
    stem = other_sizes if task == "classification" else ""
    return (
        f"widths and depths of the network divided by {DIVISOR} (at least one block), layer scale {LAYER_SCALE}{stem}; "
        f"no pre-training; all else from recipe `{base}` with `{' '.join(changes)}`"
    )


def _shrunk(name: str, *, dense: bool) -> tuple[dict[str, Any], list[str]] | None:
    """The arguments of the small network, and settings that it needs; None where there is none."""
    family, _, rest = name.partition("_")
    size = rest.split("_")[0]

    def depths(*full: int) -> list[int]:
        return [max(round(depth / DIVISOR), 1) for depth in full]

    if family == "conv2former" and size in ("is", "ib"):
        args: dict[str, Any] = dict(dim={"is": 320, "ib": 640}[size] // DIVISOR, depth=round(18 / DIVISOR))
        args |= dict(head_hidden_size=HEAD, ls_init_value=LAYER_SCALE)
        return args, [f"data.input_size={ISOTROPIC_SIZE}"]
    if family == "conv2former":
        full = SIZES[size]
        args = dict(dims=[dim // DIVISOR for dim in full["dims"]], depths=depths(*full["depths"]))
        args |= dict(head_hidden_size=HEAD, ls_init_value=LAYER_SCALE) | ({} if dense else dict(stem_stride=2))
    elif family == "convnext":
        width, middle = dict(tiny=(96, 9), small=(96, 27), base=(128, 27), large=(192, 27))[size]
        args = dict(dims=[width * 2**i // DIVISOR for i in range(4)], depths=depths(3, 3, middle, 3))
        args |= dict(ls_init_value=LAYER_SCALE) | ({} if dense else dict(patch_size=2))
    elif family == "swin":
        width, middle = dict(tiny=(96, 6), small=(96, 18), base=(128, 18), large=(192, 18))[size]
        args = dict(embed_dim=width // DIVISOR, depths=depths(2, 2, middle, 2))
        args |= {} if dense else dict(img_size=32, patch_size=2, window_size=4)
    elif family.startswith("resnet50"):
        args = dict(channels=[width // DIVISOR for width in (64, 128, 256, 512)], layers=depths(3, 4, 6, 3))
        return args, [f"data.input_size={RESNET_SIZE}"]
    elif family == "deit":
        width, heads = dict(small=(384, 6), base=(768, 12))[size]
        args = dict(img_size=32, patch_size=4, embed_dim=width // DIVISOR, depth=12 // DIVISOR, num_heads=heads)
    else:
        return None
    return args, []
