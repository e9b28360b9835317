"""Object detection and instance segmentation: Mask R-CNN and Cascade Mask R-CNN on any hierarchical backbone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from conv2former.checkpoints.exported import ExportedNetwork
from conv2former.config import ModelSection
from conv2former.data.images import shown
from conv2former.data.recognise import read_for
from conv2former.data.rle import decode_mask
from conv2former.errors import UserError, or_left_out
from conv2former.files import replace_text
from conv2former.tasks.base import Evaluation, Exportable, Line, Prediction, Prepared, Reported, Words
from conv2former.tasks.dense import DIVISOR, DenseTask, padded_with_mean, to_multiple
from conv2former.tasks.detection.coco import CocoSource
from conv2former.tasks.detection.config import DetectionRecipe
from conv2former.tasks.detection.data import DetectionBatch, EvalObjects, TrainObjects, View, eval_view, object_mask
from conv2former.tasks.detection.export import ExportedDetector, whole
from conv2former.tasks.detection.folders import CocoSplits, open_coco, open_eval_coco
from conv2former.tasks.detection.metrics import CocoMetric, coco_rows
from conv2former.tasks.detection.model.detector import Detector, Target, build_on_backbone
from conv2former.viz.drawing import colour, side_by_side, titled
from conv2former.viz.drawing import objects as draw_objects

SHOWN = 0.3  # least score of what is drawn
SHEET_IMAGES = 6
EXPORT_NOTE = (
    "of a detector the backbone and the pyramid alone: only --format onnx and openvino have an operation "
    "for the non-maximum suppression that stands behind them"
)


class DetectionTask(DenseTask):
    """A ``Detector``.

    Attributes:
        threshold: Least score of what ``predict`` gives out.
        within: (H, W) of an exported file, into which images are fitted; None for the recipe's size.
    """

    name = "detection"
    config_class = DetectionRecipe
    monitor = "box_ap"
    reported = (
        Reported("mean_average_precision", "box AP, %", ("box", "ap")),
        Reported("mean_average_precision", "mask AP, %", ("mask", "ap")),
    )
    words = Words(
        tags=("object-detection",),
        purpose="to find objects of its classes on an image, each with a box, and a mask if it was trained with masks",
        unknown="it may be taken for something else, or be passed over",
        heading="Objects",
        nothing="Nothing has a score as high as the threshold.",
    )
    options = DenseTask.options | {"threshold"}
    layers = ("boxes", "masks")
    assumed_classes = 80
    threshold: float = SHOWN
    within: tuple[int, int] | None = None

    @classmethod
    def of_exported(cls, network: ExportedNetwork) -> Self:
        task = super().of_exported(network)
        task.model, task.within = ExportedDetector(network, task.recipe.detector), network.size
        return task

    @classmethod
    def network(cls, recipe: DetectionRecipe, section: ModelSection, classes: Sequence[str]) -> Detector:
        return build_on_backbone(section, recipe.detector, num_classes=len(classes))

    def compile(self, *args: Any, **options: Any) -> None:
        """The backbone alone, for any size: the rest depends on what is found."""
        self.model.backbone.compile(*args, dynamic=True, **options)

    @classmethod
    def open_splits(cls, recipe: DetectionRecipe, root: Path | None) -> CocoSplits:
        """COCO's layout, or files of its format that the recipe names."""
        with read_for(cls.name, root):
            return open_coco(recipe.data, root, seed=recipe.engine.seed)

    def eval_source(self, root: Path | None) -> CocoSource:
        return open_eval_coco(self.recipe.data, root, self.classes, self.split)

    def train_dataset(self, source: Any, *, on_bad_image: Literal["error", "replace"]) -> TrainObjects:
        return TrainObjects(source, self.recipe.data, self.recipe.augment, **self.train_options(on_bad_image))

    def eval_dataset(self, source: Any, *, on_bad_image: Literal["error", "mask"], max_pixels: int) -> EvalObjects:
        return EvalObjects(
            source, self.recipe.data, within=self.within, on_bad_image=on_bad_image, max_pixels=max_pixels
        )

    def preprocess(self, image: Image.Image) -> Prepared:
        """The whole image at the size of evaluation."""
        image = shown(image)
        view = eval_view(image, self.recipe.data, self.within)
        return Prepared(view.pixels(image), (image.height, image.width))

    def example_batch(self, count: int) -> DetectionBatch:
        """Of the largest size, landscape, with an object on each."""
        augment = self.recipe.augment
        height, width = to_multiple(max(augment.short_sides)), to_multiple(augment.long_side)
        target = Target(
            torch.tensor([[0.0, 0.0, width / 2, height / 2]]),
            torch.zeros(1, dtype=torch.long),
            torch.ones(1, height, width, dtype=torch.uint8),
        )
        images, sizes = torch.zeros(count, 3, height, width, dtype=torch.uint8), [(height, width)] * count
        return DetectionBatch(images, sizes, [target] * count, sizes, torch.zeros(count, dtype=torch.long))

    def training_step(self, batch: DetectionBatch) -> Tensor:
        images = padded_with_mean(self.prepared(batch.images), batch.sizes)
        losses: dict[str, Tensor] = self.model(images, batch.sizes, batch.targets)
        return torch.stack([*losses.values()]).sum()

    def metric(self, source: CocoSource, *, distributed: bool = False) -> CocoMetric:
        return CocoMetric(source, distributed=distributed, masks=self.recipe.detector.masks)

    def eval_step(self, batch: DetectionBatch, metric: CocoMetric) -> None:
        images = padded_with_mean(self.prepared(batch.images), batch.sizes)
        for row, found in enumerate(self.evaluated(images, batch.sizes)):
            if batch.originals[row][0]:  # else padding, or an image that cannot be read
                index = int(batch.indices[row])
                metric.add(index, found, size=batch.sizes[row], original=batch.originals[row])

    @torch.inference_mode()
    def predict(self, batch: Sequence[Prepared]) -> list[Prediction]:
        """Objects, the most certain first.

        ``objects`` is a list of ``label``, ``index``, ``score``, ``box`` (x0, y0, x1, y1 in the pixels of the file)
        and ``mask`` as COCO's compressed run lengths (``size``, ``counts``).
        """
        section = self.model.section
        least = min(self.threshold, section.score_threshold)
        if self.within and self.threshold != SHOWN and least < section.score_threshold:
            raise UserError(
                f"--threshold {least:g}: the file leaves out scores below {section.score_threshold:g}, give that or "
                "more, or the run"
            )
        self.model.section = section.model_copy(update=dict(score_threshold=least))
        try:
            return [self._predicted(prepared) for prepared in batch]
        finally:
            self.model.section = section

    def _predicted(self, prepared: Prepared) -> Prediction:
        height, width = prepared.pixels.shape[:2]
        (found,) = self.model(self.inputs(prepared.pixels), [(height, width)])
        rows = coco_rows(found, size=(height, width), original=prepared.size)
        rows = [row for row in rows if row["score"] >= self.threshold]
        objects, lines = [], []
        for tint, row in enumerate(rows):
            label, (left, top, across, down) = self.classes[row["label"]], row["bbox"]
            box = [left, top, left + across, top + down]
            objects.append(
                dict(label=label, index=row["label"], score=row["score"], box=box, mask=row.get("segmentation"))
            )
            lines.append(Line(label, row["score"], colour(tint), box, row.get("segmentation")))
        return Prediction(dict(objects=objects), partial(draw_rows, rows=rows, classes=self.classes), lines)

    def draw(self, evaluation: Evaluation, source: CocoSource, folder: Path) -> None:
        """``detections.json`` (COCO's results) and ``predictions.png``: ground truth beside detections."""
        replace_text(folder / "detections.json", json.dumps(evaluation.records) + "\n")
        with or_left_out("predictions.png"):
            _sheet(evaluation.records, source, self.recipe.data.max_pixels).save(folder / "predictions.png")

    def exportable(self, size: tuple[int, int] | None = None) -> Exportable:
        """Backbone and pyramid; for ONNX everything."""
        data = self.recipe.data
        height, width = size or (to_multiple(data.short_side), to_multiple(data.long_side))
        if height % DIVISOR or width % DIVISOR:
            raise UserError(f"--size {height} {width}: a detector takes multiples of {DIVISOR}")
        outputs = ["p2", "p3", "p4", "p5", "p6"]
        part = self.exported(Maps(self.model), outputs, (height, width), part="backbone and pyramid", note=EXPORT_NOTE)
        part.any_size, part.in_onnx = False, whole(self.model, part.config, (height, width))
        return part


class Maps(nn.Module):
    """The part of a detector that comes before its proposals."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone, self.pyramid = model.backbone, model.pyramid

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> five maps (B, C, H / s, W / s), s = 4, 8, 16, 32, 64."""
        return tuple(self.pyramid(self.backbone(images)))


def draw_rows(image: Image.Image, rows: list[dict[str, Any]], classes: list[str]) -> Image.Image:
    """The image with ``coco_rows``, a colour for each, the least certain first, so that the others lie on top."""
    tints = sorted(range(len(rows)), key=lambda index: rows[index]["score"])
    rows = [rows[index] for index in tints]
    boxes = [(x, y, x + width, y + height) for x, y, width, height in (row["bbox"] for row in rows)]
    captions = [f"{classes[row['label']]} {row['score']:.0%}" for row in rows]
    masks = (decode_mask(row["segmentation"]) if "segmentation" in row else None for row in rows)
    return draw_objects(image, boxes, captions, tints, masks)


def _sheet(results: list[dict[str, Any]], source: CocoSource, max_pixels: int) -> Image.Image:
    labels = {number: label for label, number in enumerate(source.category_ids)}
    rows = []
    for index in np.linspace(0, len(source) - 1, min(SHEET_IMAGES, len(source))).astype(int):
        try:
            image, objects = source.load(int(index), max_pixels)
        except UserError:  # it was reported before
            continue
        single = [entry for entry in objects if not entry.get("iscrowd")]
        boxes = [(x, y, x + width, y + height) for x, y, width, height in (entry["bbox"] for entry in single)]
        own = [labels[entry["category_id"]] for entry in single]
        whole = View((0, 0, *image.size), image.size)
        masks = [object_mask(entry["segmentation"], whole) if "segmentation" in entry else None for entry in single]
        truth = draw_objects(image, boxes, [source.classes[label] for label in own], range(len(own)), masks)
        number = source.entries[int(index)].id
        found = [
            row | dict(label=labels[row["category_id"]])
            for row in results
            if row["image_id"] == number and row["score"] >= SHOWN
        ]
        pair = [truth, draw_rows(image, found, source.classes)]
        for image in pair:
            image.thumbnail((600, 600))
        rows.append(side_by_side(titled(pair, ("ground truth", f"detections of {SHOWN:.0%} and more"))))
    return side_by_side(rows, vertical=True)
