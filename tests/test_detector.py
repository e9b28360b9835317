"""Mask R-CNN and its cascade: arithmetic on boxes and masks by hand, training and detection on toy images.

That they equal the paper's toolbox is shown by ``tests/parity/detection.py``.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from conv2former.errors import UserError
from conv2former.tasks.detection.config import DetectorSection
from conv2former.tasks.detection.model import box_head as roi
from conv2former.tasks.detection.model import box_ops as boxes
from conv2former.tasks.detection.model import mask_head as masks
from conv2former.tasks.detection.model import rpn
from conv2former.tasks.detection.model.box_ops import BACKGROUND, IGNORED
from conv2former.tasks.detection.model.detector import STAGES, Detections, Detector
from conv2former.tasks.detection.model.fpn import FPN, STRIDES
from conv2former.tasks.detection.model.mask_head import paste_masks
from conv2former.tasks.detection.model.roi_heads import CascadeStage, Target

WIDTHS = (8, 12, 16, 24)
SMALL = dict(channels=16, box_head_channels=32, train_proposals=100, rois=64)
SECTIONS = {
    "mask_rcnn": DetectorSection(**SMALL),
    "cascade_mask_rcnn": DetectorSection(
        kind="cascade_mask_rcnn", box_head="4conv1fc", box_loss="giou", rpn_loss="smooth_l1", **SMALL
    ),
}


class Toy(nn.Module):
    """Four convolutions with group norm, the maps of which have stride 4, 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, *WIDTHS)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(widths[i], widths[i + 1], 3, stride=4 if i == 0 else 2, padding=1),
                nn.GroupNorm(4, widths[i + 1]),
                nn.ReLU(),
            )
            for i in range(4)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps


def detector(kind: str = "mask_rcnn", **changes: object) -> Detector:
    section = SECTIONS[kind].model_copy(update=changes)
    return Detector(Toy(), widths=WIDTHS, section=section, num_classes=3)


def rectangles(size: tuple[int, int], *objects: tuple[int, int, int, int, int]) -> Target:
    """A target of filled rectangles x0, y0, x1, y1, class."""
    pictures = torch.zeros(len(objects), *size, dtype=torch.uint8)
    for picture, (x0, y0, x1, y1, _) in zip(pictures, objects, strict=True):
        picture[y0:y1, x0:x1] = 1
    corners = torch.tensor([one[:4] for one in objects], dtype=torch.float).reshape(-1, 4)
    return Target(corners, torch.tensor([one[4] for one in objects], dtype=torch.long), pictures)


def some_boxes(count: int) -> Tensor:
    start = torch.rand(count, 2) * 50
    return torch.cat([start, start + 1 + torch.rand(count, 2) * 50], dim=1)


# --- boxes ---


def test_offsets_by_hand():
    box, truth = torch.tensor([[10.0, 10, 30, 50]]), torch.tensor([[20.0, 20, 60, 40]])
    offsets = boxes.encode(box, truth, (0.1, 0.1, 0.2, 0.2))
    expected = torch.tensor([[20 / 20 / 0.1, 0, math.log(2) / 0.2, math.log(0.5) / 0.2]])
    torch.testing.assert_close(offsets, expected)


def test_offsets_there_and_back():
    start, truth, deviations = some_boxes(50), some_boxes(50), (0.05, 0.05, 0.1, 0.1)
    found = boxes.decode(start, boxes.encode(start, truth, deviations), deviations)
    torch.testing.assert_close(found, truth, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("log_scale", "side"), [(100.0, 10 * 1000 / 16), (-100.0, 10 * 16 / 1000), (0.0, 10.0)])
def test_scale_is_limited_both_ways(log_scale, side):
    found = boxes.decode(torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0, 0, log_scale, log_scale]]), (1, 1, 1, 1))
    expected = torch.tensor([[5 - side / 2, 5 - side / 2, 5 + side / 2, 5 + side / 2]])
    torch.testing.assert_close(found, expected)


def test_clip_and_area():
    clipped = boxes.clip(torch.tensor([[-5.0, 2, 30, 50], [40, 3, 60, 9]]), torch.tensor([[20, 25], [20, 40]]))
    assert clipped.tolist() == [[0, 2, 25, 20], [40, 3, 40, 9]]
    assert boxes.has_area(clipped).tolist() == [True, False]


# IoU with the objects: box 0 with object 0 is 1, box 1 with object 0 is 0.5, box 2 with object 1 is 1/4, the last none
OBJECTS = torch.tensor([[0.0, 0, 10, 10], [100, 100, 120, 120]])
BOXES = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [100, 100, 110, 110], [50, 50, 60, 60]])


@pytest.mark.parametrize(
    ("low", "high", "weakest", "expected"),
    [
        (0.3, 0.7, None, [0, IGNORED, BACKGROUND, BACKGROUND]),
        (0.5, 0.5, None, [0, 0, BACKGROUND, BACKGROUND]),  # the limit itself is enough
        (0.3, 0.7, 0.25, [0, IGNORED, 1, BACKGROUND]),  # the best that object 1 has
        (0.3, 0.7, 0.26, [0, IGNORED, BACKGROUND, BACKGROUND]),  # which is not good enough
    ],
)
def test_match(low, high, weakest, expected):
    assert boxes.match(OBJECTS, BOXES, neg_iou_thr=low, pos_iou_thr=high, min_pos_iou=weakest).tolist() == expected


def test_match_claims_and_ties():
    objects = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 9]])
    found = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 1]])
    # The first box is nearest to object 0, but the best of the others as well: the last of them gets it.
    assert boxes.match(objects, found, neg_iou_thr=0.3, pos_iou_thr=0.7, min_pos_iou=0.3).tolist() == [2, BACKGROUND]
    assert boxes.match(objects, found, neg_iou_thr=0.3, pos_iou_thr=0.7).tolist() == [0, BACKGROUND]
    # Two boxes that an object overlaps equally are both its own.
    twins = torch.tensor([[0.0, 0, 10, 5], [0, 5, 10, 10]])
    assert boxes.match(objects[:1], twins, neg_iou_thr=0.3, pos_iou_thr=0.7, min_pos_iou=0.3).tolist() == [0, 0]


def test_match_without_objects_or_boxes():
    assert (
        boxes.match(torch.zeros(0, 4), BOXES, neg_iou_thr=0.3, pos_iou_thr=0.7, min_pos_iou=0.3).tolist()
        == [BACKGROUND] * 4
    )
    assert boxes.match(OBJECTS, torch.zeros(0, 4), neg_iou_thr=0.3, pos_iou_thr=0.7, min_pos_iou=0.3).tolist() == []


@pytest.mark.parametrize(
    ("objects", "background", "expected"), [(100, 500, (64, 192)), (10, 500, (10, 246)), (100, 50, (64, 50))]
)
def test_sample_counts(objects, background, expected):
    matches = torch.cat([torch.zeros(objects), torch.full((background,), BACKGROUND), torch.full((30,), IGNORED)])
    matches = matches.long()[torch.randperm(len(matches))]
    found, rest = boxes.sample(matches, 256, 0.25)
    assert (len(found), len(rest)) == expected
    assert (matches[found] == 0).all() and (matches[rest] == BACKGROUND).all()
    assert len(torch.cat([found, rest]).unique()) == sum(expected)


# --- region proposals ---


def test_anchors_by_hand():
    found = rpn.anchors((2, 3), 4, torch.device("cpu")).view(2, 3, 3, 4)
    torch.testing.assert_close(found[0, 0, 1], torch.tensor([-16.0, -16, 16, 16]))  # the square one, 8 strides wide
    flat = torch.tensor([-16 * math.sqrt(2), -16 / math.sqrt(2), 16 * math.sqrt(2), 16 / math.sqrt(2)])
    torch.testing.assert_close(found[0, 0, 0], flat)  # height over width 1/2, the same area, not rounded
    torch.testing.assert_close(found[0, 0, 2], flat[[1, 0, 3, 2]])
    torch.testing.assert_close(found[1, 2, 1], torch.tensor([-8.0, -12, 24, 20]))  # 2 strides right, 1 down


def test_anchors_in_the_padding_are_left_out():
    # 33 pixels are padded to 64, 16 cells of stride 4, and to one cell of stride 64; in the batch there are more.
    assert rpn.is_valid((32, 24), 4, (33, 30), torch.device("cpu")).view(32, 24, 3).sum((0, 1)).tolist() == [128] * 3
    assert rpn.is_valid((2, 2), 64, (33, 30), torch.device("cpu")).tolist() == [True] * 3 + [False] * 9


@pytest.mark.parametrize("kind", SECTIONS)
def test_batch_padding_changes_no_anchor(kind):
    proposals = detector(kind).rpn
    found = []
    for padded in ((64, 96), (128, 160)):
        shapes = [(math.ceil(padded[0] / stride), math.ceil(padded[1] / stride)) for stride in STRIDES]
        grid = torch.cat([rpn.anchors(shape, s, torch.device("cpu")) for shape, s in zip(shapes, STRIDES, strict=True)])
        found.append(grid[proposals._usable(grid, shapes, (60, 80))])
    torch.testing.assert_close(*found)
    inside = ((found[0][:, :2] >= 0) & (found[0][:, 2:] < torch.tensor([80, 60]))).all(dim=1)
    assert inside.all() == (kind == "cascade_mask_rcnn")  # which learns from no anchor across the border


def test_proposals_lie_in_their_image():
    net, sizes = detector().train(), [(128, 160), (70, 90)]
    proposals, losses = net.rpn(net.pyramid(net.backbone(torch.randn(2, 3, 128, 160))), sizes, None)
    assert losses == {}
    for found, (height, width) in zip(proposals, sizes, strict=True):
        assert 0 < len(found) <= 100 and not found.requires_grad
        assert found.min() >= 0 and (found.amax(dim=0)[2:] <= torch.tensor([width, height])).all()
        assert boxes.has_area(found).all()


# --- features of boxes ---


@pytest.mark.parametrize(("side", "level"), [(1, 0), (111.9, 0), (112, 1), (223.9, 1), (224, 2), (448, 3), (5000, 3)])
def test_level_of_a_box(side, level):
    assert roi.levels(torch.tensor([[3.0, 5, 3 + side, 5 + side]])).item() == level
    assert roi.levels(torch.tensor([[0, 0, side / 2, side * 2]])).item() == level  # area counts, not shape


def test_pool_reads_the_right_place():
    # Maps whose value is the x coordinate of a position's centre; a box's features are x across it, on every level.
    maps = [((torch.arange(512 // s) + 0.5) * s).expand(2, 1, 512 // s, -1).contiguous() for s in STRIDES]
    maps[0][1] += 1000
    found = roi.pool(maps, torch.tensor([[100.0, 200, 300, 400], [20, 30, 34, 58]]), torch.tensor([0, 1]), 7)
    bins = (torch.arange(7) + 0.5) / 7
    torch.testing.assert_close(found[0, 0], (100 + 200 * bins).expand(7, 7))
    torch.testing.assert_close(found[1, 0], (1020 + 14 * bins).expand(7, 7))


# --- masks ---


def test_mask_targets_by_hand():
    picture = rectangles((64, 96), (16, 8, 44, 64, 0), (0, 0, 96, 64, 1)).masks
    box = torch.tensor([[16.0, 8, 72, 64], [16, 8, 44, 36], [0, 36, 28, 64]])
    found = masks.mask_targets(picture, box, torch.tensor([0, 0, 1]), (64, 96))
    half = torch.zeros(28, 28)
    half[:, :14] = 1
    assert torch.equal(found[0], half)
    assert found[1].all() and found[2].all()
    assert masks.mask_targets(picture, torch.zeros(0, 4), torch.zeros(0).long(), (64, 96)).shape == (0, 28, 28)


def test_mask_targets_as_if_padded():
    size, padded = (50, 70), (64, 96)
    picture = (torch.rand(3, *size) > 0.5).to(torch.uint8)
    outer = torch.zeros(3, *padded, dtype=torch.uint8)
    outer[:, : size[0], : size[1]] = picture
    box = boxes.clip(some_boxes(30), torch.tensor(size))
    objects = torch.arange(30) % 3
    assert torch.equal(
        masks.mask_targets(picture, box, objects, padded), masks.mask_targets(outer, box, objects, padded)
    )


def test_paste_where_it_belongs():
    full = torch.ones(2, 28, 28)
    full[1, :, 14:] = 0
    found = paste_masks(full, torch.tensor([[10.0, 20, 38, 76], [-10, 0, 46, 28]]), (80, 60))
    assert found.dtype == torch.bool and found.shape == (2, 80, 60)
    expected = rectangles((80, 60), (10, 20, 38, 76, 0), (0, 0, 18, 28, 0)).masks.bool()
    assert torch.equal(found, expected)


def test_paste_is_bilinear_sampling():
    probabilities, where = torch.rand(5, 28, 28), some_boxes(5)
    y, x = torch.meshgrid(torch.arange(90) + 0.5, torch.arange(100) + 0.5, indexing="ij")
    grid = torch.stack([x, y], dim=-1) - where[:, None, None, :2]
    grid = grid / (where[:, 2:] - where[:, :2])[:, None, None] * 2 - 1
    values = nn.functional.grid_sample(probabilities.unsqueeze(1), grid, align_corners=False).squeeze(1)
    differ = paste_masks(probabilities, where, (90, 100)) != (values >= 0.5)
    assert not differ[(values - 0.5).abs() > 1e-5].any()


def test_paste_nothing():
    probabilities, where = torch.rand(7, 28, 28), some_boxes(7)
    assert paste_masks(probabilities[:0], where[:0], (50, 70)).shape == (0, 50, 70)
    assert not paste_masks(probabilities[:1], torch.tensor([[5.0, 5, 5, 20]]), (50, 70)).any()  # of no width


# --- stages ---


def test_drawn_boxes():
    stage = CascadeStage(SECTIONS["mask_rcnn"], 3, STAGES["mask_rcnn"][0])
    target = rectangles((64, 64), (0, 0, 20, 20, 2), (30, 30, 60, 60, 1))
    proposals = torch.cat([torch.tensor([[30.0, 30, 60, 55]]), torch.tensor([[40.0, 0, 50, 10]]).expand(200, 4)])
    empty = rectangles((64, 64))
    drawn = stage.match_and_sample([proposals, proposals], [target, empty])
    assert len(drawn.boxes) == 2 * 64
    assert drawn.labels[:3].tolist() == [2, 1, 1] and (drawn.labels[3:] == 3).all()
    assert drawn.gt_as_proposals.nonzero().flatten().tolist() == [0, 1]
    assert drawn.objects.tolist() == [0, 1, 1]
    assert torch.equal(drawn.gt_boxes, target.boxes[drawn.objects])
    assert drawn.images.bincount().tolist() == [64, 64]


def test_refined_boxes():
    stage = CascadeStage(SECTIONS["cascade_mask_rcnn"], 3, STAGES["cascade_mask_rcnn"][1])
    start = torch.tensor([[10.0, 10, 30, 30]] * 3)
    offsets = torch.zeros(3, 3, 4)
    offsets[:, 0, 0], offsets[:, 1, 0], offsets[:, 2, 0] = 1, 2, 100  # of 20 * 0.05 pixels
    logits = torch.tensor([[0.0, 5, 0, 9]] * 3)  # likeliest object is class 1, for all that background is likelier
    limits = torch.tensor([[64, 64]] * 3)
    known = stage.refine(start, logits, offsets, limits, torch.tensor([0, 3, 2]))
    assert known[:, 0].tolist() == pytest.approx([11, 12, 64])
    assert stage.refine(start, logits, offsets, limits, None)[:, 0].tolist() == pytest.approx([12, 12, 12])


@pytest.mark.parametrize(("overlap", "loss"), [((0, 0, 10, 10), 0.0), ((0, 0, 10, 5), 0.5), ((10, 0, 20, 10), 1.0)])
def test_giou_by_hand(overlap, loss):
    stage = CascadeStage(SECTIONS["cascade_mask_rcnn"], 3, STAGES["cascade_mask_rcnn"][0])
    maps = [torch.zeros(1, 16, 64 // s or 1, 64 // s or 1) for s in STRIDES]
    target = rectangles((64, 64), (*overlap, 0))
    drawn = stage.match_and_sample([torch.zeros(0, 4)], [target])._replace(boxes=torch.tensor([[0.0, 0, 10, 10]]))
    terms = stage.losses(maps, drawn, torch.zeros(1, 4), torch.zeros(1, 3, 4), [target], (64, 64))
    assert terms["box"].item() == pytest.approx(10 * loss, abs=1e-5)
    assert terms["class"].item() == pytest.approx(math.log(4))


# --- the whole ---


@pytest.mark.parametrize("kind", SECTIONS)
@pytest.mark.parametrize("shown", ["all", "one", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_learns(kind, shown, dtype):
    net = detector(kind).train()
    sizes = [(96, 128), (70, 90)]
    some = rectangles(sizes[0], (10, 10, 60, 50, 0), (70, 20, 120, 90, 2))
    targets = [some if shown != "none" else rectangles(sizes[0]), rectangles(sizes[1])]
    if shown == "all":
        targets[1] = rectangles(sizes[1], (5, 30, 80, 60, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = net(torch.randn(2, 3, 96, 128), sizes, targets)
    stages = [""] if kind == "mask_rcnn" else ["stage1_", "stage2_", "stage3_"]
    names = [stage + name for stage in stages for name in ("class", "box", "mask")]
    assert list(losses) == ["rpn_class", "rpn_box", *names]
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    for name, loss in losses.items():
        assert (loss > 0) == ("class" in name or shown != "none"), name


@pytest.mark.parametrize("kind", SECTIONS)
def test_without_any_proposal(kind):
    net = detector(kind).train()
    maps, limits = net.pyramid(net.backbone(torch.randn(1, 3, 64, 64))), torch.tensor([[64, 64]])
    losses = net._learn(maps, [torch.zeros(0, 4)], limits, [rectangles((64, 64))], (64, 64))
    assert sum(losses.values()) == 0
    assert all(buffer.isfinite().all() for buffer in net.buffers())
    found = net.eval()._detect(maps, [torch.zeros(0, 4)], limits)[0]
    assert [len(column) for column in found] == [0] * 4


def test_a_seed_repeats_a_step():
    net, image = detector("cascade_mask_rcnn").train(), torch.randn(1, 3, 96, 96)
    target = rectangles((96, 96), (10, 10, 60, 50, 0))
    steps = []
    for _ in range(2):
        torch.manual_seed(5)
        steps.append(net(image, [(96, 96)], [target]))
    assert steps[0] == steps[1]


@pytest.mark.parametrize("kind", ["mask_rcnn", pytest.param("cascade_mask_rcnn", marks=pytest.mark.slow)])
def test_learns_a_picture(kind):
    net = detector(kind, score_threshold=0.5, channels=24, box_head_channels=96, rois=256, train_proposals=1000).train()
    objects = rectangles((64, 96), (8, 16, 44, 52, 1), (56, 4, 88, 60, 2))
    image = torch.zeros(1, 3, 64, 96)
    image[0, :2] = objects.masks * 2.0
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(50):
        optimizer.zero_grad()
        sum(net(image, [(64, 96)], [objects]).values()).backward()
        optimizer.step()
    found = net.eval()(image, [(64, 96)])[0]
    order = found.labels.argsort()
    assert found.labels[order].tolist() == [1, 2]
    assert box_iou(found.boxes[order], objects.boxes).diagonal().min() > 0.75
    seen, truth = paste_masks(found.masks, found.boxes, (64, 96))[order], objects.masks.bool()
    assert ((seen & truth).sum((1, 2)) / (seen | truth).sum((1, 2))).min() > 0.75


@pytest.mark.parametrize("kind", SECTIONS)
def test_detections(kind):
    sizes = [(96, 128), (70, 90)]
    found = detector(kind, score_threshold=0.0).eval()(torch.randn(2, 3, 96, 128), sizes)
    for one, (height, width) in zip(found, sizes, strict=True):
        assert isinstance(one, Detections)
        assert one.boxes.shape == (100, 4) and one.masks.shape == (100, 28, 28)
        assert one.scores.diff().max() <= 0 and ((one.labels >= 0) & (one.labels < 3)).all()
        assert one.boxes.min() >= 0 and (one.boxes.amax(dim=0)[2:] <= torch.tensor([width, height])).all()


@pytest.mark.parametrize("kind", SECTIONS)
def test_nothing_detected(kind):
    found = detector(kind, score_threshold=0.99).eval()(torch.randn(2, 3, 64, 64), [(64, 64), (40, 50)])
    assert [tuple(column.shape) for column in found[1]] == [(0, 4), (0,), (0,), (0, 28, 28)]


def test_pyramid_shapes():
    maps = FPN(WIDTHS, 16)(Toy()(torch.randn(2, 3, 96, 160)))
    assert [tuple(x.shape) for x in maps] == [(2, 16, math.ceil(96 / s), math.ceil(160 / s)) for s in STRIDES]
    assert torch.equal(maps[4], maps[3][:, :, ::2, ::2])


def test_mistakes():
    net, image = detector().train(), torch.zeros(1, 3, 64, 64)
    for sizes, targets in (([], []), ([(64, 64)], None), ([(64, 64)], [])):
        with pytest.raises(UserError, match="one size for each image"):
            net(image, sizes, targets)


def test_the_highest_scores_are_a_stable_sorts() -> None:
    scores = (torch.rand(2, 5000) * 200).round() / 200  # many are equal
    scores[1] = 1
    for count in (1, 1000, 6000):
        ranked, order = scores.sort(dim=1, descending=True, stable=True)
        best, index = rpn.highest(scores, count)
        assert torch.equal(best, ranked[:, :count]) and torch.equal(index, order[:, :count])
