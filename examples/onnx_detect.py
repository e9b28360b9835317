"""Objects in photos by an exported detector: numpy, Pillow and onnxruntime alone.

python onnx_detect.py model.onnx PHOTOS...

It prints the objects of each photo, boxes in its pixels, and writes NAME.found.png beside it with the objects drawn.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps

LEAST = 0.3  # score from which something is shown

if len(sys.argv) < 3:
    sys.exit("usage: python onnx_detect.py model.onnx PHOTOS...")
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = json.loads(session.get_modelmeta().custom_metadata_map.get("conv2former", "{}"))
if about.get("task") != "detection":
    sys.exit(f"{sys.argv[1]} is not a detector from `conv2former export`")
outputs = [output.name for output in session.get_outputs()]
rows, columns = about["input_size"][1:]


def prepare(photo: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """The photo as large as it fits, normalised, at the top left of zeros; and its height and width there."""
    factor = min(columns / photo.width, rows / photo.height)
    width, height = (max(round(side * factor), 1) for side in photo.size)
    small = photo.resize((width, height), Image.Resampling[about["interpolation"].upper()])
    pixels = (np.asarray(small, np.float32) / 255 - about["mean"]) / about["std"]
    images = np.zeros((1, 3, rows, columns), np.float32)
    images[0, :, :height, :width] = pixels.transpose(2, 0, 1)
    return images, np.array([height, width])


def tinted(photo: Image.Image, mask: np.ndarray, box: list[int]) -> None:
    """Paints a mask, the probabilities at 28 x 28 positions of a box, over the photo."""
    left, top, right, bottom = box
    size = (max(right - left, 1), max(bottom - top, 1))
    inside = Image.fromarray((mask * 255).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    photo.paste((255, 120, 0), (left, top), inside.point(lambda value: 110 if value >= 128 else 0))


for path in sys.argv[2:]:
    photo = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    images, size = prepare(photo)
    found = dict(zip(outputs, session.run(None, {"images": images, "size": size}), strict=True))
    scale = np.array([photo.width / size[1], photo.height / size[0]] * 2)
    print(f"{path}:")
    for row in np.flatnonzero(found["scores"] >= LEAST):
        label, score = about["labels"][found["labels"][row]], found["scores"][row]
        box = [round(float(value), 1) for value in found["boxes"][row] * scale]
        print(f"  {label} {score:.4f} {box}")
        if "masks" in found:
            tinted(photo, found["masks"][row], [round(value) for value in box])
        ImageDraw.Draw(photo).rectangle(box, outline=(255, 120, 0), width=2)
        ImageDraw.Draw(photo).text((box[0] + 3, box[1] + 2), f"{label} {score:.0%}", fill=(255, 255, 255))
    photo.save(Path(path).with_suffix(".found.png"))
