"""Semantic segmentation: UperNet on any hierarchical backbone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from conv2former.config import ModelSection
from conv2former.data.images import shown
from conv2former.data.recognise import read_for
from conv2former.data.rle import encode_mask
from conv2former.errors import UserError, or_left_out
from conv2former.tasks.base import Evaluation, Exportable, Line, Prediction, Prepared, Reported, Words
from conv2former.tasks.dense import DIVISOR, DenseTask, padded_with_mean
from conv2former.tasks.segmentation.config import SegmentationRecipe
from conv2former.tasks.segmentation.data import EvalPairs, SegmentationBatch, TrainPairs, views
from conv2former.tasks.segmentation.folders import PairSource, PairSplits, open_eval_pairs, open_pairs
from conv2former.tasks.segmentation.inference import probability_bands
from conv2former.tasks.segmentation.losses import weighted_loss
from conv2former.tasks.segmentation.palettes import class_colours
from conv2former.tasks.segmentation.upernet import UperNet, build_upernet, resize
from conv2former.tasks.segmentation.values import class_values
from conv2former.viz.drawing import label_overlay, legend, side_by_side, titled

if TYPE_CHECKING:
    from conv2former.tasks.segmentation.metrics import SegmentationMetric

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of multi-scale evaluation (Sec. 4.6)
SHEET_IMAGES = 6


class SegmentationTask(DenseTask):
    """An ``UperNet``.

    Attributes:
        multi_scale: Whether evaluation sees every image at six scales and mirrored.
    """

    name = "segmentation"
    config_class = SegmentationRecipe
    monitor = "miou"
    reported = (
        Reported("mean_iou", "mIoU, %", ("miou",)),
        Reported("accuracy", "pixel accuracy, %", ("pixel_accuracy",)),
    )
    words = Words(
        tags=("image-segmentation",),
        purpose="to give each pixel of an image one of its classes",
        unknown="every pixel gets a class",
        heading="Fraction of the pixels",
    )
    options = DenseTask.options | {"multi_scale"}
    layers = ("masks",)
    assumed_classes = 150
    multi_scale: bool = False
    _values: np.ndarray | None = None  # of the classes in masks, once some were written

    @classmethod
    def network(cls, recipe: SegmentationRecipe, section: ModelSection, classes: Sequence[str]) -> UperNet:
        return build_upernet(section, recipe.segmenter, num_classes=len(classes))

    @classmethod
    def open_splits(cls, recipe: SegmentationRecipe, root: Path | None) -> PairSplits:
        """ADE20K's layout, or folders of images and masks."""
        with read_for(cls.name, root):
            return open_pairs(recipe.data, root, seed=recipe.engine.seed)

    def eval_source(self, root: Path | None) -> PairSource:
        """The validation set, or the one set that is there."""
        return open_eval_pairs(self.recipe.data, root, self.classes, self.split)

    def train_dataset(self, source: Any, *, on_bad_image: Literal["error", "replace"]) -> TrainPairs:
        return TrainPairs(source, self.recipe.data, self.recipe.augment, **self.train_options(on_bad_image))

    def eval_dataset(self, source: Any, *, on_bad_image: Literal["error", "mask"], max_pixels: int) -> EvalPairs:
        scales = SCALES if self.multi_scale else (1.0,)
        options: Any = dict(on_bad_image=on_bad_image, max_pixels=max_pixels)
        return EvalPairs(source, self.recipe.data, scales=scales, **options)

    def preprocess(self, image: Image.Image) -> Prepared:
        """The whole image at the size of evaluation."""
        image = shown(image)
        return Prepared(views(image, self.recipe.data, (1.0,))[0], (image.height, image.width))

    def example_batch(self, count: int) -> SegmentationBatch:
        """Crops of one class."""
        side = self.recipe.data.crop_size
        images = torch.zeros(count, 3, side, side, dtype=torch.uint8)
        return SegmentationBatch([images], [(side, side)] * count, images[:, 0], torch.zeros(count, dtype=torch.long))

    def check_batch(self, per_process: int, world: int) -> None:
        """Batch norm on the average of a whole map needs two of them."""
        together = per_process * (world if self.recipe.engine.sync_batchnorm else 1)
        if together < 2:
            raise UserError(
                "a process has one image at a time, on which the decoder's batch norm cannot be trained: raise "
                "optim.batch_size (and optim.global_batch), or set engine.sync_batchnorm=true on several processes"
            )

    def training_step(self, batch: SegmentationBatch) -> Tensor:
        """The decoder's loss and the weighted auxiliary one."""
        images = padded_with_mean(self.prepared(batch.images[0]), batch.sizes)
        return weighted_loss(self.model(images), batch.masks.long(), aux_weight=self.recipe.segmenter.aux_weight)

    def metric(self, source: Any, *, distributed: bool = False) -> SegmentationMetric:
        from conv2former.tasks.segmentation.metrics import SegmentationMetric  # torchmetrics loads for seconds

        return SegmentationMetric(self.classes, distributed=distributed, multi_scale=self.multi_scale)

    def eval_step(self, batch: SegmentationBatch, metric: SegmentationMetric) -> None:
        images = [self.prepared(view) for view in batch.images]
        size: Any = batch.masks.shape[-2:]
        mirror = self.multi_scale
        metric.update(
            probability_bands(self.evaluated, images, self.recipe.data, size=size, mirror=mirror), batch.masks
        )

    def segment(self, prepared: Prepared) -> np.ndarray:
        """The class of every pixel of an image, (H, W) of uint8."""
        view = super(DenseTask, self).inputs(prepared.pixels)  # windows are padded one by one
        bands = probability_bands(self.model, [view], self.recipe.data, size=prepared.size)
        return torch.cat([band.argmax(dim=1)[0].to(torch.uint8) for _, band in bands]).cpu().numpy()

    @torch.inference_mode()
    def predict(self, batch: Sequence[Prepared]) -> list[Prediction]:
        """The classes of the pixels.

        ``classes`` is a list of ``label``, ``index``, ``share`` of the pixels and the ``mask`` as COCO's compressed
        run lengths (``size``, ``counts``), the largest first.
        """
        return [self._predicted(prepared) for prepared in batch]

    def _predicted(self, prepared: Prepared) -> Prediction:
        mask = self.segment(prepared)
        indices, counts = np.unique(mask, return_counts=True)
        found, lines, colours = [], [], class_colours(self.classes)
        for index, count in sorted(zip(indices.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1]):
            label, fraction = self.classes[index], count / mask.size
            encoded = encode_mask(mask == index)
            found.append(dict(label=label, index=index, share=fraction, mask=encoded))
            lines.append(Line(label, fraction, colours[index], mask=encoded))
        drawn = partial(draw_classes, mask=mask, classes=self.classes)
        return Prediction(dict(classes=found), drawn, lines, mask=partial(self._stored, mask))

    def _stored(self, mask: np.ndarray) -> Image.Image:
        """The classes (H, W) as a mask of the data set holds them."""
        data = self.recipe.data
        if self._values is None:
            self._values = class_values(data.mask_values, self.classes, first=int(data.reduce_zero_label))
        return Image.fromarray(self._values[mask])

    def draw(self, evaluation: Evaluation, source: PairSource, folder: Path) -> None:
        """``confusion_matrix.png`` and ``predictions.png``: image, ground truth and prediction."""
        from conv2former.viz.plots import confusion_matrix  # matplotlib loads for a second

        with or_left_out("confusion_matrix.png"):
            confusion_matrix(np.array(evaluation.details["matrix"]), self.classes, folder / "confusion_matrix.png")
        with or_left_out("predictions.png"):
            _sheet(self, source).save(folder / "predictions.png")

    def scores(self) -> nn.Module:
        """For each class the sum of its logits over the pixels that are found to be of it."""
        return ClassSum(self.model)

    def exportable(self, size: tuple[int, int] | None = None) -> Exportable:
        """The network without its auxiliary head, its logits at the size of the images."""
        crop = self.recipe.data.crop_size
        if size and any(side % DIVISOR for side in size):
            raise UserError(
                f"--size {size[0]} {size[1]}: images are padded to multiples of {DIVISOR}, so give such sides"
            )
        return self.exported(WholeSize(self.model), ["logits"], size or (crop, crop))


class WholeSize(nn.Module):
    """A segmentation model whose logits have the size of its images."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone, self.decoder, self.classifier = model.backbone, model.decoder, model.classifier

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, K, H, W)."""
        return resize(self.classifier(self.decoder(self.backbone(images))), images)


class ClassSum(nn.Module):
    """A segmentation model as a classifier (Vinogradova et al., arXiv:2002.11434).

    Attributes:
        mask: The classes that were found at the last call, (H, W), the padding cut off.
        size: Height and width of the view without padding.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.mask = torch.empty(0)
        self.size = (0, 0)

    def forward(self, image: Tensor) -> Tensor:
        """(1, 3, H, W) -> for each class the sum of its logits over the pixels that are found to be of it, (1, K)."""
        logits = resize(self.network(image), image)[..., : self.size[0], : self.size[1]]
        self.mask = logits[0].argmax(dim=0)
        found = torch.stack([self.mask == index for index in range(logits.shape[1])])
        return (logits * found[None]).sum(dim=(2, 3))


def draw_classes(image: Image.Image, mask: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """The image with its classes in colour, and what the colours mean below."""
    colours = class_colours(classes)
    overlay = label_overlay(image, mask, colours)
    names = legend(classes, colours, np.unique(mask), width=max(overlay.width, 240))
    return side_by_side([overlay, names], vertical=True)


@torch.inference_mode()
def _sheet(task: SegmentationTask, source: PairSource) -> Image.Image:
    rows, seen, colours = [], set(), class_colours(task.classes)
    for index in np.linspace(0, len(source) - 1, min(SHEET_IMAGES, len(source))).astype(int):
        try:
            image, truth = source.load(int(index), task.recipe.data.max_pixels)
        except UserError:  # it was reported before
            continue
        found = task.segment(task.preprocess(image))
        seen |= {*np.unique(truth), *np.unique(found)}
        small = image.copy()
        small.thumbnail((400, 400))
        overlays = (label_overlay(image, mask, colours).resize(small.size) for mask in (truth, found))
        rows.append(side_by_side(titled([small, *overlays], ("image", "ground truth", "prediction"))))
    sheet = side_by_side(rows, vertical=True)
    return side_by_side([sheet, legend(task.classes, colours, sorted(seen), width=sheet.width)], vertical=True)
