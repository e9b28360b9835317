"""Prediction on picture files: one JSON object per input, an annotated picture each if asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from timm.data import resolve_model_data_config
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from conv2former.checkpoints import load_pretrained
from conv2former.data.classification import Normalizer, eval_transform
from conv2former.data.images import BadImage, decode, find_images
from conv2former.errors import UserError
from conv2former.evaluate import pick_device
from conv2former.labels import class_names

ANNOTATED = ".predicted.png"
PICTURE_SIDE = 512  # longer side of an annotated picture; smaller ones are drawn up to it


class _Files(Dataset):
    def __init__(self, files: list[Path], transform: Any) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray | BadImage:
        try:
            return np.array(self.transform(decode(self.files[index])))
        except BadImage as error:
            return error


def predict(
    checkpoint: Path,
    inputs: list[Path],
    *,
    top_k: int = 5,
    batch_size: int = 16,
    workers: int = 0,
    device: str = "auto",
) -> Iterator[dict[str, Any]]:
    """One dictionary per input file, in order: ``file``, ``ok`` and ``top`` or ``error``.

    ``top`` is a list of ``label``, ``index``, ``probability``, most probable first.

    Args:
        checkpoint: Run folder, saved model folder, or its ``model.safetensors``.
        inputs: Picture files, and folders that are searched for them.
        top_k: Length of ``top``, at most.
        batch_size: Images per forward pass.
        workers: Processes that read images.
        device: 'auto', 'cpu', 'cuda', ...

    Raises:
        UserError: The checkpoint cannot be used, or there is no picture in the inputs.
    """
    place = pick_device(device)
    model = load_pretrained(checkpoint).eval().to(place)
    files = find_images(inputs)
    if not files:
        raise UserError(f"no images in {', '.join(map(str, inputs))}")
    if not model.num_classes:
        raise UserError(f"{checkpoint} has no classifier: give a model that was trained with classes")
    labels = class_names(model)
    config = resolve_model_data_config(model)
    dataset, normalizer = _Files(files, eval_transform(config)), Normalizer(config["mean"], config["std"]).to(place)
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=list)
    position = 0
    for samples in loader:
        pixels = [torch.from_numpy(sample) for sample in samples if not isinstance(sample, BadImage)]
        rows = iter(_probabilities(model, normalizer, pixels, place))
        for sample in samples:
            file = str(files[position])
            position += 1
            if isinstance(sample, BadImage):
                yield dict(file=file, ok=False, error=sample.reason)
                continue
            values, indices = next(rows).topk(min(top_k, len(labels)))
            pairs = zip(values.tolist(), indices.tolist(), strict=True)
            yield dict(
                file=file,
                ok=True,
                top=[dict(label=labels[index], index=index, probability=value) for value, index in pairs],
            )


@torch.inference_mode()
def _probabilities(model: torch.nn.Module, normalizer: Normalizer, pixels: list[Tensor], place: torch.device) -> Tensor:
    if not pixels:
        return torch.empty(0)
    images = normalizer(torch.stack(pixels).permute(0, 3, 1, 2).to(place))
    return model(images).float().softmax(dim=1).cpu()


def run_predict(checkpoint: Path, inputs: list[Path], *, out: Path | None = None, **options: Any) -> int:
    """Prints the predictions as JSON lines, draws them into ``out``; returns the exit status, 1 if a file failed."""
    total = failed = 0
    taken: set[str] = set()
    for row in predict(checkpoint, inputs, **options):
        total += 1
        failed += not row["ok"]
        print(json.dumps(row), flush=True)  # ASCII: file names may hold bytes that no encoding of a terminal has
        if out and row["ok"]:
            annotate(row, _make(out) / _free_name(Path(row["file"]).stem, taken))
    if failed:
        print(f"{failed} of {total} files could not be read", file=sys.stderr)
    return 1 if failed else 0


def _make(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the output folder {folder}: {error.strerror}") from None
    return folder


def _free_name(stem: str, taken: set[str]) -> str:
    # a suffix of its own, because ``out`` may be the folder of the inputs; a number, because two folders may hold files
    # of one name
    name, number = f"{stem}{ANNOTATED}", 2
    while name in taken:
        name, number = f"{stem}-{number}{ANNOTATED}", number + 1
    taken.add(name)
    return name


def annotate(row: dict[str, Any], path: Path) -> None:
    """Writes the picture with its top classes and bars of their probabilities below.

    Raises:
        UserError: The picture cannot be written.
    """
    picture = decode(row["file"])
    scale = PICTURE_SIDE / max(picture.size)
    filter_ = Image.Resampling.NEAREST if scale >= 4 else Image.Resampling.LANCZOS
    picture = picture.resize((max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)), filter_)
    line, font = 26, ImageFont.load_default(16)
    width = max(picture.width, 360)
    sheet = Image.new("RGB", (width, picture.height + line * len(row["top"]) + 8), "white")
    sheet.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(sheet)
    for i, entry in enumerate(row["top"]):
        top = picture.height + 6 + line * i
        draw.rectangle((0, top, max(round(width * entry["probability"]), 1), top + line - 6), fill="#bcd7f0")
        draw.text((8, top), f"{entry['label']}  {entry['probability']:.1%}", fill="black", font=font)
    try:
        sheet.save(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
