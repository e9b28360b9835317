"""A task of one's own: depth, one number for each pixel, on the decoder that segmentation uses.

    python depth_task.py rooms
    conv2former --import depth_task train --recipe depth.yaml --data rooms --out runs/depth

from the folder of this file; the first command draws data to try it on. docs/add_a_task.md explains it step by step.
Data: ``images/NAME.png`` beside ``depth/NAME.npy`` with metres as float32, 0 for unknown.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torchmetrics import Metric

from conv2former.config import ImagesSection, ModelSection, Recipe, Section
from conv2former.data.images import MAX_PIXELS, BadImage, decode
from conv2former.data.loading import KeyedDataset
from conv2former.data.sources import given_folder
from conv2former.errors import UserError
from conv2former.tasks import register
from conv2former.tasks.backbone import Backbone
from conv2former.tasks.base import Evaluation, Exportable, Prediction, Prepared, Reported, Words
from conv2former.tasks.dense import DenseTask, fitted
from conv2former.tasks.segmentation.config import SegmenterSection
from conv2former.tasks.segmentation.task import WholeSize
from conv2former.tasks.segmentation.upernet import UperNet, resize


class DepthData(ImagesSection):
    """What a recipe may say of the data."""

    val_fraction: float = Field(default=0.2, gt=0, lt=1)
    short_side: int = Field(default=256, ge=32, description="of an image in evaluation, pixels")
    crop_size: int = Field(default=224, ge=32, description="side of the square that is trained on, pixels")


class DepthAugment(Section):
    """What a recipe may say of augmentation."""

    hflip: float = Field(default=0.5, ge=0, le=1)


class DepthRecipe(Recipe):
    """One experiment."""

    task: Literal["depth"] = "depth"
    data: DepthData = DepthData()
    augment: DepthAugment = DepthAugment()
    decoder: SegmenterSection = SegmenterSection(channels=128, aux_weight=0)


class DepthSource:
    """Images with a depth map each."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root, self.names, self.classes = root, list(names), ["depth"]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def load(self, index: int, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, np.ndarray]:
        """The image and its depth (H, W); raises BadImage."""
        file = self.root / "depth" / f"{Path(self.names[index]).stem}.npy"
        image = decode(self.root / "images" / self.names[index], max_pixels=max_pixels)
        try:
            depth = np.load(file, allow_pickle=False).astype(np.float32)
        except (OSError, ValueError) as error:
            raise BadImage(str(file), str(error)) from error
        if depth.shape != (image.height, image.width):
            raise BadImage(str(file), f"its shape {depth.shape} is not that of its image")
        return image, depth


@dataclass(frozen=True)
class DepthSplits:
    """A training and a validation set."""

    train: DepthSource
    val: DepthSource

    def digest(self) -> str:
        names = [*self.train.names, "", *self.val.names]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


class DepthBatch(NamedTuple):
    """A batch of either data set."""

    images: Tensor  # (B, 3, H, W) of uint8
    depth: Tensor  # (B, H, W), metres, 0 for unknown
    indices: Tensor  # (B,), numbers of the images in their source
    bad: tuple[BadImage, ...] = ()  # images that could not be read


class DepthDataset(KeyedDataset):
    """Images as the network sees them: whole, or in training a random crop."""

    def __init__(self, source: DepthSource, data: DepthData, augment: DepthAugment | None, **options: Any) -> None:
        super().__init__(source, **options)
        self.data, self.augment = data, augment

    def prepare(self, content: Any, index: int, *, counted: bool) -> tuple[np.ndarray, np.ndarray]:
        image, depth = content or (Image.new("RGB", (32, 32)), np.zeros((32, 32), np.float32))
        if self.augment is None:
            return view(image, self.data.short_side), depth if counted else np.zeros_like(depth)
        side = self.data.crop_size
        scale = max(side / min(image.size), 1)
        size = (round(image.width * scale), round(image.height * scale))
        left, top = (random.randint(0, length - side) for length in size)
        box = (left, top, left + side, top + side)
        pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR).crop(box))
        crop = np.asarray(Image.fromarray(depth).resize(size, Image.Resampling.NEAREST).crop(box))
        if random.random() < self.augment.hflip:
            pixels, crop = pixels[:, ::-1], crop[:, ::-1]
        return pixels, crop

    def join(self, samples: Sequence[Any], indices: Tensor, bad: tuple[BadImage, ...]) -> DepthBatch:
        images, depth = (torch.from_numpy(np.stack(part)) for part in zip(*samples, strict=True))
        return DepthBatch(images.permute(0, 3, 1, 2), depth, indices, bad)


def view(image: Image.Image, short: int) -> np.ndarray:
    """The whole image at the size of evaluation, (h, w, 3)."""
    return np.asarray(image.resize(fitted(image.size, short=short, long=4 * short), Image.Resampling.BILINEAR))


class DepthMetric(Metric):
    """Mean absolute relative error, and the fraction of pixels that are wrong by less than a factor of 1.25."""

    full_state_update = False
    sums: Tensor

    def __init__(self, *, distributed: bool = False) -> None:
        super().__init__(sync_on_compute=distributed)
        self.add_state("sums", torch.zeros(4, dtype=torch.double), dist_reduce_fx="sum")

    def update(self, found: Tensor, depth: Tensor) -> None:
        """Metres, (1, H, W) each."""
        known = depth > 0
        found, depth = found[known].clamp_min(1e-3).double(), depth[known].double()
        ratio = torch.maximum(found / depth, depth / found)
        error = (found - depth).abs() / depth
        numbers = [known.any(), known.sum(), error.sum(), (ratio < 1.25).sum()]
        self.sums += torch.stack([number.double() for number in numbers])

    def compute(self) -> Tensor:
        return self.sums

    def result(self) -> Evaluation:
        images, pixels, error, close = self.compute().tolist()
        delta1, abs_rel = 100 * close / max(pixels, 1), error / max(pixels, 1)
        metrics = dict(delta1=delta1, abs_rel=abs_rel)
        line = f"abs-rel {abs_rel:.4f}, delta-1 {delta1:.2f}% ({images:.0f} images)"
        return Evaluation(dict(metrics), line, dict(images=int(images), pixels=int(pixels)) | metrics)


@register
class DepthTask(DenseTask):
    """Depth from one image: UperNet with one output, trained by L1."""

    name = "depth"
    config_class = DepthRecipe
    monitor = "delta1"
    reported = (
        Reported("delta1", "delta-1, %", ("delta1",)),
        Reported("abs_rel", "abs-rel", ("abs_rel",)),
    )
    words = Words(
        tags=("depth-estimation",),
        purpose="to say how far away each pixel of an image is",
        unknown="every pixel gets a distance",
        heading="Depth",
        nothing="From near, dark, to far, bright.",
    )
    options = DenseTask.options - {"split"}  # the images lie in one folder

    @classmethod
    def network(cls, recipe: DepthRecipe, section: ModelSection, classes: Sequence[str]) -> UperNet:
        return UperNet(Backbone(section), recipe.decoder, num_classes=1)

    @classmethod
    def open_splits(cls, recipe: DepthRecipe, root: Path | None) -> DepthSplits:
        source = cls._opened(root)
        held = max(round(len(source) * recipe.data.val_fraction), 1)
        order = random.Random(recipe.engine.seed).sample(source.names, len(source))
        train, val = order[held:], order[:held]
        return DepthSplits(DepthSource(source.root, train), DepthSource(source.root, val))

    def eval_source(self, root: Path | None) -> DepthSource:
        return self._opened(root)

    @staticmethod
    def _opened(root: Path | None) -> DepthSource:
        root = given_folder(root, "images")
        names = sorted(path.name for path in (root / "images").glob("*.png"))
        if len(names) < 2:
            raise UserError(f"at least two images are needed in {root / 'images'}, NAME.png beside depth/NAME.npy")
        return DepthSource(root, names)

    def train_dataset(self, source: DepthSource, *, on_bad_image: Literal["error", "replace"]) -> DepthDataset:
        return DepthDataset(source, self.recipe.data, self.recipe.augment, **self.train_options(on_bad_image))

    def eval_dataset(
        self, source: DepthSource, *, on_bad_image: Literal["error", "mask"], max_pixels: int
    ) -> DepthDataset:
        return DepthDataset(source, self.recipe.data, None, on_bad_image=on_bad_image, max_pixels=max_pixels)

    def preprocess(self, image: Image.Image) -> Prepared:
        return Prepared(view(image, self.recipe.data.short_side), (image.height, image.width))

    def example_batch(self, count: int) -> DepthBatch:
        side = self.recipe.data.crop_size
        images = torch.zeros(count, 3, side, side, dtype=torch.uint8)
        return DepthBatch(images, torch.ones(count, side, side), torch.zeros(count, dtype=torch.long))

    def training_step(self, batch: DepthBatch) -> Tensor:
        logits, _ = self.model(self.prepared(batch.images))
        known = batch.depth > 0
        error = (metres(logits, batch.depth) - batch.depth).abs() * known
        return error.sum() / known.sum().clamp_min(1)

    def metric(self, source: Any, *, distributed: bool = False) -> DepthMetric:
        return DepthMetric(distributed=distributed)

    def eval_step(self, batch: DepthBatch, metric: DepthMetric) -> None:
        images = self.prepared(batch.images)
        height, width = images.shape[2:]
        padded = F.pad(images, (0, -width % 32, 0, -height % 32))
        logits = resize(self.evaluated(padded).float(), padded)[..., :height, :width]
        metric.update(metres(logits, batch.depth), batch.depth)

    @torch.inference_mode()
    def predict(self, batch: Sequence[Prepared]) -> list[Prediction]:
        return [self._predicted(prepared) for prepared in batch]

    def _predicted(self, prepared: Prepared) -> Prediction:
        images, (height, width) = self.inputs(prepared.pixels), prepared.pixels.shape[:2]
        logits = resize(self.model(images).float(), images)[..., :height, :width]
        depth = metres(logits, prepared.size)[0].cpu().numpy()
        found = dict(nearest=depth.min(), median=np.median(depth), farthest=depth.max())
        fields = {name: float(value) for name, value in found.items()}
        return Prediction(fields, lambda image: painted(depth))

    def draw(self, evaluation: Evaluation, source: DepthSource, folder: Path) -> None:
        image, _ = source.load(0)
        (found,) = self.predict([self.preprocess(image)])
        found.draw(image).save(folder / "predictions.png")

    def exportable(self, size: tuple[int, int] | None = None) -> Exportable:
        side = self.recipe.data.crop_size
        network = nn.Sequential(WholeSize(self.model), nn.Softplus())
        return self.exported(network, ["depth"], size or (side, side))


def metres(logits: Tensor, like: Tensor | tuple[int, int]) -> Tensor:
    """(B, 1, h, w) -> metres (B, H, W), above 0."""
    return F.softplus(resize(logits.float(), like))[:, 0]


def painted(depth: np.ndarray) -> Image.Image:
    """Depth (H, W) in colour."""
    scaled = (depth - depth.min()) / max(float(np.ptp(depth)), 1e-6)
    return Image.fromarray((255 * colormaps["viridis"](scaled)[..., :3]).astype(np.uint8))


def draw_rooms(root: Path, count: int = 40) -> None:
    """Data to try it on: a floor from 5 metres at the top to 1 at the bottom, boxes on it, haze over what is far."""
    for folder in ("images", "depth"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        generator = np.random.default_rng(number)
        depth = np.repeat(np.linspace(5, 1, 96, dtype=np.float32)[:, None], 128, axis=1)
        colours = np.broadcast_to(generator.uniform(0.2, 0.8, 3), (96, 128, 3)).copy()
        for metre in sorted(generator.uniform(1, 4, 4), reverse=True):  # near boxes hide far ones
            side, foot = round(50 / metre), round((5 - metre) / 4 * 95)
            left = generator.integers(0, 128 - side)
            box = np.s_[max(foot - side, 0) : foot + 1, left : left + side]
            depth[box], colours[box] = metre, generator.uniform(0.2, 0.8, 3)
        near = np.exp(-depth / 4)[..., None]
        pixels = 255 * (colours * near + 0.9 * (1 - near))
        Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / f"{number:02}.png")
        np.save(root / "depth" / f"{number:02}.npy", depth)


if __name__ == "__main__":
    draw_rooms(Path(sys.argv[1]))
