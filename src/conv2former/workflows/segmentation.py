"""Semantic segmentation in the engine's terms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from conv2former.checkpoints.dense import save_dense, start_from, with_saved_args
from conv2former.data.pairs import PairSource, PairSplits, open_pairs
from conv2former.data.segmentation import EvalPairs, TrainPairs
from conv2former.errors import UserError
from conv2former.evaluation.segmentation import SegmentationEvaluation, evaluate_pairs, load_segmenter, write_report
from conv2former.heads.upernet import UperNet, build_upernet
from conv2former.processes import say_once
from conv2former.recipes.sections import ModelSection
from conv2former.run import RunFolder
from conv2former.tasks.segmentation import SegmentationTask, weighted_loss
from conv2former.workflows.base import Workflow


class SegmentationWorkflow(Workflow):
    """UperNet on any hierarchical backbone."""

    headline = "val_miou"

    def open_splits(self, root: Path | None) -> PairSplits:
        """ADE20K's layout or folders of pairs."""
        return open_pairs(self.recipe.data, root, seed=self.recipe.engine.seed)

    def build(self, section: ModelSection, *, classes: Sequence[str]) -> tuple[UperNet, dict[str, Any]]:
        """The segmenter; of the weights it says what was loaded."""
        section = with_saved_args(section)
        model = build_upernet(section, self.recipe.segmenter, num_classes=len(classes))
        if section.weights:
            say_once(start_from(section.weights, model, task="segmentation"))
        return model, dict(section.args)

    def try_out(self, model: Any) -> None:
        """One crop."""
        side = self.recipe.data.crop_size
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, side, side))

    def at_size(self) -> str:
        """Where the size stands."""
        return f"at data.crop_size={self.recipe.data.crop_size}"

    def check_batch(self, per_process: int, world: int) -> None:
        """Batch norm on the average of a whole map needs two of them."""
        together = per_process * (world if self.recipe.engine.sync_batchnorm else 1)
        if together < 2:
            raise UserError(
                "a process has one image at a time, on which the decoder's batch norm cannot be trained: raise "
                "optim.batch_size (and optim.global_batch), or set engine.sync_batchnorm=true on several processes"
            )

    def task(self, model: Any, classes: Sequence[str]) -> SegmentationTask:
        """The LightningModule."""
        return SegmentationTask(model, self.recipe, num_classes=len(classes))

    def train_shape(self) -> tuple[int, int]:
        """The crop."""
        return self.recipe.data.crop_size, self.recipe.data.crop_size

    def trial_loss(self, model: Any, images: Tensor) -> Tensor:
        """Both losses."""
        labels = images.new_zeros((len(images), *images.shape[-2:]), dtype=torch.long)
        return weighted_loss(model(images), labels, aux_weight=self.recipe.segmenter.aux_weight)

    def counts(self, model: Any, *, classes: int) -> list[str]:
        """Parameters of each part, multiply-adds as the paper counts them, at 512 x 2048 (Table 9)."""
        return self.count_lines(model, image=(512, 2048), parts=("backbone", "decoder", "classifier", "auxiliary"))

    def train_data(self, source: PairSource, *, on_bad_image: Literal["error", "replace"]) -> TrainPairs:
        """Augmented crops."""
        recipe = self.recipe
        return TrainPairs(
            source,
            recipe.data,
            recipe.augment,
            seed=recipe.engine.seed,
            on_bad_image=on_bad_image,
            max_pixels=recipe.data.max_pixels,
        )

    def val_data(self, source: PairSource, *, on_bad_image: Literal["error", "mask"]) -> EvalPairs:
        """Whole images at one scale."""
        data = self.recipe.data
        return EvalPairs(source, data, on_bad_image=on_bad_image, max_pixels=data.max_pixels)

    def save(
        self,
        model: nn.Module,
        folder: Path,
        *,
        state: dict[str, Tensor],
        classes: list[str],
        model_args: dict[str, Any],
        note: dict[str, Any],
    ) -> None:
        """Our folder for detectors and segmenters."""
        save_dense(folder, self.recipe, state=state, classes=classes, model_args=model_args, note=note)

    def report(self, run: RunFolder, source: PairSource, *, batch_size: int, device: str) -> SegmentationEvaluation:
        """Counts, confusion matrix, overlays."""
        model, saved = load_segmenter(run.best)
        data = self.recipe.data
        evaluation = evaluate_pairs(
            model, source, saved.recipe.data, device=device, workers=data.workers, on_bad_image=data.on_bad_image
        )
        write_report(evaluation, model, source, saved.recipe.data, run.path)
        return evaluation
