"""COCO's metrics of boxes and masks, over all processes."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from conv2former.data.rle import encode_mask
from conv2former.errors import percent
from conv2former.tasks.base import Evaluation
from conv2former.tasks.detection.coco import CocoSource
from conv2former.tasks.detection.model.detector import Detections
from conv2former.tasks.detection.model.mask_head import paste_masks
from conv2former.tasks.detection.objects import has_area

NUMBERS = (  # COCO's twelve, in its order
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)


class CocoMetric:
    """Detections in COCO's form, over all processes at the end.

    Args:
        source: The images, with their objects.
        distributed: Whether all processes look, each at a part of the images.
        masks: Whether the detector makes masks; they are evaluated where objects have some.
    """

    def __init__(self, source: CocoSource, *, distributed: bool = False, masks: bool = True) -> None:
        self.source, self.distributed = source, distributed
        self.kinds = {"box": "bbox", "mask": "segm"} if masks and source.has_masks else {"box": "bbox"}
        self.seen: list[int] = []
        self.rows: list[dict[str, Any]] = []

    def to(self, device: torch.device) -> CocoMetric:
        """Detections stay on the CPU."""
        return self

    def add(self, index: int, found: Detections, *, size: tuple[int, int], original: tuple[int, int]) -> None:
        """The detections on image ``index``, seen at ``size`` (h, w), whose file has ``original`` (h, w)."""
        self.seen.append(index)
        ids, number = self.source.category_ids, self.source.entries[index].id
        for row in coco_rows(found, size=size, original=original):
            row["category_id"] = ids[row.pop("label")]
            self.rows.append(dict(image_id=number) | row)

    def result(self) -> Evaluation:
        """AP of boxes and masks, computed by the first process."""
        found = self._over_all()
        metrics = {f"{kind}_{name}": found[kind][name] for kind in self.kinds for name in ("ap", "ap50", "ap75")}
        parts = []
        for kind in self.kinds:
            ap, ap50, ap75 = (math.nan if found[kind][name] is None else found[kind][name] for name in NUMBERS[:3])
            parts.append(f"{kind} AP {ap:.2f} (50: {ap50:.2f}, 75: {ap75:.2f})")
        line = f"{', '.join(parts)}, {found['detections']} detections on {found['images']} images"
        useless = "nothing was detected" if found["objects"] and not found["detections"] else ""
        return Evaluation(metrics, line, found, self.rows, table=self._table(found), useless=useless)

    def _over_all(self) -> dict[str, Any]:
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and self.distributed):
            return self.compute()
        group: Any = dist.new_group(backend="gloo")  # not through the memory of GPUs
        first = dist.get_rank() == 0
        parts: Any = [None] * dist.get_world_size() if first else None
        dist.gather_object((self.seen, self.rows), parts, group=group)
        figures: list[Any] = [None]
        if first:
            self.seen = sorted({index for seen, _ in parts for index in seen})
            self.rows = [row for _, rows in parts for row in rows]
            figures = [self.compute()]
        dist.broadcast_object_list(figures, group=group)
        dist.destroy_process_group(group)
        return figures[0]

    def compute(self) -> dict[str, Any]:
        """``images``, ``objects``, ``detections``, and ``box`` and ``mask`` with COCO's twelve numbers in percent.

        All objects count for boxes, those that have a mask for masks. A number is None where no object is of that size;
        all are 0 where nothing was detected.
        """
        truth = self.source.ground_truth(sorted(self.seen))
        counted = sum(not entry["iscrowd"] for entry in truth["annotations"])
        found: dict[str, Any] = dict(images=len(self.seen), objects=counted, detections=len(self.rows))
        names = [str(entry["name"]) for entry in truth["categories"]]
        found["per_class"] = {name: {} for name in names}
        for kind, coco_kind in self.kinds.items():
            found[kind], by_class = coco_evaluation(truth, self.rows, coco_kind)
            for name, ap in zip(names, by_class, strict=True):
                found["per_class"][name][f"{kind}_ap"] = ap
        counts = Counter(entry["category_id"] for entry in truth["annotations"] if not entry["iscrowd"])
        for entry in truth["categories"]:
            found["per_class"][str(entry["name"])]["objects"] = counts[entry["id"]]
        return found

    def _table(self, found: dict[str, Any]) -> list[list[str]]:
        rows = [
            [name, *(percent(one[f"{kind}_ap"]) for kind in self.kinds), str(one["objects"])]
            for name, one in found["per_class"].items()
        ]
        rows.append(["mean", *(percent(found[kind]["ap"]) for kind in self.kinds), str(found["objects"])])
        return [["class", *(f"{kind} AP" for kind in self.kinds), "objects"], *rows]


def coco_rows(found: Detections, *, size: tuple[int, int], original: tuple[int, int]) -> list[dict[str, Any]]:
    """Detections as ``label``, ``score``, ``bbox`` (x, y, width, height) and ``segmentation`` in the original's pixels.

    Those of a detector without masks have no ``segmentation``.

    Args:
        found: In pixels of the network's input.
        size: (h, w) of the input.
        original: (h, w) of the image in its file.
    """
    height, width = original
    boxes = (found.boxes * found.boxes.new_tensor([width / size[1], height / size[0]] * 2)).cpu()
    columns = zip(boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    rows: list[dict[str, Any]] = [
        dict(label=label, score=score, bbox=[left, top, right - left, bottom - top])
        for (left, top, right, bottom), score, label in columns
    ]
    if not found.masks.shape[1]:
        return rows
    masks = _encoded(found.masks.cpu(), boxes, original)
    return [row | dict(segmentation=mask) for row, mask in zip(rows, masks, strict=True)]


def _encoded(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Masks (N, 28, 28) of boxes (N, 4) as run lengths in an image (h, w).

    One after the other, each in the window of its box: no pixel whose centre lies outside of a box belongs to its mask.
    """
    canvas = np.zeros(size, np.uint8, order="F")  # the order of run lengths
    for mask, box in zip(masks, boxes, strict=True):
        left, top = (int(value) for value in box[:2].floor().clamp_min(0))
        right, bottom = (min(math.ceil(value), side) for value, side in zip(box[2:], (size[1], size[0]), strict=True))
        window = (slice(top, bottom), slice(left, right))
        if top < bottom and left < right:
            shift = box.new_tensor([left, top, left, top])
            canvas[window] = paste_masks(mask[None], (box - shift)[None], (bottom - top, right - left))[0].numpy()
        yield encode_mask(canvas)
        canvas[window] = 0


def coco_evaluation(
    truth: dict[str, Any], rows: Sequence[dict[str, Any]], kind: str
) -> tuple[dict[str, float | None], list[float | None]]:
    """COCO's twelve numbers, and the AP of each category, in percent.

    By faster-coco-eval, which agrees with pycocotools.

    Args:
        truth: COCO's dictionary; its images alone count. Ids may be anything.
        rows: COCO's results.
        kind: 'bbox' or 'segm'; for the latter objects without a mask do not count, nor do masks that are found there.
    """
    objects = truth["annotations"]
    if kind == "segm":
        seen = [entry for entry in objects if entry.get("segmentation") or has_area(entry["bbox"])]
        objects = [*map(_with_mask, seen)] if any(entry.get("segmentation") for entry in seen) else []
    if not rows or not objects:
        there = {entry["category_id"] for entry in objects if not entry["iscrowd"]}
        nothing = [0.0 if entry["id"] in there else None for entry in truth["categories"]]
        return dict.fromkeys(NUMBERS, 0.0 if objects else None), nothing
    from faster_coco_eval import COCO, COCOeval_faster

    # numbers of our own: the library holds ids as floating point, in which large ones fall together
    images, categories = (
        {entry["id"]: number for number, entry in enumerate(truth[key], 1)} for key in ("images", "categories")
    )

    def numbered(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        ids = dict(image_id=images, category_id=categories)
        return [
            entry | {key: own[entry[key]] for key, own in ids.items()} | dict(id=number)
            for number, entry in enumerate(entries, 1)
            if entry["image_id"] in images
        ]

    listed = [dict(entry, id=images[entry["id"]]) for entry in truth["images"]]
    names = [dict(entry, id=categories[entry["id"]]) for entry in truth["categories"]]
    # it changes what it is given
    truths = COCO(dict(images=listed, annotations=numbered(objects), categories=names), use_deepcopy=True)
    # of a result with both, COCO takes the box
    keys = ("image_id", "category_id", "score", dict(bbox="bbox", segm="segmentation")[kind])
    found = truths.loadRes(copy.deepcopy([{key: row[key] for key in keys} for row in numbered(rows)]))
    evaluation = COCOeval_faster(truths, found, kind)
    evaluation.params.imgIds = [image["id"] for image in listed]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    numbers = dict(zip(NUMBERS, map(_percent, evaluation.stats[: len(NUMBERS)]), strict=True))
    # (thresholds, recalls, categories, areas, limits of detections): all areas, the highest limit; -1 without objects
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
    return numbers, [_percent(precision[:, :, index].mean()) for index in range(precision.shape[2])]


def _with_mask(entry: dict[str, Any]) -> dict[str, Any]:
    """An object; one without a mask as a region in which nothing counts, as COCO's crowds do."""
    if entry.get("segmentation"):
        return entry
    left, top, width, height = entry["bbox"]
    right, low = left + width, top + height
    return entry | dict(iscrowd=1, segmentation=[[left, top, right, top, right, low, left, low]])


def _percent(value: float) -> float | None:
    return None if value < 0 else 100 * float(value)
