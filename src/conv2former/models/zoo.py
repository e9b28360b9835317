"""The family in numbers: parameters, multiply-adds, and what the paper reports for each model.

Counting all models takes half a minute, so ``counts.json`` keeps the numbers.
``python -m conv2former.models.zoo`` counts them and writes the file anew.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from conv2former.errors import UserError, nearest
from conv2former.models.ablations import ROWS
from conv2former.models.meta import build_on_meta
from conv2former.models.variants import SIZES, SMALL_SIZES

# ImageNet-1k top-1 in percent, 224 px, 300 epochs: Tables 3, 6 and 7
PAPER_TOP1 = {
    "conv2former_n": 81.5,
    "conv2former_t": 83.2,
    "conv2former_s": 84.1,
    "conv2former_b": 84.4,
    "conv2former_is": 81.2,
    "conv2former_is_conv3": 82.0,
    "conv2former_ib": 82.7,
    "conv2former_ib_conv3": 83.0,
    "conv2former_t_sum": 82.7,
    "conv2former_t_sigmoid": 82.3,
    "conv2former_t_l1": 82.8,
    "conv2former_t_linear": 82.2,
}
# the same by kernel size: Table 5, and Sec. 3.3 for the ends of Fig. 4a, which prints no numbers itself
PAPER_TOP1_KERNEL = {
    ("conv2former_b", 7): 84.2,
    ("conv2former_b", 5): 84.1,
    ("conv2former_b", 21): 84.5,
    ("conv2former_t", 5): 82.8,
    ("conv2former_t", 21): 83.4,
}
# with ImageNet-22k pre-training, by size of the fine-tuning image: Table 4
PAPER_TOP1_22K = {
    ("conv2former_s", 224): 84.9,
    ("conv2former_b", 224): 86.2,
    ("conv2former_b", 384): 87.0,
    ("conv2former_l", 224): 87.0,
    ("conv2former_l", 384): 87.7,
}

PAPER_MODELS = [f"conv2former_{size}" for size in (*SIZES, "is", "is_conv3", "ib", "ib_conv3")]
SMALL_MODELS = [f"conv2former_{size}" for size in SMALL_SIZES]
ABLATIONS = [f"conv2former_{size}_{weighting}" for size, weighting in ROWS]

# Sec. 4.3 and Tables 4 and 5: (model, kernel size, image size) beside the registered defaults
VARIANTS: list[tuple[str, int | None, int]] = [
    ("conv2former_n", 11, 224),
    *(("conv2former_t", k, 224) for k in (5, 7, 9, 15, 21)),
    *(("conv2former_b", k, 224) for k in (5, 7, 9, 15, 21)),
    ("conv2former_b", 11, 384),
    ("conv2former_l", 11, 384),
]
COUNTS = Path(__file__).with_name("counts.json")  # name, kernel, image, parameters, multiply-adds; in this order:
LISTED: list[tuple[str, int | None, int | None]] = [
    *((name, None, None) for name in PAPER_MODELS + ABLATIONS + SMALL_MODELS),
    *VARIANTS,
]


@dataclass(frozen=True)
class Row:
    """One model."""

    name: str  # timm's
    kernel_size: int  # side of the modulation kernel
    image_size: int  # side of the image, pixels
    params: int  # with 1,000 classes
    macs: int  # multiply-adds of convolutions and linear layers; what the paper calls FLOPs
    paper_top1: float | None  # ImageNet-1k accuracy in percent, None where the paper gives none
    paper_top1_22k: float | None  # the same with ImageNet-22k pre-training
    origin: str  # 'paper', 'paper, ablation' or 'ours'

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def count(name: str, *, image_size: int, **model_args: Any) -> tuple[int, int]:
    """Parameters and multiply-adds of any timm model, counted on the meta device without computing anything.

    Multiply-adds are those of convolutions and matrix products (attention's included); biases, norms and element-wise
    work are not counted, as in the paper.

    Raises:
        UserError: Unknown model.
    """
    if not timm.is_model(name):
        raise UserError(f"unknown model {name!r}{nearest(name, timm.list_models())}")
    return _count(build_on_meta(name, **model_args), image_size, model_args.get("in_chans", 3))


def _count(model: Any, image_size: int, in_chans: int = 3) -> tuple[int, int]:
    image = torch.empty(1, in_chans, image_size, image_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def rows(*, variants: bool = False) -> list[Row]:
    """All registered models; with ``variants`` also the paper's other kernel and image sizes."""
    default = len(PAPER_MODELS + ABLATIONS + SMALL_MODELS)
    result = []
    for number, entry in enumerate(json.loads(COUNTS.read_text())):
        name, side, size, params, macs = entry
        variant = number >= default
        top1 = PAPER_TOP1_KERNEL.get((name, side)) if variant else PAPER_TOP1.get(name)
        pretrained = PAPER_TOP1_22K.get((name, size)) if side == 11 else None
        ablation = name in ABLATIONS or (variant and size == 224)
        origin = "ours" if name in SMALL_MODELS else "paper, ablation" if ablation else "paper"
        result.append(Row(name, side, size, params, macs, top1, pretrained, origin))
    return result if variants else result[:default]


def count_again(name: str, kernel: int | None, size: int | None) -> list[Any]:
    """An entry of ``COUNTS``; None stands for what is registered."""
    cfg: Any = timm.get_pretrained_cfg(name)
    model = build_on_meta(name, **({} if kernel is None else dict(kernel_size=kernel)))
    side = model.stages[0].blocks[0].mod.dwconv.kernel_size[0]
    return [name, side, size or cfg.input_size[-1], *_count(model, size or cfg.input_size[-1])]


def to_markdown(table: list[Row]) -> str:
    """The table for a document."""
    lines = ["| model | kernel | image | parameters | MACs (G) | paper top-1 | paper top-1, 22k | origin |"]
    lines += ["|---" * 8 + "|"]
    for r in table:
        top1, pretrained = (f"{value:.1f}" if value is not None else "" for value in (r.paper_top1, r.paper_top1_22k))
        lines.append(
            f"| {r.name} | {r.kernel_size} | {r.image_size} | {r.params:,} | {r.macs / 1e9:.3f} "
            f"| {top1} | {pretrained} | {r.origin} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    entries = [json.dumps(count_again(*each)) for each in LISTED]
    COUNTS.write_text("[\n" + ",\n".join(entries) + "\n]\n")
