"""Whole commands on photographs, against a plain script on timm that does the same.

    python benchmarks/end_to_end.py --data DIR [--count 1000] [--model conv2former_t] [--repeats 2] [--threads 2]

DIR holds photographs; they are taken several times where there are fewer than ``--count``, in five class folders. The
weights are random. Each row is a command as a user types it: start, reading, decoding, network, report. All take turns,
``--repeats`` times. The last rows share the images over one and over two processes, with one thread each. Use a machine
that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path

import timm
from timm.models import save_for_hf

import conv2former  # noqa: F401  registers the names

CLASSES = 5
# what somebody writes who has timm alone: predictions, or counts of right ones
SCRIPT = """
import sys
from pathlib import Path
import timm, torch
from PIL import Image
import conv2former
folder, images, task = sys.argv[1:]
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
classes = model.pretrained_cfg["label_names"]
files = sorted(path for path in Path(images).glob("*/*"))
right = 0
with torch.inference_mode():
    for start in range(0, len(files), 16):
        part = files[start : start + 16]
        batch = torch.stack([transform(Image.open(file).convert("RGB")) for file in part])
        scores, found = model(batch).softmax(dim=1).topk(5)
        if task == "predict":
            for file, score, index in zip(part, scores.tolist(), found.tolist()):
                print(file, score, index)
        right += sum(classes[index[0]] == file.parent.name for file, index in zip(part, found.tolist()))
print(right, "of", len(files))
"""


def prepared(data: Path, count: int, model: str, folder: Path) -> tuple[Path, Path]:
    """A saved model, and class folders of links."""
    files = sorted(path for path in data.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        sys.exit(f"no photographs in {data}")
    for number, file in zip(range(count), cycle(files), strict=False):
        place = folder / "images" / f"class-{number % CLASSES}" / f"{number:06d}{file.suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(file.resolve())
    names = [f"class-{number}" for number in range(CLASSES)]
    save_for_hf(timm.create_model(model, num_classes=CLASSES), folder / "model", model_config=dict(label_names=names))
    return folder / "model", folder / "images"


def seconds(words: list[str], threads: int) -> float:
    """Of a whole command."""
    environment = os.environ | dict(OMP_NUM_THREADS=str(threads))
    began = time.perf_counter()
    subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--model", default="conv2former_t")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, images = map(str, prepared(given.data, given.count, given.model, folder))
        one = str(next(Path(images).glob("*/*")))
        ours = [sys.executable, "-m", "conv2former_cli"]
        two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
        evaluate = ["evaluate", model, "--data", images, "--workers=0", "--out", str(folder / "report")]
        (folder / "script.py").write_text(SCRIPT)
        script = [sys.executable, str(folder / "script.py"), model]
        commands = {
            "predict": ([*ours, "predict", model, images], given.threads),
            "predict --no-fuse": ([*ours, "predict", model, images, "--no-fuse"], given.threads),
            "timm: predict": ([*script, images, "predict"], given.threads),
            "evaluate, with its report": ([*ours, *evaluate], given.threads),
            "timm: evaluate": ([*script, images, "evaluate"], given.threads),
            "predict, one image": ([*ours, "predict", model, one], given.threads),
            "timm: predict, one image": (
                [*script[:-1], model, str(folder / "one"), "predict"],
                given.threads,
            ),
            "predict --out-file, 1 process of 1 thread": ([*ours, "predict", model, images, "--out-file"], 1),
            "predict --out-file, 2 processes of 1 thread": (
                [*two, "conv2former_cli", "predict", model, images, "--out-file"],
                1,
            ),
        }
        (folder / "one" / "class-0").mkdir(parents=True)
        (folder / "one" / "class-0" / "a.jpg").symlink_to(Path(one).resolve())
        print(f"| command | seconds, {given.count:,} images |\n|---|---|")
        found: dict[str, list[float]] = {name: [] for name in commands}
        for repeat in range(given.repeats):
            for name, (words, threads) in commands.items():
                rows = [str(folder / f"{repeat}-{len(found[name])}-{threads}.{len(words)}.jsonl")]
                found[name].append(seconds(words + rows * (words[-1] == "--out-file"), threads))
        for name, times in found.items():
            print(f"| {name} | {', '.join(f'{value:.1f}' for value in times)} |")


if __name__ == "__main__":
    main()
