"""What every task is to the engine: a LightningModule with exact counts, and a result to compare runs by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from conv2former.config import Recipe
from conv2former.data.loading import Normalizer
from conv2former.engine.batch import plan_batch
from conv2former.engine.optim import build_optimizer, scaled_lr


@dataclass(frozen=True)
class Result:
    """What one pass over the validation set gave, the same on all processes.

    Attributes:
        headline: What is to be maximised, percent.
        figures: Columns of the run's metrics.
        line: The result in words.
        sound: Whether all that was computed was finite; weights of another result are never the best.
    """

    headline: float
    figures: dict[str, float | None]
    line: str
    sound: bool = True


class Task(L.LightningModule):
    """A network with its recipe; ``conv2former.engine.train`` runs it on Fabric.

    With ``optim.ema_decay`` the moving average of the weights is what is validated; the engine updates it.
    Under Lightning's Trainer it trains at the recipe's peak rate: the schedule is the engine's.

    Args:
        model: What is trained.
        recipe: Gives the loss, the optimizer and the schedule.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        self.recipe: Any = recipe
        self.normalizer = Normalizer(recipe.data.mean, recipe.data.std)
        decay = recipe.optim.ema_decay
        self.average = ModelEmaV3(model, decay=decay, use_warmup=True).requires_grad_(False) if decay else None

    @property
    def validated(self) -> Any:
        """The network whose weights are validated and saved."""
        return self.model if self.average is None else self.average.module

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch; random choices draw from the generators that the engine has keyed."""
        raise NotImplementedError

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Counts a batch."""
        raise NotImplementedError

    def result(self) -> Result:
        """Of all batches since ``on_validation_epoch_start``, over all processes; to be called on all of them."""
        raise NotImplementedError

    def prepared(self, images: Tensor) -> Tensor:
        """8-bit pictures (B, 3, H, W) as the network sees them."""
        images = self.normalizer(images)
        return images if self.recipe.engine.channels_last else images.contiguous()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer at the recipe's learning rate for one process; the engine sets each step's rate itself."""
        optim = self.recipe.optim
        return build_optimizer(self.model, optim, lr=scaled_lr(optim, plan_batch(self.recipe, world=1)))
