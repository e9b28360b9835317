"""Classes of pictures by an exported model: numpy, Pillow and onnxruntime alone.

python onnx_classify.py model.onnx PICTURES...
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = json.loads(session.get_modelmeta().custom_metadata_map["conv2former"])
side, resample = about["input_size"][1], Image.Resampling[about["interpolation"].upper()]


def prepare(path: str) -> np.ndarray:
    picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    short = int(side / about["crop_pct"])
    width, height = (int(short * length / min(picture.size)) for length in picture.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    picture = picture.resize((width, height), resample).crop((left, top, left + side, top + side))
    pixels = (np.asarray(picture, np.float32) / 255 - about["mean"]) / about["std"]
    return pixels.transpose(2, 0, 1).astype(np.float32)


for path in sys.argv[2:]:
    (logits,) = session.run(None, {"images": prepare(path)[None]})
    shares = np.exp(logits[0] - logits[0].max())
    best = int(shares.argmax())
    print(f"{path}: {about['labels'][best]} {shares[best] / shares.sum():.4f}")
