"""How much memory it takes to find 100 objects on a large picture, and what bounds it.

    python benchmarks/detect_memory.py [--width 4000] [--height 3000] [--json FILE]

A detector of small widths and random weights, without a threshold, so that it finds 100 objects anywhere, sees a
picture of 320 x 240 and then the large one at that size. What the second takes beyond what the process has before it,
picture and network included, is due to the size of the picture: masks are pasted and become run lengths one by one.
Linux only: there a process can read its peak and let it begin anew.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_image

import conv2former  # noqa: F401  registers the names
from conv2former.recipes import load_recipe
from conv2former.tasks.detection.task import DetectionTask

MIB = 2**20
SETTINGS = ["data.short_side=240", "data.long_side=320", "detector.score_threshold=0.0", "model.name=conv2former_atto"]


def bound(pixels: int) -> int:
    """Bytes that pasting and encoding take at most, for a picture of so many pixels.

    The one mask that is in work fills the picture at most: as float32, as the comparison with the threshold, as the
    result, and as uint8 twice.
    """
    return (4 + 1 + 1 + 2) * pixels


def status(key: str) -> int:
    """Bytes by /proc: ``VmRSS`` now, ``VmHWM`` at the peak."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def measure(task: DetectionTask, image: Image.Image) -> tuple[int, int]:
    """Bytes at the peak beyond what was there before, and objects found."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    (found,) = task.predict([task.preprocess(image)])
    return status("VmHWM") - before, len(found.fields["objects"])


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4000)
    parser.add_argument("--height", type=int, default=3000)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    recipe = load_recipe("smoke_detection", overrides=SETTINGS)
    task = DetectionTask.build(recipe, ["a", "b", "c"]).eval()
    task.threshold = 0.0
    picture = Image.fromarray(load_sample_image("china.jpg"))
    small, large = (picture.resize(size) for size in ((320, 240), (options.width, options.height)))
    measure(task, small)  # what a first pass allocates for good
    row = dict(width=options.width, height=options.height, bound_bytes=bound(options.width * options.height))
    for name, image in (("small", small), ("large", large)):
        row[f"{name}_bytes"], row["objects"] = measure(task, image)
    print(
        f"{options.width} x {options.height}, {row['objects']} objects: {row['large_bytes'] / MIB:.0f} MiB more at the "
        f"peak, of which pasting may take {row['bound_bytes'] / MIB:.0f}; 320 x 240: {row['small_bytes'] / MIB:.0f} MiB"
    )
    if options.json:
        options.json.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
