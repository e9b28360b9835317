"""Draws the figures of docs/concepts.md, and the tutorials' data: ``python docs/drawings.py``.

``python docs/drawings.py RUNS`` also takes the figures of the tutorials' runs out of their folder RUNS.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

from conv2former.tools.samples import PARTS, write_samples

IMAGES = Path(__file__).parent / "images"
BLUE, GREEN, ORANGE, RED, GREY = "#dfe3f7", "#d9efe3", "#fbe6c8", "#f8d7da", "#eceff1"
INK = "#22303c"


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches, in which an inch is a unit."""
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return figure, axes


def box(
    axes: Axes, x: float, y: float, text: str, *, width: float = 1.6, height: float = 0.46, fill: str = BLUE
) -> None:
    """A box around its centre."""
    shape = dict(boxstyle="round,pad=0,rounding_size=0.07", facecolor=fill, edgecolor=INK, linewidth=1.1)
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, **shape))
    axes.text(x, y, text, ha="center", va="center", fontsize=12, color=INK)


def line(axes: Axes, *points: tuple[float, float], head: bool = True) -> None:
    """A line with corners, and an arrow's head at its end."""
    for number, (one, other) in enumerate(itertools.pairwise(points)):
        last = number == len(points) - 2
        style = "-|>" if head and last else "-"
        axes.add_patch(
            FancyArrowPatch(
                one, other, arrowstyle=style, mutation_scale=13, shrinkA=0, shrinkB=0, color=INK, linewidth=1.2
            )
        )


def word(
    axes: Axes, x: float, y: float, text: str, *, size: float = 11, weight: str = "normal", ha: str = "center"
) -> None:
    axes.text(x, y, text, ha=ha, va="center", fontsize=size, color=INK, weight=weight)


def join(axes: Axes, x: float, y: float, text: str) -> None:
    """A circle with an operation."""
    axes.text(
        x, y, text, ha="center", va="center", fontsize=14, color=INK,
        bbox=dict(boxstyle="circle,pad=0.15", facecolor="white", edgecolor=INK, linewidth=1.2),
    )  # fmt: skip


def block() -> Figure:
    """Fig. 3 (a) and (d) of the paper, with the sizes of the tensors."""
    figure, axes = canvas(10, 5.2)
    word(axes, 2.4, 4.95, "Self-attention", size=14, weight="bold")
    word(axes, 2.4, 0.45, "X   (N, C)")
    for x, name in ((0.9, "Linear: Q"), (2.4, "Linear: K"), (3.9, "Linear: V")):
        line(axes, (2.4, 0.62), (2.4, 0.85), (x, 0.85), (x, 1.15))
        box(axes, x, 1.38, name, width=1.25)
    line(axes, (0.9, 1.61), (0.9, 2.2), (1.42, 2.2))
    line(axes, (2.4, 1.61), (2.4, 2.2), (1.9, 2.2))
    join(axes, 1.65, 2.2, "·")
    line(axes, (1.65, 2.4), (1.65, 2.66))
    box(axes, 1.65, 2.9, "Softmax", width=1.3, fill=RED)
    word(axes, 0.48, 3.42, "A   (N, N)")
    line(axes, (1.65, 3.13), (1.65, 3.75), (2.55, 3.75))
    line(axes, (3.9, 1.61), (3.9, 3.75), (3.05, 3.75))
    word(axes, 4.42, 2.8, "V   (N, C)", size=10)
    join(axes, 2.8, 3.75, "·")
    line(axes, (2.8, 3.95), (2.8, 4.05))
    box(axes, 2.8, 4.26, "Linear", width=1.25, height=0.4)
    word(axes, 2.8, 4.62, "Z   (N, C)")
    axes.plot([5.05, 5.05], [0.2, 5.0], color="#b0bec5", linewidth=1)
    word(axes, 7.5, 4.95, "Convolutional modulation", size=14, weight="bold")
    word(axes, 7.5, 0.45, "X   (H, W, C)")
    for x in (6.5, 8.5):
        line(axes, (7.5, 0.62), (7.5, 0.85), (x, 0.85), (x, 1.15))
    box(axes, 6.5, 1.38, "Linear, GELU")
    box(axes, 8.5, 1.38, "Linear")
    line(axes, (6.5, 1.61), (6.5, 2.1))
    box(axes, 6.5, 2.36, "Depthwise\nconvolution 11 x 11", width=2.0, height=0.62, fill=GREEN)
    line(axes, (6.5, 2.67), (6.5, 3.4), (7.22, 3.4))
    word(axes, 5.98, 3.12, "A   (H, W, C)")
    line(axes, (8.5, 1.61), (8.5, 3.4), (7.78, 3.4))
    word(axes, 9.18, 2.5, "V   (H, W, C)")
    join(axes, 7.5, 3.4, "*")
    line(axes, (7.5, 3.62), (7.5, 3.85))
    box(axes, 7.5, 4.08, "Linear")
    line(axes, (7.5, 4.31), (7.5, 4.5))
    word(axes, 7.5, 4.64, "Z   (H, W, C)")
    return figure


def network() -> Figure:
    """The five parts of the network, T at 224 pixels."""
    figure, axes = canvas(10, 3.1)
    word(axes, 0.75, 2.75, "image", weight="bold")
    axes.add_patch(Rectangle((0.1, 0.85), 1.3, 1.3, facecolor=GREY, edgecolor=INK))
    word(axes, 0.75, 0.5, "224 x 224 x 3", size=10)
    x, side = 2.35, 1.15
    stages = (("stage 1", 72, 3, 56), ("stage 2", 144, 3, 28), ("stage 3", 288, 12, 14), ("stage 4", 576, 3, 7))
    line(axes, (1.42, 1.5), (1.85, 1.5))
    word(axes, 1.64, 1.68, "stem", size=9)
    for number, (name, channels, blocks, pixels) in enumerate(stages):
        width = 0.75 + 0.12 * number
        axes.add_patch(
            Rectangle((x - 0.48, 1.5 - side / 2), width, side, facecolor=(BLUE, GREEN)[number % 2], edgecolor=INK)
        )
        word(axes, x - 0.48 + width / 2, 2.75, name, weight="bold")
        word(axes, x - 0.48 + width / 2, 2.45, f"{blocks} blocks", size=10)
        word(axes, x - 0.48 + width / 2, 0.5, f"{pixels} x {pixels} x {channels}", size=10)
        word(axes, x - 0.48 + width / 2, 0.22, f"stride {224 // pixels}", size=9)
        line(axes, (x - 0.46 + width, 1.5), (x + width - 0.02, 1.5))
        x, side = x + width + 0.48, side * 0.72
    box(axes, x + 0.15, 1.5, "head", width=0.85, fill=ORANGE)
    line(axes, (x + 0.58, 1.5), (x + 0.85, 1.5))
    word(axes, x + 1.2, 1.5, "classes", size=10)
    return figure


def package() -> Figure:
    """The way from images to a deployed model."""
    figure, axes = canvas(10, 2.25)
    row = [
        ("images", GREY),
        ("data", BLUE),
        ("task", GREEN),
        ("engine", GREEN),
        ("run folder", ORANGE),
        ("export", BLUE),
    ]
    for number, (name, fill) in enumerate(row):
        x = 0.95 + 1.62 * number
        box(axes, x, 1.1, name, width=1.2, height=0.6, fill=fill)
        if number:
            line(axes, (x - 1.02, 1.1), (x - 0.61, 1.1))
    box(axes, 4.19, 1.9, "models", width=1.2, fill=BLUE)
    line(axes, (4.19, 1.66), (4.19, 1.41))
    box(axes, 2.55, 1.9, "ops: kernels", width=1.3, fill=BLUE)
    line(axes, (3.2, 1.9), (3.58, 1.9))
    box(axes, 5.81, 1.9, "recipe", width=1.2, fill=ORANGE)
    line(axes, (5.81, 1.66), (5.81, 1.41))
    for x, text in (
        (0.95, "folders, COCO,\nmasks, shards"),
        (2.57, "decode, keyed\naugmentation"),
        (4.19, "loss, metrics,\npredictions"),
        (5.81, "train, evaluate,\nresume"),
        (7.43, "weights, curves,\nmodel card"),
        (9.05, "ONNX, OpenVINO,\nruntime, hub"),
    ):
        word(axes, x, 0.35, text, size=10)
    return figure


def keys() -> Figure:
    """Random numbers in a row, and random numbers by key."""
    figure, axes = canvas(10, 2.9)
    word(
        axes,
        0.2,
        2.65,
        "One stream: what comes next depends on all that came before",
        size=12,
        weight="bold",
        ha="left",
    )
    for number in range(7):
        x = 1.0 + 1.35 * number
        box(axes, x, 2.1, f"draw {number + 1}", width=1.0, fill=GREY if number < 4 else RED)
        if number:
            line(axes, (x - 0.85, 2.1), (x - 0.51, 2.1))
    word(axes, 5.72, 1.68, "stopped here: the rest changes", size=10)
    word(axes, 0.2, 1.25, "Keys: every draw by itself", size=12, weight="bold", ha="left")
    for number, text in enumerate(
        ("epoch 3\norder", "epoch 3\nimage 17", "epoch 3\nimage 18", "step 912\nMixUp", "step 912\ndrop path")
    ):
        box(axes, 1.35 + 1.8 * number, 0.6, text, width=1.5, height=0.66, fill=GREEN)
    return figure


def fusing() -> Figure:
    """What is folded into what in a fused block."""
    figure, axes = canvas(10, 3.0)
    word(axes, 0.2, 2.75, "As trained", size=12, weight="bold", ha="left")
    names = ["norm", "linear W1, W2", "GELU", "depthwise", "A * V", "linear", "layer scale"]
    for number, name in enumerate(names):
        x = 0.85 + 1.38 * number
        box(axes, x, 2.2, name, width=1.2, fill=ORANGE if name in ("norm", "layer scale") else BLUE)
        if number:
            line(axes, (x - 0.78, 2.2), (x - 0.61, 2.2))
    word(axes, 0.2, 1.45, "Fused", size=12, weight="bold", ha="left")
    axes.add_patch(
        FancyBboxPatch(
            (0.2, 0.42), 9.6, 0.78, boxstyle="round,pad=0,rounding_size=0.08", facecolor=GREEN, edgecolor=INK
        )
    )
    for x, name in (
        (1.55, "centre and scale"),
        (3.6, "one product"),
        (5.65, "GELU, depthwise, A * V"),
        (8.2, "one product, added to X"),
    ):
        word(axes, x, 0.81, name)
    word(axes, 5.0, 0.2, "one operation for all blocks of a stage, band of rows by band of rows", size=10)
    return figure


def sheet(files: list[Path], name: str) -> None:
    """Images side by side."""
    images = [Image.open(file).convert("RGB") for file in files]
    whole = Image.new("RGB", (sum(image.width + 6 for image in images) - 6, images[0].height), "white")
    for number, image in enumerate(images):
        whole.paste(image, (number * (image.width + 6), 0))
    whole.save(IMAGES / name, quality=88)


def samples() -> None:
    """What `conv2former samples` draws."""
    with TemporaryDirectory() as place:
        for kind in ("classification", "segmentation", "detection"):
            write_samples(kind, Path(place) / kind, count=10)
        folder = Path(place)
        sheet(
            [next((folder / "classification/train" / name).iterdir()) for name in PARTS], "tutorial_classify_data.jpg"
        )
        pairs = [[f"images/{number:03d}.jpg", f"masks/{number:03d}.png"] for number in (0, 2)]
        sheet([folder / "segmentation" / file for pair in pairs for file in pair], "tutorial_segment_data.jpg")
        sheet(sorted((folder / "detection/train").iterdir())[:4], "tutorial_detect_data.jpg")


HIGHEST = 588  # pixels
# figure of a run -> file in docs/images, and its width there
FROM_RUNS = {
    "quickstart/learning_curves.png": ("quickstart_curves.png", 900),
    "quickstart/predictions.png": ("quickstart.png", 900),
    "parts/confusion_matrix.png": ("tutorial_classify_matrix.png", 480),
    "parts/predictions.png": ("tutorial_classify.png", 900),
    "cracks/learning_curves.png": ("tutorial_segment_curves.png", 900),
    "cracks/predictions.png": ("tutorial_segment.png", 900),
    "bench/predictions.png": ("tutorial_detect.png", 900),
    "../comparison.png": ("tutorial_compare.png", 900),
}


def from_runs(runs: Path) -> None:
    """The figures of the tutorials' runs, smaller and in fewer colours."""
    for source, (name, width) in FROM_RUNS.items():
        image = Image.open(runs / source).convert("RGB")
        if image.width > width:
            image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
        image = image.crop((0, 0, image.width, min(image.height, HIGHEST)))  # three rows of a tall sheet
        image.quantize(192).save(IMAGES / name, optimize=True)


def main() -> None:
    for draw in (block, network, package, keys, fusing):
        draw().savefig(IMAGES / f"{draw.__name__}.png", dpi=120)
    samples()
    if len(sys.argv) > 1:
        from_runs(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
