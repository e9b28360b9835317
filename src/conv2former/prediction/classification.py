"""Classes of pictures, most probable first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from timm.data import resolve_model_data_config

from conv2former.checkpoints import load_pretrained
from conv2former.data.loading import Normalizer
from conv2former.engine.devices import pick_device
from conv2former.errors import UserError
from conv2former.prediction.common import Finding
from conv2former.tasks.classification.data import eval_transform
from conv2former.tasks.classification.names import class_names

PICTURE_SIDE = 512  # longer side of an annotated picture; smaller ones are drawn up to it


class Classifier:
    """A trained classifier that looks at pictures.

    A finding's ``top`` is a list of ``label``, ``index``, ``probability``, most probable first.

    Args:
        checkpoint: Run folder, saved model folder, or its ``model.safetensors``.
        top_k: Length of ``top``, at most.
        device: 'auto', 'cpu', 'cuda', ...

    Raises:
        UserError: The checkpoint cannot be used.
    """

    most_at_once = 1 << 20

    def __init__(self, checkpoint: Path, *, top_k: int = 5, device: str = "auto") -> None:
        self.place = pick_device(device)
        self.model = load_pretrained(checkpoint).eval().to(self.place)
        if not self.model.num_classes:
            raise UserError(f"{checkpoint} has no classifier: give a model that was trained with classes")
        self.labels = class_names(self.model)
        self.top_k = min(top_k, len(self.labels))
        config = resolve_model_data_config(self.model)
        self.transform = eval_transform(config)
        self.normalizer = Normalizer(config["mean"], config["std"]).to(self.place)

    def prepare(self, image: Image.Image) -> np.ndarray:
        """(H, W, 3) of the model's size."""
        return np.array(self.transform(image))

    @torch.inference_mode()
    def find(self, batch: Sequence[np.ndarray]) -> list[Finding]:
        """The top classes."""
        pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).to(self.place)
        probabilities = self.model(self.normalizer(pixels)).float().softmax(dim=1).cpu()
        found = []
        for row in probabilities:
            values, indices = row.topk(self.top_k)
            pairs = zip(values.tolist(), indices.tolist(), strict=True)
            top = [dict(label=self.labels[index], index=index, probability=value) for value, index in pairs]
            found.append(Finding(dict(top=top), partial(draw, top=top)))
        return found


def draw(picture: Image.Image, top: list[dict[str, Any]]) -> Image.Image:
    """The picture with its top classes and bars of their probabilities below."""
    scale = PICTURE_SIDE / max(picture.size)
    filter_ = Image.Resampling.NEAREST if scale >= 4 else Image.Resampling.LANCZOS
    picture = picture.resize((max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)), filter_)
    line, font = 26, ImageFont.load_default(16)
    width = max(picture.width, 360)
    sheet = Image.new("RGB", (width, picture.height + line * len(top) + 8), "white")
    sheet.paste(picture, ((width - picture.width) // 2, 0))
    canvas = ImageDraw.Draw(sheet)
    for i, entry in enumerate(top):
        above = picture.height + 6 + line * i
        canvas.rectangle((0, above, max(round(width * entry["probability"]), 1), above + line - 6), fill="#bcd7f0")
        canvas.text((8, above), f"{entry['label']}  {entry['probability']:.1%}", fill="black", font=font)
    return sheet
