"""Object detection and instance segmentation in the engine's terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conv2former.config import ModelSection
from conv2former.engine.run_dir import RunFolder
from conv2former.evaluation.detection import DetectionEvaluation, evaluate_objects, load_detector, write_report
from conv2former.tasks.detection.coco import CocoSource, CocoSplits, open_coco
from conv2former.tasks.detection.data import EvalObjects, TrainObjects
from conv2former.tasks.detection.model.detector import Detector, build_on_backbone
from conv2former.tasks.detection.task import DetectionTask
from conv2former.workflows.dense import DenseWorkflow

COUNTED = (800, 1280)  # the image by which the paper's toolbox counts multiply-adds


class DetectionWorkflow(DenseWorkflow):
    """Mask R-CNN and Cascade Mask R-CNN on any hierarchical backbone."""

    headline = "val_box_ap"
    train_dataset, val_dataset = TrainObjects, EvalObjects

    def open_splits(self, root: Path | None) -> CocoSplits:
        """COCO's layout, or files of its format that the recipe names."""
        return open_coco(self.recipe.data, root)

    def network(self, section: ModelSection, *, num_classes: int) -> Detector:
        """The detector."""
        return build_on_backbone(section, self.recipe.detector, num_classes=num_classes)

    def try_out(self, model: Any) -> None:
        """A small image."""
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, 128, 160), [(128, 160)])

    def at_size(self) -> str:
        """Any size is taken."""
        return "on an image of 128 x 160 pixels"

    def compile(self, model: Any) -> None:
        """The backbone alone, for any size: the rest depends on what is found."""
        model.backbone.compile(dynamic=True, **self.compile_options)

    def task(self, model: Any, splits: CocoSplits) -> DetectionTask:
        """The LightningModule."""
        return DetectionTask(model, self.recipe, val=splits.val)

    def train_shape(self) -> tuple[int, int]:
        """The largest, lying, with sides that are multiples of 32."""
        augment = self.recipe.augment
        return tuple(-(-side // 32) * 32 for side in (max(augment.short_sides), augment.long_side))  # type: ignore

    def trial_loss(self, model: Any, images: Tensor) -> Tensor:
        """All convolutions on whole images, and the heads on as many boxes as a step has."""
        section, count = self.recipe.detector, len(images)
        maps = model.pyramid(model.backbone(images))
        logits, offsets = model.rpn.head(maps)
        total = torch.stack([part.float().sum() for part in (*logits, *offsets)]).sum()
        stage: Any
        for stage in model.stages:
            rois = images.new_zeros(count * section.rois, section.channels, 7, 7)
            found = images.new_zeros(count * section.rois // 4, section.channels, 14, 14)
            for head, boxes in ((stage.box_head, rois), (stage.mask_head, found)):
                outputs = head(boxes)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                total = total + torch.stack([part.float().sum() for part in outputs]).sum()
        return total

    def counts(self, model: Any, *, classes: int) -> list[str]:
        """Parameters of each part; multiply-adds of all but the boxes' interpolation, with 512 boxes and 128 masks."""
        return self.count_lines(model, image=COUNTED, parts=("backbone", "pyramid", "rpn", "stages"))

    def run_for_counts(self, model: Any, images: Tensor) -> None:
        """As in training: the number of boxes in evaluation depends on the picture."""
        self.trial_loss(model, images)

    def report(self, run: RunFolder, source: CocoSource, *, batch_size: int, device: str) -> DetectionEvaluation:
        """COCO's numbers, the results file, pictures."""
        model, saved = load_detector(run.best)
        data = self.recipe.data
        evaluation = evaluate_objects(
            model, source, saved.recipe.data, device=device, workers=data.workers, on_bad_image=data.on_bad_image
        )
        write_report(evaluation, source, data, run.path)
        return evaluation
