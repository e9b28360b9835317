"""The paper's Tables 2 to 9 and Fig. 4, row by row: printed number, and the recipe that trains the row."""

from __future__ import annotations

from dataclasses import dataclass

from conv2former.errors import UserError, nearest_or_all
from conv2former.recipes.load import load_recipe


@dataclass(frozen=True)
class PaperRow:
    """A row of a table."""

    label: str  # as the paper prints it
    recipe: str | None  # the shipped recipe that trains it; None where nothing here does
    paper: float | None = None  # the printed number; None where the paper draws it only
    model: str | None = None  # a model of timm's that takes the place of the recipe's
    group: str = ""  # rows that are compared with each other, the last of them with all; '' where the table is one

    @property
    def name(self) -> str:
        """What ``--row`` and files call it."""
        if self.recipe is None:
            return self.label
        return f"{self.recipe}-{self.model}" if self.model else self.recipe


@dataclass(frozen=True)
class PaperTable:
    """A table or figure."""

    title: str  # what it compares
    rows: tuple[PaperRow, ...]  # as printed
    task: str = "classification"  # of all its recipes
    only_full: str = ""  # why there is no small scale; '' where there is


def _ours(label: str, recipe: str, group: str = "") -> PaperRow:
    return PaperRow(label, recipe, load_recipe(recipe).claim.paper, group=group)


def _baseline(label: str, paper: float, model: str | None, recipe: str, group: str = "") -> PaperRow:
    return PaperRow(label, recipe if model else None, paper, model, group)


def table2() -> PaperTable:
    t = "imagenet1k_t"
    rows = (
        _baseline("ResNet-50", 78.5, "resnet50", t),
        _baseline("Swin-T", 81.5, "swin_tiny_patch4_window7_224", t),
        _baseline("ConvNeXt-T", 82.1, "convnext_tiny", t),
        _ours("Conv2Former-N", "imagenet1k_n"),
        _ours("Conv2Former-T", t),
    )
    return PaperTable("Table 2: stages of three models beside ours", rows)


def table3() -> PaperTable:
    t, s, b = "imagenet1k_t", "imagenet1k_s", "imagenet1k_b"
    rows = (
        _baseline("ResNet-50-d", 79.5, "resnet50d", t, "T"),
        _baseline("Swin-T", 81.5, "swin_tiny_patch4_window7_224", t, "T"),
        _baseline("ConvNeXt-T", 82.1, "convnext_tiny", t, "T"),
        _ours("Conv2Former-T", t, "T"),
        _baseline("Swin-S", 83.0, "swin_small_patch4_window7_224", s, "S"),
        _baseline("ConvNeXt-S", 83.1, "convnext_small", s, "S"),
        _baseline("NFNet-F0", 83.6, "nfnet_f0", s, "S"),
        _ours("Conv2Former-S", s, "S"),
        _baseline("DeiT-B", 81.8, "deit_base_patch16_224", b, "B"),
        _baseline("RegNetY-16G", 82.9, "regnety_160", b, "B"),
        _baseline("RepLKNet-31B", 83.5, None, b, "B"),
        _baseline("Swin-B", 83.5, "swin_base_patch4_window7_224", b, "B"),
        _baseline("ConvNeXt-B", 83.8, "convnext_base", b, "B"),
        _baseline("FocalNet-B", 83.9, "focalnet_base_lrf", b, "B"),
        _baseline("MOAT-2", 84.2, None, b, "B"),
        _baseline("EfficientNet-B7", 84.3, "efficientnet_b7", b, "B"),
        _ours("Conv2Former-B", b, "B"),
    )
    return PaperTable("Table 3: ImageNet-1k", rows)


def table4() -> PaperTable:
    # Swin and CoAtNet have positions of their own at 384 px, which their weights of 224 px would have to be fitted to
    s, b, large = (f"imagenet1k_ft224_{size}" for size in "sbl")
    b_384, large_384 = "imagenet1k_ft384_b", "imagenet1k_ft384_l"
    rows = (
        _baseline("ConvNeXt-S, 224", 84.6, "convnext_small", s, "S, 224"),
        _ours("Conv2Former-S, 224", s, "S, 224"),
        _baseline("Swin-B, 224", 85.2, "swin_base_patch4_window7_224", b, "B, 224"),
        _baseline("ConvNeXt-B, 224", 85.8, "convnext_base", b, "B, 224"),
        _baseline("MOAT-2, 224", 86.0, None, b, "B, 224"),
        _ours("Conv2Former-B, 224", b, "B, 224"),
        _baseline("Swin-B, 384", 86.4, None, b_384, "B, 384"),
        _baseline("ConvNeXt-B, 384", 86.8, "convnext_base", b_384, "B, 384"),
        _ours("Conv2Former-B, 384", b_384, "B, 384"),
        _baseline("EfficientNetV2-XL, 480", 87.3, None, large_384, "L, 384"),
        _baseline("Swin-L, 224", 86.3, "swin_large_patch4_window7_224", large, "L, 224"),
        _baseline("ConvNeXt-L, 224", 86.6, "convnext_large", large, "L, 224"),
        _baseline("MOAT-3, 224", 86.8, None, large, "L, 224"),
        _ours("Conv2Former-L, 224", large, "L, 224"),
        _baseline("Swin-L, 384", 87.3, None, large_384, "L, 384"),
        _baseline("ConvNeXt-L, 384", 87.5, "convnext_large", large_384, "L, 384"),
        _baseline("CoAtNet-3, 384", 87.6, None, large_384, "L, 384"),
        _ours("Conv2Former-L, 384", large_384, "L, 384"),
    )
    reason = "without the pre-training that it is about its rows would all be those of table 3"
    return PaperTable("Table 4: ImageNet-1k after ImageNet-22k", rows, only_full=reason)


def table5() -> PaperTable:
    b = "imagenet1k_b"
    rows = (
        _baseline("RepLKNet-31B, 31x31", 83.5, None, b),
        _baseline("ConvNeXt-B, 7x7", 83.8, "convnext_base", b),
        _baseline("SLaK-B, 51x51", 84.0, None, b),
        _ours("Conv2Former-B, 7x7", "imagenet1k_b_k7"),
        _ours("Conv2Former-B, 11x11", b),
    )
    return PaperTable("Table 5: ConvNets with different kernels", rows)


def fig4a() -> PaperTable:
    rows = []
    for size in "tb":
        for side in (5, 7, 9, 11, 15, 21):
            recipe = f"imagenet1k_{size}" + ("" if side == 11 else f"_k{side}")
            rows.append(_ours(f"{size.upper()}, {side}x{side}", recipe, size.upper()))
    return PaperTable("Fig. 4a: kernel size", tuple(rows))


def fig4b() -> PaperTable:
    rows = []
    for size in "ntsb":
        rows.append(_ours(f"{size.upper()}, sum", f"imagenet1k_{size}_sum", size.upper()))
        rows.append(_ours(f"{size.upper()}, Hadamard product", f"imagenet1k_{size}", size.upper()))
    return PaperTable("Fig. 4b: sum against Hadamard product", tuple(rows))


def table6() -> PaperTable:
    rows = (
        _ours("element-wise sum", "imagenet1k_t_sum"),
        _ours("sigmoid after A", "imagenet1k_t_sigmoid"),
        _ours("L1 normalisation after A", "imagenet1k_t_l1"),
        _ours("A scaled linearly to (0, 1]", "imagenet1k_t_linear"),
        _ours("Hadamard product", "imagenet1k_t"),
    )
    return PaperTable("Table 6: weighting strategies, Conv2Former-T", rows)


def table7() -> PaperTable:
    small, base = "imagenet1k_is", "imagenet1k_ib"
    rows = (
        _baseline("DeiT-S, 1 conv", 79.8, "deit_small_patch16_224", small, "S"),
        _baseline("ConvNeXt-IS, 1 conv", 79.7, None, small, "S"),
        _ours("Conv2Former-IS, 1 conv", small, "S"),
        _ours("Conv2Former-IS, 3 convs", "imagenet1k_is_conv3", "S"),
        _baseline("DeiT-B, 1 conv", 81.8, "deit_base_patch16_224", base, "B"),
        _baseline("ConvNeXt-IB, 1 conv", 82.0, None, base, "B"),
        _ours("Conv2Former-IB, 1 conv", base, "B"),
        _ours("Conv2Former-IB, 3 convs", "imagenet1k_ib_conv3", "B"),
    )
    return PaperTable("Table 7: isotropic models", rows)


def table8() -> PaperTable:
    mask, cascade = "coco_mask_rcnn_t", "coco_cascade_mask_rcnn_{}"
    rows = [
        _baseline("Mask R-CNN, Swin-T", 46.0, "swin_tiny_patch4_window7_224", mask, "Mask R-CNN"),
        _baseline("Mask R-CNN, ConvNeXt-T", 46.2, "convnext_tiny", mask, "Mask R-CNN"),
        _ours("Mask R-CNN, Conv2Former-T", mask, "Mask R-CNN"),
    ]
    for size, long, swin, convnext, slak in (
        ("t", "tiny", 50.4, 50.4, 51.3),
        ("s", "small", 51.9, 51.9, None),
        ("b", "base", 51.9, 52.7, None),
    ):
        recipe, letter, group = cascade.format(size), size.upper(), f"Cascade {size.upper()}"
        rows += [
            _baseline(f"Cascade, Swin-{letter}", swin, f"swin_{long}_patch4_window7_224", recipe, group),
            _baseline(f"Cascade, ConvNeXt-{letter}", convnext, f"convnext_{long}", recipe, group),
        ]
        rows += [_baseline(f"Cascade, SLaK-{letter}", slak, None, recipe, group)] if slak else []
        rows += [_ours(f"Cascade, Conv2Former-{letter}", recipe, group)]
    return PaperTable("Table 8: COCO, box AP", tuple(rows), "detection")


def table9() -> PaperTable:
    rows = []
    for size, long, swin, convnext in (
        ("t", "tiny", 45.8, 46.7),
        ("s", "small", 49.5, 49.6),
        ("b", "base", 49.7, 49.9),
        ("l", "large", 53.5, 53.7),
    ):
        recipe, letter = f"ade20k_upernet_{size}", size.upper()
        rows += [
            _baseline(f"Swin-{letter}", swin, f"swin_{long}_patch4_window7_224", recipe, letter),
            _baseline(f"ConvNeXt-{letter}", convnext, f"convnext_{long}", recipe, letter),
            _ours(f"Conv2Former-{letter}", recipe, letter),
        ]
    return PaperTable("Table 9: UperNet on ADE20K", tuple(rows), "segmentation")


TABLES = {
    make.__name__: make for make in (table2, table3, table4, table5, fig4a, fig4b, table6, table7, table8, table9)
}


def paper_table(name: str) -> PaperTable:
    """A table of ``TABLES``; raises UserError where there is none of that name."""
    if name not in TABLES:
        raise UserError(f"unknown table {name!r}{nearest_or_all(name, list(TABLES))}")
    return TABLES[name]()
