"""Evaluation of a trained detector: COCO's twelve numbers for boxes and masks, a results file, pictures."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from conv2former.checkpoints.dense import SavedDense, load_dense, read_dense
from conv2former.data.loading import Normalizer, eval_loader
from conv2former.data.rle import decode_mask
from conv2former.data.sampling import EvalSampler
from conv2former.engine.devices import pick_device
from conv2former.engine.run_dir import RunFolder
from conv2former.errors import UserError, one_line
from conv2former.evaluation.common import EvaluateOptions, announced, report_folder, validation_set
from conv2former.files import replace_text
from conv2former.recipes.load import with_settings
from conv2former.tasks.detection.coco import CocoSource, open_eval_coco
from conv2former.tasks.detection.config import DetectionDataSection
from conv2former.tasks.detection.data import EvalObjects, eval_view, pack
from conv2former.tasks.detection.model.detector import Detector, build_on_backbone
from conv2former.tasks.detection.task import CocoResults, coco_rows, figures_line
from conv2former.tasks.segmentation.task import padded_with_mean
from conv2former.viz.drawing import objects as draw_objects
from conv2former.viz.drawing import side_by_side

SHOWN = 0.3  # least score of what is drawn
SHEET_IMAGES = 6


@dataclass(frozen=True)
class DetectionEvaluation:
    """What a detector found on a set of images.

    Attributes:
        found: ``CocoResults.compute``.
        rows: All detections as COCO's results.
        seconds: Wall time in all, and of it in the network.
    """

    found: dict[str, Any]
    rows: list[dict[str, Any]]
    seconds: tuple[float, float]

    def figures(self) -> dict[str, Any]:
        """What goes into the run's history, percent."""
        return dict(box_ap=self.found["box"]["ap"], mask_ap=self.found["mask"]["ap"])

    def line(self) -> str:
        """The figures in words."""
        return figures_line(self.found)

    def to_json(self) -> dict[str, Any]:
        """COCO's numbers, and the time that it took."""
        return self.found | dict(seconds=round(self.seconds[0], 2), seconds_in_network=round(self.seconds[1], 2))


def load_detector(path: Path) -> tuple[Detector, SavedDense]:
    """The model of a run folder or a saved one, in evaluation mode; raises UserError."""
    saved = read_dense(path, "detection")
    model = build_on_backbone(saved.recipe.model, saved.recipe.detector, num_classes=len(saved.classes))
    load_dense(saved, model)
    return model, saved


@torch.inference_mode()
def evaluate_objects(
    model: Detector,
    source: CocoSource,
    data: DetectionDataSection,
    *,
    device: str = "auto",
    workers: int = 0,
    on_bad_image: Literal["error", "skip"] = "error",
) -> DetectionEvaluation:
    """Runs the model over every image once; with ``on_bad_image='skip'`` leaves out those that cannot be read.

    Raises:
        UserError: An image that cannot be read.
    """
    place = pick_device(device)
    model.eval().to(place)
    masking: Any = "mask" if on_bad_image == "skip" else "error"
    dataset = EvalObjects(source, data, on_bad_image=masking, max_pixels=data.max_pixels)
    loader = eval_loader(dataset, EvalSampler(len(dataset)), batch_size=1, workers=workers, place=place)
    normalizer = Normalizer(data.mean, data.std).to(place)
    results, network, started = CocoResults(source), 0.0, time.perf_counter()
    for batch in announced(loader):
        if batch.bad:
            continue
        begun = time.perf_counter()
        images = padded_with_mean(normalizer(batch.images.to(place)), batch.sizes)
        (found,) = model(images, batch.sizes)
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        network += time.perf_counter() - begun
        results.add(int(batch.indices[0]), found, size=batch.sizes[0], original=batch.originals[0])
    if not results.seen:
        raise UserError("none of the images can be read: nothing was evaluated")
    figures = results.compute()
    return DetectionEvaluation(figures, results.rows, (time.perf_counter() - started, network))


@torch.inference_mode()
def detect(model: Detector, image: Image.Image, data: DetectionDataSection) -> list[dict[str, Any]]:
    """The objects on a picture as ``coco_rows`` gives them; the model's own device is used."""
    place = next(model.parameters()).device
    picture = eval_view(image, data).picture(image)
    sizes = [(picture.shape[0], picture.shape[1])]
    normalizer = Normalizer(data.mean, data.std).to(place)
    images = padded_with_mean(normalizer(pack([picture]).to(place)), sizes)
    (found,) = model(images, sizes)
    return coco_rows(found, size=sizes[0], original=(image.height, image.width))


def draw_rows(image: Image.Image, rows: list[dict[str, Any]], classes: list[str]) -> Image.Image:
    """The picture with objects, the least certain first, so that the others lie on top."""
    rows = sorted(rows, key=lambda row: row["score"])
    boxes = [(x, y, x + width, y + height) for x, y, width, height in (row["bbox"] for row in rows)]
    captions = [f"{classes[row['label']]} {row['score']:.0%}" for row in rows]
    masks = (decode_mask(row["segmentation"]) for row in rows)
    return draw_objects(image, boxes, captions, [row["label"] for row in rows], masks)


def evaluate_detector(checkpoint: Path, options: EvaluateOptions) -> tuple[DetectionEvaluation, Path | None]:
    """``conv2former.evaluation.evaluate`` for a detector."""
    model, saved = load_detector(checkpoint)
    data = with_settings(saved.recipe, [*options.settings], section="data").data
    run = RunFolder(checkpoint)
    if options.data is None and run.exists():
        source = validation_set(run).val
    else:
        source = open_eval_coco(data, options.data, saved.classes)
    evaluation = evaluate_objects(
        model, source, data, device=options.device, workers=options.workers, on_bad_image=options.on_bad_image
    )
    folder = report_folder(run, options)
    if folder:
        write_report(evaluation, source, data, folder)
    return evaluation, folder


def write_report(evaluation: DetectionEvaluation, source: CocoSource, data: DetectionDataSection, folder: Path) -> None:
    """``evaluation.json``, ``detections.json`` (COCO's results) and ``predictions.png``: truth beside detections.

    Raises:
        UserError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "evaluation.json", json.dumps(evaluation.to_json(), indent=2) + "\n")
        replace_text(folder / "detections.json", json.dumps(evaluation.rows) + "\n")
        _sheet(evaluation, source, data).save(folder / "predictions.png")
    except OSError as error:
        raise UserError(f"cannot write the report to {folder}: {one_line(error)}") from None


def _sheet(evaluation: DetectionEvaluation, source: CocoSource, data: DetectionDataSection) -> Image.Image:
    labels = {number: label for label, number in enumerate(source.category_ids)}
    rows = []
    for index in np.linspace(0, len(source) - 1, min(SHEET_IMAGES, len(source))).astype(int):
        try:
            image, objects = source.load(int(index), data.max_pixels)
        except UserError:  # it was reported before
            continue
        single = [entry for entry in objects if not entry.get("iscrowd")]
        boxes = [(x, y, x + width, y + height) for x, y, width, height in (entry["bbox"] for entry in single)]
        own = [labels[entry["category_id"]] for entry in single]
        truth = draw_objects(image, boxes, [source.classes[label] for label in own], own, [None] * len(own))
        number = source.entries[int(index)].id
        found = [
            row | dict(label=labels[row["category_id"]])
            for row in evaluation.rows
            if row["image_id"] == number and row["score"] >= SHOWN
        ]
        pair = [truth, draw_rows(image, found, source.classes)]
        for picture in pair:
            picture.thumbnail((600, 600))
        rows.append(side_by_side(pair))
    return side_by_side(rows, vertical=True)
