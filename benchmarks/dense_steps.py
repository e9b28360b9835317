"""A training step of the detectors and of UperNet, against the same built from others' parts.

    python benchmarks/dense_steps.py [--data DIR] [--pairs mask_rcnn cascade upernet] [--size 320] [--json FILE]

DIR holds COCO's train2017 with its annotations; without it, scikit-learn's two photographs with a few drawn objects are
taken. Both sides of a pair have the same backbone, widths and images, take turns in one process, and make forward pass,
backward pass and a step of SGD.

- **mask_rcnn** against ``torchvision.models.detection.MaskRCNN`` on torchvision's pyramid: 256 channels, two linear
  layers of 1024, 1000 proposals, 512 boxes of each image. The rival comes twice: as it is, with 2 x 2 samples in a bin
  of RoIAlign, and with as many as a bin has positions, which is our arithmetic (docs/parity.md).
- **cascade** against torchvision's MaskRCNN with 2000 proposals and three ``RoIHeads`` on the same proposals, at an IoU
  of 0.5, 0.6 and 0.7, four convolutions with batch norm and one linear layer in each (``FastRCNNConvFCHead``).
  torchvision has no cascade: this rival does not refine boxes from stage to stage, and learns them with smooth L1
  instead of GIoU.
- **upernet** against ``segmentation_models_pytorch``'s ``UPerNetDecoder``, 512 channels, with our classifiers and
  losses; it has a layer norm on each map that ours has not. Classes are the brightness of the picture.

On a CPU the clock is the processor time of all threads, which other processes disturb little; on a GPU it is wall time.
The ratio is ours over theirs, round by round: its median and quartiles.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from PIL import Image, ImageDraw
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import conv2former  # noqa: F401  registers the names
from conv2former.config import ModelSection
from conv2former.data.loading import Normalizer
from conv2former.engine.machine import machine_facts
from conv2former.errors import UserError
from conv2former.tasks.backbone import Backbone
from conv2former.tasks.dense import padded_with_mean, stacked
from conv2former.tasks.detection.coco import CocoSource
from conv2former.tasks.detection.config import DetectionDataSection, DetectorSection
from conv2former.tasks.detection.data import eval_view, view_objects
from conv2former.tasks.detection.model.detector import Target, build_on_backbone
from conv2former.tasks.segmentation.config import SegmenterSection
from conv2former.tasks.segmentation.losses import weighted_loss
from conv2former.tasks.segmentation.upernet import AUX_LEVEL, Classifier, ConvNorm, build_upernet

NUM_CLASSES = 80
CASCADE = DetectorSection(
    kind="cascade_mask_rcnn", box_head="4conv1fc", box_loss="giou", rpn_loss="smooth_l1", train_proposals=2000
)


class Batch(NamedTuple):
    """Normalised images (B, 3, H, W), their (h, w) without padding, objects, and classes of their pixels (B, H, W)."""

    images: Tensor
    sizes: list[tuple[int, int]]
    targets: list[Target]
    classes: Tensor


Step = Callable[[Batch], Tensor]


class Maps(nn.Module):
    """Our backbone under torchvision's pyramid, as torchvision's detectors want it."""

    def __init__(self, section: ModelSection, channels: int) -> None:
        super().__init__()
        self.backbone, self.out_channels = Backbone(section), channels
        self.fpn = FeaturePyramidNetwork(self.backbone.widths, channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(level): x for level, x in enumerate(self.backbone(images))})


class ThreeHeads(nn.Module):
    """Three of torchvision's second halves on the same proposals, their losses added."""

    def __init__(self, heads: list[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, *inputs: Any) -> tuple[list[Any], dict[str, Tensor]]:
        losses = [head(*inputs)[1] for head in self.heads]
        return [], {name: sum(each[name] for each in losses) for name in losses[0]}


def torchvision_detector(section: ModelSection, detector: DetectorSection, *, sampling: int, overlap: float) -> Any:
    """torchvision's detector with the widths of ours; ``sampling`` is RoIAlign's, 0 for as many as there are."""
    channels, hidden = detector.channels, detector.box_head_channels
    pools = [MultiScaleRoIAlign([str(level) for level in range(4)], side, sampling) for side in (7, 14)]
    box_head: nn.Module = TwoMLPHead(channels * 7 * 7, hidden)
    if detector.box_head == "4conv1fc":
        box_head = FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [hidden], norm_layer=nn.BatchNorm2d)
    return MaskRCNN(
        Maps(section, channels),
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        _skip_resize=True,
        rpn_post_nms_top_n_train=detector.train_proposals,
        box_batch_size_per_image=detector.rois,
        box_fg_iou_thresh=overlap,
        box_bg_iou_thresh=overlap,
        box_roi_pool=pools[0],
        mask_roi_pool=pools[1],
        box_head=box_head,
        box_predictor=FastRCNNPredictor(hidden, NUM_CLASSES + 1),
        mask_head=MaskRCNNHeads(channels, [channels] * 4, dilation=1),
        mask_predictor=MaskRCNNPredictor(channels, channels, NUM_CLASSES + 1),
    )


def detector_steps(model: ModelSection, section: DetectorSection) -> dict[str, tuple[nn.Module, Step]]:
    """Ours and the rivals of a detector, by name, with what makes a loss of a batch."""
    ours: Any = build_on_backbone(model, section, num_classes=NUM_CLASSES)

    def our_loss(batch: Batch) -> Tensor:
        return sum(ours(batch.images, batch.sizes, batch.targets).values())

    steps: dict[str, tuple[nn.Module, Step]] = {"ours": (ours, our_loss)}
    for name, sampling in (("torchvision", 2), ("torchvision, our sampling", 0)):
        overlaps = (0.5, 0.6, 0.7) if section.kind == "cascade_mask_rcnn" else (0.5,)
        detectors = [torchvision_detector(model, section, sampling=sampling, overlap=overlap) for overlap in overlaps]
        theirs = detectors[0]
        if len(detectors) > 1:
            theirs.roi_heads = ThreeHeads([each.roi_heads for each in detectors])
        steps[name] = (theirs, _torchvision_loss(theirs))
    return steps


def _torchvision_loss(model: Any) -> Step:
    def loss(batch: Batch) -> Tensor:
        images = [image[:, :height, :width] for image, (height, width) in zip(batch.images, batch.sizes, strict=True)]
        targets = [dict(boxes=own.boxes, labels=own.labels + 1, masks=own.masks) for own in batch.targets]
        return sum(model(images, targets).values())

    return loss


class TheirUperNet(nn.Module):
    """segmentation_models_pytorch's decoder between our backbone and classifiers."""

    def __init__(self, model: ModelSection, section: SegmenterSection) -> None:
        super().__init__()
        self.backbone = Backbone(model)
        widths = self.backbone.widths
        self.decoder = UPerNetDecoder((3, 0, *widths), decoder_channels=section.channels)
        self.classifier = Classifier(section.channels, NUM_CLASSES, section.dropout)
        self.auxiliary = nn.Sequential(
            ConvNorm(widths[AUX_LEVEL], section.aux_channels, 3),
            Classifier(section.aux_channels, NUM_CLASSES, section.dropout),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.backbone(images)
        # it wants maps of stride 1 and 2 as well, and puts normalised maps into the list that it is given
        return self.classifier(self.decoder([images, images, *maps])), self.auxiliary(maps[AUX_LEVEL])


def upernet_steps(model: ModelSection, section: SegmenterSection) -> dict[str, tuple[nn.Module, Step]]:
    """Ours and segmentation_models_pytorch's, with what makes a loss of a batch."""
    models = {
        "ours": build_upernet(model, section, num_classes=NUM_CLASSES),
        "segmentation_models_pytorch": TheirUperNet(model, section),
    }

    def loss_of(network: nn.Module) -> Step:
        return lambda batch: weighted_loss(network(batch.images), batch.classes, aux_weight=section.aux_weight)

    return {name: (network, loss_of(network)) for name, network in models.items()}


def sample_pictures() -> list[tuple[Image.Image, list[dict[str, Any]]]]:
    """scikit-learn's two photographs with eight ellipses each, as COCO's annotations."""
    found = []
    rng = np.random.default_rng(0)
    for file in ("china.jpg", "flower.jpg"):
        image = Image.fromarray(load_sample_image(file))
        objects = []
        for number in range(8):
            width, height = rng.integers(30, 250, 2).tolist()
            left, top = (int(rng.integers(0, most)) for most in (image.width - width, image.height - height))
            angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
            outline = np.stack([np.cos(angles) * width, np.sin(angles) * height], 1) / 2 + 0.5 * np.array(
                [2 * left + width, 2 * top + height]
            )
            ImageDraw.Draw(image).polygon([tuple(point) for point in outline], fill=(20 * number, 120, 200))
            segmentation = [outline.ravel().tolist()]
            objects.append(
                dict(bbox=[left, top, width, height], category_id=number, segmentation=segmentation, iscrowd=0)
            )
        found.append((image, objects))
    return found


def load_batches(data: Path | None, *, size: int, batch_size: int, device: torch.device) -> list[Batch]:
    """Batches of pictures of short side ``size``; of COCO four of them, of the first images with objects.

    Raises:
        UserError: Anything wrong with the files.
    """
    if data is None:
        pictures = (sample_pictures() * batch_size)[:batch_size]
        labels = {number: number for number in range(NUM_CLASSES)}
    else:
        section = DetectionDataSection()
        source = CocoSource(data / section.train_images, data / section.train_annotations)
        chosen = [index for index, count in enumerate(source.counted) if count][: 4 * batch_size]
        pictures = [source.load(index) for index in chosen]
        labels = {number: label for label, number in enumerate(source.category_ids)}
    view_data = DetectionDataSection(short_side=size, long_side=2 * size)
    normalizer = Normalizer(view_data.mean, view_data.std)
    batches = []
    for start in range(0, len(pictures) - batch_size + 1, batch_size):
        part = [
            (image, objects, eval_view(image, view_data)) for image, objects in pictures[start : start + batch_size]
        ]
        pixels = [view.pixels(image) for image, _, view in part]
        sizes = [(own.shape[0], own.shape[1]) for own in pixels]
        targets: Any = [move_data_to_device(view_objects(objects, view, labels), device) for _, objects, view in part]
        packed = stacked(pixels)
        classes = packed.float().mean(dim=1).mul(NUM_CLASSES / 256).long().to(device)
        images = padded_with_mean(normalizer(packed), sizes).to(device)
        batches.append(Batch(images, sizes, targets, classes))
    return batches


def measure(
    steps: dict[str, tuple[nn.Module, Step]], batches: list[Batch], *, rounds: int, warmup: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each step by name; all take turns in every round."""
    optimizers = {}
    for name, (model, _) in steps.items():
        model.to(device).train()
        optimizers[name] = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warmup + rounds):
        for name, (_, loss_of) in steps.items():
            torch.manual_seed(number)
            started = _now(device)
            loss_of(batches[number % len(batches)]).backward()
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
            if number >= warmup:
                seconds[name].append(_now(device) - started)
    return seconds


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of COCO (default: scikit-learn's two photographs)")
    parser.add_argument("--pairs", nargs="+", default=["mask_rcnn", "cascade", "upernet"], help="what to compare")
    parser.add_argument("--model", default="conv2former_n", help="the backbone")
    parser.add_argument("--size", type=int, default=320, help="short side of the images, pixels")
    parser.add_argument("--channels", type=int, help="width of pyramid or decoder (default: the recipes')")
    parser.add_argument("--batch", type=int, default=2, help="images in a step")
    parser.add_argument("--rounds", type=int, default=8, help="steps of each that are measured")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each before them")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file for the machine and all times")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device, model = torch.device(options.device), ModelSection(name=options.model)
    width = {} if options.channels is None else dict(channels=options.channels)
    makers = {
        "mask_rcnn": lambda: detector_steps(model, DetectorSection(**width)),
        "cascade": lambda: detector_steps(model, CASCADE.model_copy(update=width)),
        "upernet": lambda: upernet_steps(model, SegmenterSection(**width)),
    }
    if unknown := set(options.pairs) - set(makers):
        parser.error(f"--pairs knows {', '.join(makers)}, not {', '.join(sorted(unknown))}")
    if min(options.rounds, options.batch) < 1:
        parser.error("--rounds and --batch must be at least 1")
    try:
        batches = load_batches(options.data, size=options.size, batch_size=options.batch, device=device)
    except UserError as error:
        sys.exit(f"error: {error}")
    clock = "processor" if device.type == "cpu" else "wall"
    print(f"{options.model}, {options.batch} images of {options.size} px, {options.threads} threads, {clock} time")
    rows = []
    for pair in options.pairs:
        torch.manual_seed(0)
        seconds = measure(makers[pair](), batches, rounds=options.rounds, warmup=options.warmup, device=device)
        ours = seconds.pop("ours")
        for rival, theirs in seconds.items():
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            low, middle, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            row = dict(pair=pair, rival=rival, ours=ours, theirs=theirs, ratio=middle, ratio_quartiles=[low, high])
            rows.append(row)
            print(
                f"{pair}: ours {median(ours):.3f} s, {rival} {median(theirs):.3f} s, ratio {middle:.3f} "
                f"(quartiles {low:.3f} and {high:.3f})",
                flush=True,
            )
    if options.json:
        facts = machine_facts() | dict(
            model=options.model, size=options.size, batch=options.batch, threads=options.threads, clock=clock
        )
        options.json.write_text(json.dumps(facts | dict(rows=rows), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
