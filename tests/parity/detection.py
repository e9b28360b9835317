"""Compares the detectors with mmdetection 3.3.0: losses, gradients and detections with the same weights and images.

    python tests/parity/detection.py --coco DIR

DIR holds COCO (any part of it). mmdetection is built from its own configuration files; its random choices are made
the same as ours by replacing ``torch.randperm``. Prints the largest differences, fails where one passes its limit.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import timm
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor

# isort: split
import mmdet
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.structures import InstanceData

import conv2former  # noqa: F401  registers the names
from conv2former.tasks.detection.config import DetectorSection
from conv2former.tasks.detection.model.detector import Detections, Detector
from conv2former.tasks.detection.model.mask_head import paste_masks
from conv2former.tasks.detection.model.roi_heads import Target

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
CHANNELS, HIDDEN = 64, 256  # widths of the compared detectors; everything else is as in the configuration files
CONFIGS = Path(mmdet.__file__).parent / ".mim/configs"
SECTIONS = {
    "mask_rcnn": DetectorSection(channels=CHANNELS, box_head_channels=HIDDEN),
    "cascade_mask_rcnn": DetectorSection(
        kind="cascade_mask_rcnn",
        channels=CHANNELS,
        box_head_channels=HIDDEN,
        box_head="4conv1fc",
        box_loss="giou",
        rpn_loss="smooth_l1",
        train_proposals=2000,
    ),
}
FILES = {
    "mask_rcnn": "_base_/models/mask-rcnn_r50_fpn.py",
    "cascade_mask_rcnn": "convnext/cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py",
}
# our name, their name; {s} is the stage's index in a cascade and nothing in Mask R-CNN
NAMES = (
    (r"backbone\.(.+)", r"backbone.backbone.\1"),
    (r"pyramid\.fpn\.inner_blocks\.(\d)\.0\.(.+)", r"neck.lateral_convs.\1.conv.\2"),
    (r"pyramid\.fpn\.layer_blocks\.(\d)\.0\.(.+)", r"neck.fpn_convs.\1.conv.\2"),
    (r"rpn\.head\.conv\.0\.0\.(.+)", r"rpn_head.rpn_conv.\1"),
    (r"rpn\.head\.cls_logits\.(.+)", r"rpn_head.rpn_cls.\1"),
    (r"rpn\.head\.bbox_pred\.(.+)", r"rpn_head.rpn_reg.\1"),
    (r"stages\.\d\.box_head\.trunk\.(\d)\.0\.(.+)", r"roi_head.bbox_head{s}.shared_convs.\1.conv.\2"),
    (r"stages\.\d\.box_head\.trunk\.(\d)\.1\.(.+)", r"roi_head.bbox_head{s}.shared_convs.\1.bn.\2"),
    (r"stages\.\d\.box_head\.trunk\.[15]\.(.+)", r"roi_head.bbox_head{s}.shared_fcs.0.\1"),
    (r"stages\.\d\.box_head\.trunk\.3\.(.+)", r"roi_head.bbox_head{s}.shared_fcs.1.\1"),
    (r"stages\.\d\.box_head\.classes\.(.+)", r"roi_head.bbox_head{s}.fc_cls.\1"),
    (r"stages\.\d\.box_head\.offsets\.(.+)", r"roi_head.bbox_head{s}.fc_reg.\1"),
    (r"stages\.\d\.mask_head\.0\.(\d)\.0\.(.+)", r"roi_head.mask_head{s}.convs.\1.conv.\2"),
    (r"stages\.\d\.mask_head\.1\.conv5_mask\.(.+)", r"roi_head.mask_head{s}.upsample.\1"),
    (r"stages\.\d\.mask_head\.1\.mask_fcn_logits\.(.+)", r"roi_head.mask_head{s}.conv_logits.\1"),
)
LIMITS = {
    "loss": 1e-4,  # relative
    "gradient": 1e-3,  # of the detector's weights, relative to the largest of a tensor
    "backbone": 1e-2,  # likewise, of the backbone's: sums over all pixels, in which large terms cancel
    "statistics": 1e-4,  # of batch norm
    "box": 1e-2,  # pixels of the original image
    "score": 1e-4,
    "mask": 1e-4,  # pixels that differ for each pixel of the masks
    "missed": 1e-3,  # of all detections
}


def their_name(name: str, kind: str) -> str:
    """mmdetection's name of one of our parameters or buffers."""
    stage = f".{name.split('.')[1]}" if kind == "cascade_mask_rcnn" else ""
    for pattern, replacement in NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name).replace("{s}", stage)
    raise KeyError(name)


def build(kind: str) -> tuple[Detector, Any]:
    """Our detector and mmdetection's, with the same weights.

    Those of the last layers are larger than at initialisation, so that boxes move and there is something to detect.
    """
    torch.manual_seed(0)
    backbone = timm.create_model("conv2former_atto", features_only=True)
    widths = backbone.feature_info.channels()
    ours = Detector(backbone, widths=widths, section=SECTIONS[kind], num_classes=80)
    with torch.no_grad():
        ours.rpn.head.cls_logits.weight.mul_(20)
        ours.rpn.head.bbox_pred.weight.mul_(5)
        for stage in ours.stages:
            stage.box_head.classes.weight.mul_(40)
            stage.box_head.offsets.weight.mul_(100)
            stage.mask_head[1].mask_fcn_logits.weight.mul_(10)
    config = Config.fromfile(CONFIGS / FILES[kind], import_custom_modules=False).model
    config.pop("data_preprocessor")
    config.backbone = dict(type="ResNet", depth=18, init_cfg=None)  # replaced below
    config.neck.update(in_channels=widths, out_channels=CHANNELS)
    config.rpn_head.update(in_channels=CHANNELS, feat_channels=CHANNELS)
    for name in ("bbox_roi_extractor", "mask_roi_extractor"):
        config.roi_head[name].out_channels = CHANNELS
    heads = config.roi_head.bbox_head
    for head in heads if isinstance(heads, list) else [heads]:
        head.update(in_channels=CHANNELS, conv_out_channels=CHANNELS, fc_out_channels=HIDDEN)
    config.roi_head.mask_head.update(in_channels=CHANNELS, conv_out_channels=CHANNELS)
    oracle.use_torchvision(config)
    theirs = MODELS.build(config)
    theirs.backbone = oracle.SharedBackbone(copy.deepcopy(backbone))
    theirs.load_state_dict({their_name(name, kind): value for name, value in ours.state_dict().items()})
    return ours, theirs


class Pictures:
    """Images of COCO with their objects, as both detectors want them."""

    def __init__(self, root: Path, split: str) -> None:
        self.folder = root / split
        self.coco = COCO(root / "annotations" / f"instances_{split}.json")
        self.classes = {category: i for i, category in enumerate(sorted(self.coco.getCatIds()))}
        self.preprocess = DetDataPreprocessor(
            mean=MEAN, std=STD, bgr_to_rgb=True, pad_mask=True, pad_size_divisor=32, boxtype2tensor=False
        )

    def usable(self, objects: bool) -> list[int]:
        """Images that are there, with objects or without."""
        return [
            i
            for i in sorted(self.coco.getImgIds())
            if (self.folder / self.coco.imgs[i]["file_name"]).is_file()
            and objects == bool(self.coco.getAnnIds(i, iscrowd=False))
        ]

    def load(self, image: int, short_side: int) -> tuple[np.ndarray, Target, tuple[int, int]]:
        """The resized image (h, w, 3) uint8, what it shows, and its height and width before."""
        info = self.coco.imgs[image]
        picture = Image.open(self.folder / info["file_name"]).convert("RGB")
        scale = short_side / min(picture.size)
        size = tuple(round(side * scale) for side in picture.size)
        boxes, labels, masks = [], [], []
        for annotation in self.coco.loadAnns(self.coco.getAnnIds(image, iscrowd=False)):
            x, y, w, h = annotation["bbox"]
            if w < 1 or h < 1:
                continue
            fx, fy = size[0] / picture.width, size[1] / picture.height
            boxes.append((x * fx, y * fy, (x + w) * fx, (y + h) * fy))
            labels.append(self.classes[annotation["category_id"]])
            mask = Image.fromarray(self.coco.annToMask(annotation))
            masks.append(np.asarray(mask.resize(size, Image.Resampling.NEAREST)))
        target = Target(
            torch.tensor(boxes).reshape(-1, 4),
            torch.tensor(labels, dtype=torch.long),
            torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, size[1], size[0], dtype=torch.uint8),
        )
        pixels = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
        return pixels, target, (picture.height, picture.width)

    def batch(self, images: list[int], short_sides: list[int], *, training: bool) -> dict[str, Any]:
        """A batch in our form (images, sizes, targets) and in theirs (inputs, samples)."""
        loaded = [self.load(image, side) for image, side in zip(images, short_sides, strict=True)]
        samples = []
        for pixels, target, original in loaded:
            size = pixels.shape[:2]
            masks = BitmapMasks(target.masks.numpy(), *size)
            truth = InstanceData(bboxes=target.boxes.clone(), labels=target.labels, masks=masks)
            factors = (size[1] / original[1], size[0] / original[0])
            info = dict(img_shape=size, ori_shape=original, scale_factor=factors)
            samples.append(DetDataSample(gt_instances=truth, metainfo=info))
        bgr = [torch.from_numpy(pixels[..., ::-1].transpose(2, 0, 1).copy()) for pixels, _, _ in loaded]
        theirs = self.preprocess(dict(inputs=bgr, data_samples=samples), training)
        sizes = [pixels.shape[:2] for pixels, _, _ in loaded]
        height, width = (32 * -(-max(side) // 32) for side in zip(*sizes, strict=True))
        padded = torch.zeros(len(loaded), 3, height, width)
        for into, (pixels, _, _) in zip(padded, loaded, strict=True):
            normalised = (torch.from_numpy(pixels.copy()).float() - torch.tensor(MEAN)) / torch.tensor(STD)
            into[:, : pixels.shape[0], : pixels.shape[1]] = normalised.permute(2, 0, 1)
        assert torch.equal(padded, theirs["inputs"])
        return dict(
            images=padded,
            sizes=sizes,
            targets=[target for _, target, _ in loaded],
            originals=[original for _, _, original in loaded],
            samples=theirs["data_samples"],
        )


@contextmanager
def same_choices() -> Iterator[None]:
    """Lets a random permutation depend on nothing but its length, and equal scores keep their order everywhere."""
    permute, sort = torch.randperm, Tensor.sort
    torch.randperm = lambda n, **_: permute(n, generator=torch.Generator().manual_seed(n))
    Tensor.sort = lambda x, **settings: sort(x, **(settings | {"stable": True}))
    try:
        yield
    finally:
        torch.randperm, Tensor.sort = permute, sort


def loss_names(kind: str) -> dict[str, str]:
    """Our names of the losses and theirs."""
    names = {"rpn_class": "loss_rpn_cls", "rpn_box": "loss_rpn_bbox"}
    terms = {"class": "loss_cls", "box": "loss_bbox", "mask": "loss_mask"}
    if kind == "mask_rcnn":
        return names | terms
    return names | {f"stage{s + 1}_{our}": f"s{s}.{their}" for s in range(3) for our, their in terms.items()}


def compare_training(ours: Detector, theirs: Any, batch: dict[str, Any], kind: str) -> dict[tuple[str, str], float]:
    """Relative differences of losses, gradients and the statistics of batch norm after one step on a batch."""
    differences: dict[tuple[str, str], float] = {}
    for model in (ours, theirs):
        model.train()
        model.zero_grad(set_to_none=True)
    with same_choices():
        losses = ours(batch["images"], batch["sizes"], batch["targets"])
        their_losses = theirs.loss(batch["images"].clone(), batch["samples"])
    for name, their in loss_names(kind).items():
        value = their_losses[their]
        value = sum(value) if isinstance(value, list) else value
        differences["loss", name] = abs(losses[name].item() - value.item()) / max(abs(value.item()), 1e-6)
    sum(losses.values()).backward()
    sum(sum(v) if isinstance(v, list) else v for k, v in their_losses.items() if "loss" in k).backward()
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        theirs_now = their_gradients[their_name(name, kind)]
        if theirs_now is not None and theirs_now.abs().max() > 0:
            part = "backbone" if name.startswith("backbone.") else "gradient"
            differences[part, name] = oracle.relative(parameter.grad, theirs_now)
    buffers = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        differences["statistics", name] = oracle.relative(buffer.float(), buffers[their_name(name, kind)].float())
    return differences


@torch.no_grad()
def compare_inference(ours: Detector, theirs: Any, batch: dict[str, Any]) -> tuple[int, dict[tuple[str, str], float]]:
    """Number of detections, and differences of boxes, scores and masks in the images' own pixels."""
    ours.eval(), theirs.eval()
    with same_choices():
        found = ours(batch["images"], batch["sizes"])
        expected = theirs.predict(batch["images"].clone(), batch["samples"], rescale=True)
    count, missed, differences = 0, 0, defaultdict(float)
    for mine, sample, original, size in zip(found, expected, batch["originals"], batch["sizes"], strict=True):
        reference = sample.pred_instances
        scale = torch.tensor([size[1] / original[1], size[0] / original[0]]).repeat(2)
        boxes = mine.boxes / scale
        masks = paste_masks(mine.masks, boxes, original)
        count += len(reference)
        partner = partners(mine._replace(boxes=boxes), reference)
        missed += int((partner < 0).sum()) + abs(len(boxes) - len(reference))
        theirs_too = (partner >= 0).nonzero().squeeze(1)
        mine_too = partner[theirs_too]
        if len(mine_too):
            box = (boxes[mine_too] - reference.bboxes[theirs_too]).abs().max()
            score = (mine.scores[mine_too] - reference.scores[theirs_too]).abs().max()
            shown = reference.masks[theirs_too]
            mask = (masks[mine_too] != shown).sum() / shown.sum().clamp(min=1)
            for name, value in (("box", box), ("score", score), ("mask", mask)):
                differences[name, ""] = max(differences[name, ""], float(value))
    differences["missed", ""] = missed / max(count, 1)
    return count, differences


def partners(mine: Detections, reference: Any) -> Tensor:
    """Index of our detection for each of theirs: of the same class, within a pixel; -1 where there is none."""
    if not len(reference) or not len(mine.boxes):
        return torch.full((len(reference),), -1)
    distance = (reference.bboxes[:, None] - mine.boxes).abs().amax(dim=2)
    distance[reference.labels[:, None] != mine.labels] = torch.inf
    nearest, index = distance.min(dim=1)
    return torch.where(nearest < 1, index, -1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coco", type=Path, required=True, help="folder with annotations, train2017 and val2017")
    parser.add_argument("--steps", type=int, default=3, help="batches of two images whose losses are compared")
    parser.add_argument("--images", type=int, default=20, help="images whose detections are compared")
    arguments = parser.parse_args()
    register_all_modules()
    train, val = (Pictures(arguments.coco, split) for split in ("train2017", "val2017"))
    with_objects, without = train.usable(True), train.usable(False)
    batches = [(with_objects[2 * i : 2 * i + 2], [320, 400]) for i in range(arguments.steps)]
    if without:
        batches.append(([with_objects[-1], without[0]], [352, 320]))
    tests = val.usable(True)[: arguments.images]
    failed = False
    for kind in SECTIONS:
        ours, theirs = build(kind)
        worst: dict[tuple[str, str], float] = defaultdict(float)
        for images, sides in batches:
            step = compare_training(ours, theirs, train.batch(images, sides, training=True), kind)
            for key, value in step.items():
                worst[key] = max(worst[key], value)
        count = 0
        for i in range(0, len(tests), 2):
            batch = val.batch(tests[i : i + 2], [320, 480][: len(tests[i : i + 2])], training=False)
            detections, step = compare_inference(ours, theirs, batch)
            count += detections
            for key, value in step.items():
                worst[key] = max(worst[key], value)
        print(f"{kind}: {len(batches)} training batches, {len(tests)} images with {count} detections")
        failed |= oracle.report(worst, LIMITS, each=("loss",))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
