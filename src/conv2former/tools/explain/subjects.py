"""Networks whose receptive fields are measured: by timm's name with arguments, or from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from conv2former import checkpoints
from conv2former.checkpoints.exported import refuse_exported
from conv2former.checkpoints.weights import saved_weights
from conv2former.errors import UserError
from conv2former.models.meta import build_on_meta
from conv2former.tasks import load
from conv2former.tasks.backbone import STRIDES, feature_info
from conv2former.tools.benchmark.options import model_args
from conv2former.tools.naming import built, built_untrained, read_name

STAGES = 4
SMALL_SCALE = 1e-3  # of a layer scale: below, blocks change next to nothing


@dataclass(frozen=True)
class Subject:
    """A network as its maps."""

    name: str  # as the user wrote it
    weights: str  # 'untrained', 'pretrained' or 'trained'
    maps: Callable[[Tensor], Sequence[Tensor]]  # (B, 3, H, W) -> a map (B, C, h, w) for each stage
    strides: list[int]  # of the maps
    mean: tuple[float, ...]  # of the images that it expects, 0 to 1
    std: tuple[float, ...]
    device: torch.device
    notes: tuple[str, ...] = ()  # what to know of its numbers


def check_name(name: str, *, size: int) -> None:
    """Raises the UserError that ``open_subject`` would raise, but needs no weights and no memory for them."""
    named = read_name(name)
    if isinstance(named, Path):
        _task_of(named)
        return
    model_name, args = named
    args = model_args(model_name, size) | args
    args.pop("pretrained", None)
    stage_indices(name, built(name, build_on_meta, model_name, args))


def _task_of(path: Path) -> str:
    refuse_exported(path)
    return checkpoints.saved_task(path)


def open_subject(name: str, *, size: int, device: torch.device) -> Subject:
    """The network of that name.

    Args:
        name: timm's name, with arguments of ``timm.create_model`` behind a colon
            (``conv2former_t:kernel_size=21,ls_init_value=1``), or a run folder or saved model of any task.
        size: Side of the images, pixels; networks with positions are told.
        device: Where it computes.

    Raises:
        UserError: Unknown model, wrong argument, weights that cannot be had, a checkpoint that cannot be used.
    """
    named, weights = read_name(name), "trained"
    notes: tuple[str, ...] = ()
    if isinstance(named, Path):
        if _task_of(named) != "classification":
            task: Any = load(named).to(device)
            trunk, data = task.trunk.requires_grad_(False), task.recipe.data
            return Subject(name, weights, trunk, list(STRIDES), mean=data.mean, std=data.std, device=device)
        saved = saved_weights(str(named))
        stats: dict[str, Any] = dict(saved.normalisation)
        model: Any = checkpoints.load_pretrained(named, **model_args(saved.architecture, size))
    else:
        model_name, args = named
        model = built_untrained(name, model_name, model_args(model_name, size) | args).eval()
        weights = "pretrained" if args.get("pretrained") else "untrained"
        notes = _notes(model) if weights == "untrained" else ()
        stats = {key: resolve_model_data_config(model)[key] for key in ("mean", "std")}
    model.to(device).requires_grad_(False)  # the gradient is that of the image alone
    indices, strides = stage_indices(name, model)

    def maps(images: Tensor) -> Any:
        return model.forward_intermediates(images, indices=indices, intermediates_only=True, output_fmt="NCHW")

    return Subject(name, weights, maps, strides, **stats, device=device, notes=notes)


def stage_indices(name: str, model: Any) -> tuple[list[int], list[int]]:
    """Which of timm's intermediate maps are the ends of stages, and their strides.

    In a network that halves its maps, the last map of each of the four largest strides; in one that does not, the map
    after each quarter of its blocks.

    Raises:
        UserError: The network gives no such maps.
    """
    if not hasattr(model, "feature_info") or not hasattr(model, "forward_intermediates"):
        raise UserError(f"{name} gives no maps of its stages (timm): take another model")
    strides = [entry["reduction"] for entry in feature_info(model)]
    if len(set(strides)) == 1:
        count = len(strides)
        indices = sorted({max(count * part // STAGES - 1, 0) for part in range(1, STAGES + 1)})
    else:
        indices = [len(strides) - 1 - strides[::-1].index(stride) for stride in sorted(set(strides))][-STAGES:]
    return indices, [strides[index] for index in indices]


def _notes(model: nn.Module) -> tuple[str, ...]:
    """What to know of a network without training."""
    notes: tuple[str, ...] = ("untrained: random weights",)
    scales = [p.abs().max().item() for name, p in model.named_parameters() if name.endswith(".gamma")]
    if scales and max(scales) < SMALL_SCALE:
        notes += (f"a layer scale of {max(scales):.0e} leaves its blocks without effect, ls_init_value=1 does not",)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d) and module.affine]
    if any(not norm.weight.any() for norm in norms):
        notes += ("batch norms that start at 0 leave its blocks without effect, zero_init_last=false does not",)
    return notes
