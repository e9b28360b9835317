"""Compares UperNet with mmsegmentation 1.2.2: losses, gradients, class maps and mIoU with the same weights and images.

    python tests/parity/segmentation.py --camvid DIR

DIR holds CamVid in ADE20K's layout, label 0 for no class. mmsegmentation is built from its own configuration file; both
sides drop the same channels. Prints the largest differences, fails where one passes its limit.
"""

from __future__ import annotations

import argparse
import copy
import random
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import torch
from torch import Tensor

# isort: split
import mmseg
from mmengine.config import Config
from mmengine.structures import PixelData
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.evaluation import IoUMetric
from mmseg.models.data_preprocessor import SegDataPreProcessor
from mmseg.models.segmentors import SegTTAModel
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from mmseg.utils import register_all_modules

import conv2former  # noqa: F401  registers the names
from conv2former.config import ModelSection
from conv2former.data.images import IGNORED
from conv2former.data.loading import Normalizer
from conv2former.tasks.dense import padded_with_mean
from conv2former.tasks.segmentation.config import SegmentationAugmentSection, SegmentationDataSection, SegmenterSection
from conv2former.tasks.segmentation.data import TrainPairs, views
from conv2former.tasks.segmentation.folders import PairSource, open_pairs
from conv2former.tasks.segmentation.inference import probability_bands
from conv2former.tasks.segmentation.losses import pixel_loss, weighted_loss
from conv2former.tasks.segmentation.metrics import SegmentationMetric
from conv2former.tasks.segmentation.upernet import UperNet, build_upernet

CONFIG = Path(mmseg.__file__).parent / ".mim/configs/convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py"
SECTION = SegmenterSection(channels=64, aux_channels=32)  # widths; everything else is as in the configuration file
SIDE, STRIDE = 256, 171
# images of 300 x 400: neither multiples of 32, nor of the size of the files
DATA = SegmentationDataSection(reduce_zero_label=True, short_side=300, long_side=400, crop_size=SIDE)
PIXELS = dict(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), bgr_to_rgb=True)
MODES = {  # settings of the data, scales, whether mirrored as well
    "whole": (DATA, (1.0,), False),
    "slide": (  # 3 x 4 windows
        DATA.model_copy(update=dict(window="slide", stride=STRIDE, short_side=480, long_side=640)),
        (1.0,),
        False,
    ),
    "three scales, mirrored": (DATA, (0.75, 1.0, 1.25), True),
}
# our name, their name
NAMES = (
    (r"backbone\.(.+)", r"backbone.backbone.\1"),
    (r"decoder\.pooling\.averages\.(\d)\.(.+)", r"decode_head.psp_modules.\1.1.\2"),
    (r"decoder\.pooling\.fuse\.(.+)", r"decode_head.bottleneck.\1"),
    (r"decoder\.lateral\.(.+)", r"decode_head.lateral_convs.\1"),
    (r"decoder\.smooth\.(.+)", r"decode_head.fpn_convs.\1"),
    (r"decoder\.fuse\.(.+)", r"decode_head.fpn_bottleneck.\1"),
    (r"classifier\.1\.(.+)", r"decode_head.conv_seg.\1"),
    (r"auxiliary\.0\.(.+)", r"auxiliary_head.convs.0.\1"),
    (r"auxiliary\.1\.1\.(.+)", r"auxiliary_head.conv_seg.\1"),
)
LIMITS = {
    "pixel": 1e-5,  # of normalised images, in standard deviations
    "loss": 1e-4,  # relative
    "gradient": 1e-3,  # of decoder and auxiliary head, relative to the largest of a tensor
    "backbone": 1e-2,  # likewise, of the backbone
    "statistics": 1e-4,  # of batch norm
    "probability": 1e-4,
    "class": 1e-5,  # share of pixels that are given another class
    "figure": 1e-2,  # mIoU and accuracies, percent
}
Differences = dict[tuple[str, str], float]


def their_name(name: str) -> str:
    """mmsegmentation's name of one of our parameters or buffers."""
    for pattern, replacement in NAMES:
        if re.fullmatch(pattern, name):
            name = re.sub(pattern, replacement, name)
            if name.startswith("backbone."):
                return name
            return re.sub(r"\.([01])\.(\w+)$", lambda m: f".{('conv', 'bn')[int(m[1])]}.{m[2]}", name)
    raise KeyError(name)


def build(num_classes: int) -> tuple[UperNet, Any]:
    """Our segmenter and mmsegmentation's, with the same weights; those of the classifiers are enlarged."""
    torch.manual_seed(0)
    ours = build_upernet(
        ModelSection(name="conv2former_atto", args=dict(ls_init_value=0.1)), SECTION, num_classes=num_classes
    )
    with torch.no_grad():
        ours.classifier[1].weight.mul_(30)
        ours.auxiliary[1][1].weight.mul_(30)
    config = Config.fromfile(CONFIG, import_custom_modules=False).model
    config.pop("data_preprocessor")
    widths = ours.backbone.widths
    config.backbone = dict(type="ResNet", depth=18)  # replaced below
    config.decode_head.update(in_channels=widths, channels=SECTION.channels, num_classes=num_classes)
    config.auxiliary_head.update(in_channels=widths[2], channels=SECTION.aux_channels, num_classes=num_classes)
    config.test_cfg.update(crop_size=(SIDE, SIDE), stride=(STRIDE, STRIDE))
    oracle.use_torchvision(config)
    theirs = MODELS.build(config)
    theirs.backbone = oracle.SharedBackbone(copy.deepcopy(ours.backbone))
    theirs.load_state_dict({their_name(name): value for name, value in ours.state_dict().items()})
    return ours, theirs


def bgr(picture: np.ndarray) -> Tensor:
    """(h, w, 3) in RGB -> (3, h, w) as mmsegmentation reads it."""
    return torch.from_numpy(picture[..., ::-1].transpose(2, 0, 1).copy())


def training_batch(source: PairSource, images: Sequence[int]) -> dict[str, Any]:
    """Augmented crops, some smaller than ``SIDE``, with what the losses want: labels (ours), samples (theirs).

    Both sides normalise; as that rounds differently, which moves activations over the kink of a ReLU here and there,
    both networks then take the same images.
    """
    crops = TrainPairs(source, DATA, SegmentationAugmentSection())
    cut = [crops.prepare(source.load(image), image, counted=True) for image in images]
    batch = crops.join(cut, torch.tensor(images), ())
    samples = [
        SegDataSample(gt_sem_seg=PixelData(data=torch.from_numpy(labels.copy()).long()[None])) for _, labels in cut
    ]
    preprocess = SegDataPreProcessor(**PIXELS, size=(SIDE, SIDE), pad_val=0, seg_pad_val=255)
    theirs = preprocess(dict(inputs=[bgr(picture) for picture, _ in cut], data_samples=samples), training=True)
    normalised = Normalizer(DATA.mean, DATA.std)(batch.images[0])
    images = padded_with_mean(normalised, batch.sizes)
    return dict(
        rounding=float((images - theirs["inputs"]).abs().max()),
        images=theirs["inputs"],
        labels=batch.masks.long(),
        samples=theirs["data_samples"],
    )


def compare_training(ours: UperNet, theirs: Any, batch: dict[str, Any]) -> Differences:
    """Relative differences of losses, gradients and the statistics of batch norm after one step on a batch."""
    for model in (ours, theirs):
        model.train()
        model.zero_grad(set_to_none=True)
    torch.manual_seed(1)  # the same channels are dropped
    outputs = ours(batch["images"])
    torch.manual_seed(1)
    their_losses = theirs.loss(batch["images"].clone(), batch["samples"])
    expected = dict(decoder=their_losses["decode.loss_ce"], auxiliary=their_losses["aux.loss_ce"])
    expected["sum"] = sum(expected.values())
    losses = dict(
        decoder=pixel_loss(outputs[0], batch["labels"]),
        auxiliary=SECTION.aux_weight * pixel_loss(outputs[1], batch["labels"]),
        sum=weighted_loss(outputs, batch["labels"], aux_weight=SECTION.aux_weight),
    )
    differences = {("loss", name): abs(losses[name].item() / expected[name].item() - 1) for name in losses}
    differences["pixel", ""] = batch["rounding"]
    losses["sum"].backward()
    expected["sum"].backward()
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        part = "backbone" if name.startswith("backbone.") else "gradient"
        differences[part, name] = oracle.relative(parameter.grad, their_gradients[their_name(name)])
    buffers = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        differences["statistics", name] = oracle.relative(buffer.float(), buffers[their_name(name)].float())
    return differences


@torch.no_grad()
def balance(ours: UperNet, theirs: Any, images: Tensor) -> None:
    """Gives the classifiers the biases with which all classes are as likely on average, so that many are predicted."""
    logits = ours.eval()(images)
    ours.classifier[1].bias.sub_(logits.mean(dim=(0, 2, 3)))
    theirs.decode_head.conv_seg.bias.copy_(ours.classifier[1].bias)


def their_labels(path: Path) -> Tensor:
    """Classes (H, W) as mmsegmentation reads them."""
    result = dict(seg_map_path=str(path), seg_fields=[], reduce_zero_label=True)
    return torch.from_numpy(LoadAnnotations(reduce_zero_label=True, imdecode_backend="pillow")(result)["gt_seg_map"])


def their_predictions(
    theirs: Any, pictures: Sequence[np.ndarray], size: tuple[int, int], *, window: str, mirror: bool
) -> list[SegDataSample]:
    """mmsegmentation's prediction for each view, mirrored ones behind their originals."""
    theirs.test_cfg.mode = window
    # windows need no padding: the configuration's side is a multiple of 32
    padding = dict(test_cfg=dict(size_divisor=32)) if window == "whole" else {}
    preprocess = SegDataPreProcessor(**PIXELS, **padding)
    found = []
    for picture in pictures:
        for flip in (False, True)[: 1 + mirror]:
            info = dict(
                ori_shape=size, img_shape=picture.shape[:2], flip=flip, flip_direction="horizontal", img_path=""
            )
            inputs = bgr(picture[:, ::-1] if flip else picture)
            data = preprocess(dict(inputs=[inputs], data_samples=[SegDataSample(metainfo=info)]))
            found += theirs.predict(data["inputs"], data["data_samples"])
    return found


class Inference:
    """Differences over all images in one mode, and mIoU on both sides."""

    def __init__(self, ours: UperNet, theirs: Any, mode: str, num_classes: int) -> None:
        self.ours, self.theirs, self.mode, self.num_classes = ours.eval(), theirs.eval(), mode, num_classes
        self.data, self.scales, self.mirror = MODES[mode]
        self.counts, self.areas = (
            SegmentationMetric([str(i) for i in range(num_classes)]),
            [torch.zeros(num_classes)] * 4,
        )
        self.probability, self.wrong, self.pixels = 0.0, 0, 0
        self.shares = torch.zeros(num_classes)

    @torch.no_grad()
    def add(self, source: PairSource, index: int) -> None:
        """Compares what both sides say of an image."""
        image, labels = source.load(index)
        size = (image.height, image.width)
        pictures = views(image, self.data, self.scales)
        normalise = Normalizer(DATA.mean, DATA.std)
        inputs = [normalise(torch.from_numpy(picture).permute(2, 0, 1)[None]) for picture in pictures]
        bands = [*probability_bands(self.ours, inputs, self.data, size=size, mirror=self.mirror)]
        mine = torch.cat([probabilities for _, probabilities in bands], dim=2)
        found = their_predictions(self.theirs, pictures, size, window=self.data.window, mirror=self.mirror)
        if len(found) == 1:
            expected = found[0].seg_logits.data.softmax(dim=0)
            self.probability = max(self.probability, float((mine[0] - expected).abs().max()))
            classes = found[0].pred_sem_seg.data.squeeze(0)
        else:
            (merged,) = SegTTAModel(module=self.theirs).merge_preds([found])
            classes = merged.pred_sem_seg.data.squeeze(0)
        self.wrong += int((mine[0].argmax(dim=0) != classes).sum())
        self.pixels += classes.numel()
        self.shares += classes.flatten().bincount(minlength=self.num_classes)
        self.counts.update(bands, torch.from_numpy(labels)[None])
        truth = their_labels(source.pairs[index].labels)
        areas = IoUMetric.intersect_and_union(classes, truth, self.num_classes, IGNORED)
        self.areas = [total + area for total, area in zip(self.areas, areas, strict=True)]

    def differences(self) -> Differences:
        """Largest probability, share of pixels of another class, and the figures."""
        figures, counts = IoUMetric.total_area_to_metrics(*self.areas), self.counts.compute()
        pairs = {"miou": "IoU", "mean_accuracy": "Acc", "pixel_accuracy": "aAcc"}
        found = {
            ("figure", f"{name}, {self.mode}"): abs(counts[name] - 100 * float(np.nanmean(figures[their])))
            for name, their in pairs.items()
        }
        if len(self.scales) == 1:
            found["probability", self.mode] = self.probability
        found["class", self.mode] = self.wrong / self.pixels
        return found

    def line(self) -> str:
        """That there was something to compare."""
        shares = self.shares / self.pixels
        return f"{self.mode}: {int((shares > 0.01).sum())} classes on at least 1% of the pixels"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--camvid", type=Path, required=True, help="folder with images, annotations and classes.txt")
    parser.add_argument("--steps", type=int, default=4, help="batches of four crops whose losses are compared")
    parser.add_argument("--images", type=int, default=20, help="images whose class maps are compared")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"mmseg|mmengine")
    register_all_modules()
    random.seed(0)
    splits = open_pairs(DATA, arguments.camvid, seed=0)
    num_classes = len(splits.train.classes)
    ours, theirs = build(num_classes)
    worst: Differences = defaultdict(float)
    ignored = []
    for step in range(arguments.steps):
        batch = training_batch(splits.train, range(4 * step, 4 * step + 4))
        ignored.append(float((batch["labels"] == IGNORED).float().mean()))
        for key, value in compare_training(ours, theirs, batch).items():
            worst[key] = max(worst[key], value)
    shares = ", ".join(f"{share:.0%}" for share in ignored)
    print(f"{arguments.steps} training batches of four crops, pixels without class: {shares}")
    balance(ours, theirs, batch["images"])
    chosen = np.linspace(0, len(splits.val) - 1, min(arguments.images, len(splits.val))).astype(int)
    for mode in MODES:
        inference = Inference(ours, theirs, mode, num_classes)
        for index in chosen:
            inference.add(splits.val, int(index))
        worst |= inference.differences()
        print(f"{len(chosen)} images, {inference.line()}")
    return int(oracle.report(worst, LIMITS, each=("loss", "probability", "class", "figure")))


if __name__ == "__main__":
    sys.exit(main())
