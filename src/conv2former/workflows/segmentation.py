"""Semantic segmentation in the engine's terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conv2former.config import ModelSection
from conv2former.engine.run_dir import RunFolder
from conv2former.errors import UserError
from conv2former.evaluation.segmentation import SegmentationEvaluation, evaluate_pairs, load_segmenter, write_report
from conv2former.tasks.segmentation.data import EvalPairs, TrainPairs
from conv2former.tasks.segmentation.folders import PairSource, PairSplits, open_pairs
from conv2former.tasks.segmentation.task import SegmentationTask, weighted_loss
from conv2former.tasks.segmentation.upernet import UperNet, build_upernet
from conv2former.workflows.dense import DenseWorkflow


class SegmentationWorkflow(DenseWorkflow):
    """UperNet on any hierarchical backbone."""

    headline = "val_miou"
    train_dataset, val_dataset = TrainPairs, EvalPairs

    def open_splits(self, root: Path | None) -> PairSplits:
        """ADE20K's layout or folders of pairs."""
        return open_pairs(self.recipe.data, root, seed=self.recipe.engine.seed)

    def network(self, section: ModelSection, *, num_classes: int) -> UperNet:
        """The segmenter."""
        return build_upernet(section, self.recipe.segmenter, num_classes=num_classes)

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

    def task(self, model: Any, splits: PairSplits) -> SegmentationTask:
        """The LightningModule."""
        return SegmentationTask(model, self.recipe, num_classes=len(splits.train.classes))

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

    def report(self, run: RunFolder, source: PairSource, *, batch_size: int, device: str) -> SegmentationEvaluation:
        """Counts, confusion matrix, overlays."""
        model, saved = load_segmenter(run.best)
        data = self.recipe.data
        evaluation = evaluate_pairs(
            model, source, saved.recipe.data, device=device, workers=data.workers, on_bad_image=data.on_bad_image
        )
        write_report(evaluation, model, source, saved.recipe.data, run.path)
        return evaluation
