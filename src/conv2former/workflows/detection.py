"""Object detection and instance segmentation in the engine's terms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from conv2former.checkpoints.dense import save_dense, start_from, with_saved_args
from conv2former.data.coco import CocoSource, CocoSplits, open_coco
from conv2former.data.detection import EvalObjects, TrainObjects
from conv2former.evaluation.detection import DetectionEvaluation, evaluate_objects, load_detector, write_report
from conv2former.heads.backbone import Backbone
from conv2former.heads.detector import Detector, build_detector
from conv2former.processes import say_once
from conv2former.recipes.sections import ModelSection
from conv2former.run import RunFolder
from conv2former.tasks.detection import DetectionTask
from conv2former.workflows.base import Workflow

COUNTED = (800, 1280)  # the image by which the paper's toolbox counts multiply-adds


class DetectionWorkflow(Workflow):
    """Mask R-CNN and Cascade Mask R-CNN on any hierarchical backbone."""

    headline = "val_box_ap"

    def open_splits(self, root: Path | None) -> CocoSplits:
        """COCO's layout, or files of its format that the recipe names."""
        splits = open_coco(self.recipe.data, root)
        self.val = splits.val
        return splits

    def build(self, section: ModelSection, *, classes: Sequence[str]) -> tuple[Detector, dict[str, Any]]:
        """The detector; of the weights it says what was loaded."""
        section = with_saved_args(section)
        backbone = Backbone(section)
        model = build_detector(backbone, widths=backbone.widths, section=self.recipe.detector, num_classes=len(classes))
        if section.weights:
            say_once(start_from(section.weights, model, task="detection"))
        return model, dict(section.args)

    def try_out(self, model: Any) -> None:
        """A small image."""
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, 128, 160), [(128, 160)])

    def at_size(self) -> str:
        """Any size is taken."""
        return "on an image of 128 x 160 pixels"

    def compile(self, model: Any) -> None:
        """The backbone alone, for any size: the rest depends on what is found."""
        model.backbone.compile(dynamic=True)

    def task(self, model: Any, classes: Sequence[str]) -> DetectionTask:
        """The LightningModule."""
        return DetectionTask(model, self.recipe, val=self.val)

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

    def train_data(self, source: CocoSource, *, on_bad_image: Literal["error", "replace"]) -> TrainObjects:
        """Augmented images."""
        recipe = self.recipe
        return TrainObjects(
            source,
            recipe.data,
            recipe.augment,
            seed=recipe.engine.seed,
            on_bad_image=on_bad_image,
            max_pixels=recipe.data.max_pixels,
        )

    def val_data(self, source: CocoSource, *, on_bad_image: Literal["error", "mask"]) -> EvalObjects:
        """Whole images."""
        data = self.recipe.data
        return EvalObjects(source, data, on_bad_image=on_bad_image, max_pixels=data.max_pixels)

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

    def report(self, run: RunFolder, source: CocoSource, *, batch_size: int, device: str) -> DetectionEvaluation:
        """COCO's numbers, the results file, pictures."""
        model, saved = load_detector(run.best)
        data = self.recipe.data
        evaluation = evaluate_objects(
            model, source, saved.recipe.data, device=device, workers=data.workers, on_bad_image=data.on_bad_image
        )
        write_report(evaluation, source, data, run.path)
        return evaluation
