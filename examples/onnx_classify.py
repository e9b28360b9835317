"""Classes of images by an exported classifier: numpy, Pillow and ONNX Runtime alone.

python onnx_classify.py model.onnx IMAGES...
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

if len(sys.argv) < 3:
    sys.exit("usage: python onnx_classify.py model.onnx IMAGES...")
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = json.loads(session.get_modelmeta().custom_metadata_map.get("conv2former", "{}"))
if "labels" not in about or "crop_pct" not in about:
    sys.exit(f"{sys.argv[1]} is not a classifier from `conv2former export`")
side, resample = about["input_size"][1], Image.Resampling[about["interpolation"].upper()]


def prepare(path: str) -> np.ndarray:
    image = ImageOps.exif_transpose(Image.open(path))
    if image.has_transparency_data:
        raise ValueError("it is transparent: put it on white")
    if image.mode not in ("RGB", "L", "CMYK", "P", "1"):
        raise ValueError(f"its mode is {image.mode}: save it with 8 bits")
    image = image.convert("RGB")
    short = int(side / about["crop_pct"])
    width, height = (int(short * length / min(image.size)) for length in image.size)
    if about["crop_mode"] == "squash":
        width = height = short
    left, top = round((width - side) / 2), round((height - side) / 2)
    image = image.resize((width, height), resample).crop((left, top, left + side, top + side))
    pixels = (np.asarray(image, np.float32) / 255 - about["mean"]) / about["std"]
    return pixels.transpose(2, 0, 1).astype(np.float32)


failed = 0
for path in sys.argv[2:]:
    try:
        prepared = prepare(path)
    except Exception as error:  # Pillow has many for damaged files
        failed += 1
        print(f"{path}: cannot be read ({error})", file=sys.stderr)
        continue
    (logits,) = session.run(None, {"images": prepared[None]})
    powers = np.exp(logits[0] - logits[0].max())
    best = int(powers.argmax())
    print(f"{path}: {about['labels'][best]} {powers[best] / powers.sum():.4f}")
sys.exit(1 if failed else 0)
