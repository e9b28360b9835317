"""Image classification: loss with MixUp and CutMix, exact counts, the network from the recipe."""

from __future__ import annotations

import math
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torchmetrics import Metric

from conv2former import checkpoints
from conv2former.config import ModelSection
from conv2former.errors import UserError, nearest, one_line, some
from conv2former.tasks.base import Result, Task
from conv2former.tasks.classification.config import ClassificationRecipe
from conv2former.tasks.classification.data import Batch

# arguments of timm.create_model that say where weights come from or what else than a classifier is built
RESERVED = {
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "num_classes"),
    *("features_only", "scriptable", "exportable", "no_jit"),
}


class ClassificationCounts(Metric):
    """Counts over all images seen, summed over processes: nothing is averaged before the end.

    Args:
        num_classes: Classes K. Top-5 is top-K where there are fewer than five.
        **kwargs: Of torchmetrics, ``sync_on_compute=False`` for the counts of one process.
    """

    full_state_update = False
    seen: Tensor
    correct: Tensor
    correct_top5: Tensor
    loss_sum: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.top_k = min(5, num_classes)
        per_class = torch.zeros(num_classes, dtype=torch.long)
        self.add_state("seen", per_class.clone(), dist_reduce_fx="sum")
        self.add_state("correct", per_class.clone(), dist_reduce_fx="sum")
        self.add_state("correct_top5", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("loss_sum", torch.zeros((), dtype=torch.double), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Logits (B, K) and targets (B,); targets below 0 are not counted."""
        counted = targets >= 0
        logits, targets = logits[counted].float(), targets[counted]
        top = logits.topk(self.top_k, dim=1).indices
        hits = top == targets[:, None]
        self.seen += torch.bincount(targets, minlength=len(self.seen))
        self.correct += torch.bincount(targets[hits[:, 0]], minlength=len(self.correct))
        self.correct_top5 += hits.any(dim=1).sum()
        self.loss_sum += F.cross_entropy(logits, targets, reduction="sum").double()

    def compute(self) -> dict[str, Any]:
        """Accuracies in percent, the mean loss and the counts behind them."""
        seen = int(self.seen.sum())
        correct, correct_top5 = int(self.correct.sum()), int(self.correct_top5)
        share = 100 / max(seen, 1)
        return dict(
            images=seen,
            correct=correct,
            correct_top5=correct_top5,
            top1=correct * share,
            top5=correct_top5 * share,
            loss=float(self.loss_sum) / max(seen, 1),
            per_class=[(int(c), int(n)) for c, n in zip(self.correct, self.seen, strict=True)],
        )


class ClassificationTask(Task):
    """A classifier with its recipe.

    Args:
        model: A timm classifier.
        recipe: Gives the loss, the optimizer and the schedule.
    """

    def __init__(self, model: Any, recipe: ClassificationRecipe) -> None:
        super().__init__(model, recipe)
        augment = recipe.augment
        self.mixup = None
        self.criterion: nn.Module = nn.CrossEntropyLoss(label_smoothing=augment.label_smoothing)
        if recipe.pairs:
            self.mixup = Mixup(
                augment.mixup,
                augment.cutmix,
                prob=augment.mix_prob,
                label_smoothing=augment.label_smoothing,
                num_classes=model.num_classes,
            )
            self.criterion = SoftTargetCrossEntropy()
        self.counts = ClassificationCounts(model.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> logits (B, K)."""
        return self.model(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean loss of a batch; erasing and MixUp draw from the generators that the engine has keyed."""
        images, targets = self.prepared(batch.images), batch.targets
        if erasing := self.recipe.augment.random_erasing:
            images = RandomErasing(erasing, mode="pixel", device=images.device)(images)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        return self.criterion(self(images), targets)

    def on_validation_epoch_start(self) -> None:
        """Counts start anew with every pass."""
        self.counts.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to ``counts``."""
        self.counts.update(self.validated(self.prepared(batch.images)), batch.targets)

    def result(self) -> Result:
        """Loss and accuracies."""
        counts = self.counts.compute()
        figures = dict(val_loss=counts["loss"], val_top1=counts["top1"], val_top5=counts["top5"])
        line = (
            f"validation loss {counts['loss']:.4f}, "
            f"top-1 {counts['top1']:.2f}% ({counts['correct']} of {counts['images']})"
        )
        return Result(counts["top1"], figures, line, sound=math.isfinite(counts["loss"]))


def build_model(section: ModelSection, *, classes: list[str]) -> tuple[Any, dict[str, Any]]:
    """The recipe's network, from scratch or from ``section.weights``.

    The classifier of the weights is kept where its classes have the names of ``classes``, or no names and their number.

    Returns:
        The network, and the arguments that rebuild it with ``timm.create_model``: those of the weights, changed by
        ``section.args``.

    Raises:
        UserError: Unknown model or argument, weights that do not fit.
    """
    if not timm.is_model(section.name):
        raise UserError(f"unknown model {section.name!r}{nearest(section.name, timm.list_models())}")
    source: Any = None
    args = dict(section.args)
    if section.weights:
        source = checkpoints.load_pretrained(section.weights)
        architecture = source.pretrained_cfg["architecture"]
        if architecture != section.name.split(".")[0]:
            raise UserError(
                f"model.weights ({section.weights}) holds a {architecture}, the recipe says {section.name}: "
                f"give --model {architecture} or other weights"
            )
        args = checkpoints.saved_model_args(section.weights) | args
    rates = (("drop_path_rate", section.drop_path_rate), ("drop_rate", section.drop_rate))
    reserved = sorted(RESERVED & args.keys())
    if reserved:
        raise UserError(f"model.args cannot hold {', '.join(reserved)}: weights are given as model.weights")
    options: dict[str, Any] = args | {key: rate for key, rate in rates if rate}  # not every timm model takes both
    try:
        network = timm.create_model(section.name, num_classes=len(classes), **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"model.args of {section.name}: {one_line(error)}") from None
    if source is not None:
        _copy_weights(source, network, classes, origin=str(section.weights))
    return network, args


def _copy_weights(source: Any, target: Any, classes: list[str], *, origin: str) -> None:
    state, wanted = source.state_dict(), target.state_dict()
    if list(source.pretrained_cfg.get("label_names") or classes) != classes or source.num_classes != len(classes):
        classifier = target.pretrained_cfg["classifier"]
        for name in [classifier] if isinstance(classifier, str) else classifier:
            # the new classifier stays as it was initialised
            state |= {key: value for key, value in wanted.items() if key.startswith(f"{name}.")}
    wrong = [key for key in wanted | state if key not in state or key not in wanted]
    wrong += [key for key in wanted if key in state and wanted[key].shape != state[key].shape]
    if wrong:
        raise UserError(f"model.weights ({origin}) does not fit the recipe's model.args: {some(wrong, 3)} differ")
    target.load_state_dict(state)
