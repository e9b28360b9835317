"""Evaluation of a trained segmenter: mIoU and accuracies, a confusion matrix, overlays."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from conv2former.checkpoints.dense import SavedDense, load_dense, read_dense
from conv2former.data.loading import Normalizer, eval_loader
from conv2former.data.sampling import EvalSampler
from conv2former.engine.devices import pick_device
from conv2former.engine.run_dir import RunFolder
from conv2former.errors import UserError, one_line
from conv2former.evaluation.common import EvaluateOptions, announced, report_folder, validation_set
from conv2former.files import replace_text
from conv2former.recipes.load import with_settings
from conv2former.tasks.segmentation.config import SegmentationDataSection
from conv2former.tasks.segmentation.data import EvalPairs, views
from conv2former.tasks.segmentation.folders import PairSource, open_eval_pairs
from conv2former.tasks.segmentation.task import SegmentationCounts, probability_bands
from conv2former.tasks.segmentation.upernet import UperNet, build_upernet
from conv2former.viz import plots
from conv2former.viz.drawing import label_overlay, legend, side_by_side

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of multi-scale evaluation (Sec. 4.6)
SHEET_IMAGES = 6


@dataclass(frozen=True)
class SegmentationEvaluation:
    """What a segmenter made of a set of images in K classes.

    Attributes:
        counts: ``SegmentationCounts.compute``.
        classes: K names.
        multi_scale: Whether every image was seen at six scales and mirrored.
    """

    counts: dict[str, Any]
    classes: list[str]
    multi_scale: bool = False

    def figures(self) -> dict[str, Any]:
        """What goes into the run's history, percent."""
        return dict(miou=self.counts["miou"], pixel_accuracy=self.counts["pixel_accuracy"])

    def line(self) -> str:
        """The figures in words."""
        counts = self.counts
        how = "multi-scale " if self.multi_scale else ""
        return (
            f"{how}mIoU {counts['miou']:.2f}%, mean accuracy {counts['mean_accuracy']:.2f}%, pixel accuracy "
            f"{counts['pixel_accuracy']:.2f}% ({counts['images']} images)"
        )

    def to_json(self) -> dict[str, Any]:
        """The figures, with IoU and accuracy per class by name, percent; None where a class does not occur."""
        per_class = {
            name: dict(iou=iou, accuracy=accuracy)
            for name, iou, accuracy in zip(self.classes, self.counts["iou"], self.counts["accuracy"], strict=True)
        }
        own = {key: value for key, value in self.counts.items() if key not in ("iou", "accuracy")}
        return own | dict(multi_scale=self.multi_scale, per_class=per_class)


def load_segmenter(path: Path) -> tuple[UperNet, SavedDense]:
    """The model of a run folder or a saved one, in evaluation mode; raises UserError."""
    saved = read_dense(path, "segmentation")
    model = build_upernet(saved.recipe.model, saved.recipe.segmenter, num_classes=len(saved.classes))
    load_dense(saved, model)
    return model, saved


@torch.inference_mode()
def evaluate_pairs(
    model: UperNet,
    source: PairSource,
    data: SegmentationDataSection,
    *,
    device: str = "auto",
    workers: int = 0,
    on_bad_image: Literal["error", "skip"] = "error",
    multi_scale: bool = False,
) -> SegmentationEvaluation:
    """Runs the model over every image once; with ``on_bad_image='skip'`` leaves out those that cannot be read.

    Raises:
        UserError: An image or a label map that cannot be read.
    """
    place = pick_device(device)
    model.eval().to(place)
    masking: Any = "mask" if on_bad_image == "skip" else "error"
    scales = SCALES if multi_scale else (1.0,)
    dataset = EvalPairs(source, data, scales=scales, on_bad_image=masking, max_pixels=data.max_pixels)
    loader = eval_loader(dataset, EvalSampler(len(dataset)), batch_size=1, workers=workers, place=place)
    normalizer = Normalizer(data.mean, data.std).to(place)
    counts = SegmentationCounts(len(source.classes), sync_on_compute=False).to(place)
    for batch in announced(loader):
        if batch.bad:
            continue
        images = [normalizer(view.to(place)) for view in batch.images]
        labels = batch.labels.to(place)
        size: Any = labels.shape[-2:]
        counts.update(probability_bands(model, images, data, size=size, mirror=multi_scale), labels)
    found = counts.compute()
    if not found["images"]:
        raise UserError("none of the images can be read, or none has a labelled pixel: nothing was evaluated")
    return SegmentationEvaluation(found, source.classes, multi_scale)


@torch.inference_mode()
def segment(model: UperNet, image: Image.Image, data: SegmentationDataSection) -> np.ndarray:
    """The class of every pixel of a picture, (H, W) of uint8; the model's own device is used."""
    place = next(model.parameters()).device
    (pixels,) = views(image, data, (1.0,))
    normalizer = Normalizer(data.mean, data.std).to(place)
    view = normalizer(torch.from_numpy(pixels).permute(2, 0, 1)[None].to(place))
    bands = probability_bands(model, [view], data, size=(image.height, image.width))
    return torch.cat([band.argmax(dim=1)[0].to(torch.uint8) for _, band in bands]).cpu().numpy()


def evaluate_segmenter(checkpoint: Path, options: EvaluateOptions) -> tuple[SegmentationEvaluation, Path | None]:
    """``conv2former.evaluation.evaluate`` for a segmenter."""
    model, saved = load_segmenter(checkpoint)
    data = with_settings(saved.recipe, [*options.settings], section="data").data
    run = RunFolder(checkpoint)
    if options.data is None and run.exists():
        source = validation_set(run).val
    else:
        source = open_eval_pairs(data, options.data, saved.classes)
    evaluation = evaluate_pairs(
        model,
        source,
        data,
        device=options.device,
        workers=options.workers,
        on_bad_image=options.on_bad_image,
        multi_scale=options.multi_scale,
    )
    folder = report_folder(run, options)
    if folder:
        write_report(evaluation, model, source, data, folder)
    return evaluation, folder


def write_report(
    evaluation: SegmentationEvaluation, model: UperNet, source: PairSource, data: SegmentationDataSection, folder: Path
) -> None:
    """``evaluation.json``, ``confusion_matrix.png`` and ``predictions.png``: picture, truth and prediction.

    Raises:
        UserError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "evaluation.json", json.dumps(evaluation.to_json(), indent=2) + "\n")
        plots.confusion_matrix(np.array(evaluation.counts["matrix"]), source.classes, folder / "confusion_matrix.png")
        _sheet(model, source, data).save(folder / "predictions.png")
    except OSError as error:
        raise UserError(f"cannot write the report to {folder}: {one_line(error)}") from None


def _sheet(model: UperNet, source: PairSource, data: SegmentationDataSection) -> Image.Image:
    rows, seen = [], set()
    for index in np.linspace(0, len(source) - 1, min(SHEET_IMAGES, len(source))).astype(int):
        try:
            image, truth = source.load(int(index), data.max_pixels)
        except UserError:  # it was reported before
            continue
        found = segment(model, image, data)
        seen |= {*np.unique(truth), *np.unique(found)}
        small = image.copy()
        small.thumbnail((400, 400))
        overlays = (label_overlay(image, labels).resize(small.size) for labels in (truth, found))
        rows.append(side_by_side([small, *overlays]))
    sheet = side_by_side(rows, vertical=True)
    return side_by_side([sheet, legend(source.classes, sorted(seen), width=sheet.width)], vertical=True)
