"""Class activation maps over images: where in a stage's map the evidence for a class lies.

The methods are those of the library pytorch-grad-cam (the package ``grad-cam``). For a classifier the logit of the
class is explained. For a segmentation model it is the sum of the class's logits over the pixels that are found to be of
it (Vinogradova et al., "Towards Interpretable Semantic Segmentation via Gradient-weighted Class Activation Mapping",
arXiv:2002.11434); the model sees the image whole, whatever its recipe says of windows. A detector selects boxes by hard
decisions before it classifies them, which gradients do not pass. So only EigenCAM is drawn of its backbone's map. It
knows no class, and its sign is arbitrary like that of every principal component.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from conv2former.errors import UserError, one_line
from conv2former.models.isotropic import Conv2FormerIsotropic
from conv2former.tasks.backbone import feature_info
from conv2former.tasks.segmentation.palettes import class_colours
from conv2former.tools.explain.opening import Explained, open_explained
from conv2former.tools.explain.sheets import NotShown, each_image, over, sheet
from conv2former.tools.explain.subjects import stage_indices
from conv2former.viz.drawing import colour, tint

# our name -> the library's class: Selvaraju et al. 2017, Chattopadhay et al. 2018, Fu et al. 2020, Draelos and Carin
# 2020, Jiang et al. 2021, Muhammad and Yeasin 2020
METHODS = {
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMPlusPlus",
    "xgradcam": "XGradCAM",
    "hirescam": "HiResCAM",
    "layercam": "LayerCAM",
    "eigencam": "EigenCAM",
}
CLASSLESS = "eigencam"
MOST_POSITIONS = 10_000  # of a map for EigenCAM, whose decomposition takes their square in memory


def target_layer(model: Explained, stage: int | None) -> tuple[nn.Module, Any]:
    """The layer whose output is the map of a stage, and what turns that output into (1, C, h, w).

    In networks of tokens it is the first norm of the last block, as the library advises: what comes behind mixes no
    positions any more, so that the class token's gradient would miss them.

    Raises:
        UserError: There is no such stage, or the network gives no maps.
    """
    backbone = model.task.backbone
    indices, _ = stage_indices(model.name, backbone)
    if stage is not None and not 1 <= stage <= len(indices):
        raise UserError(f"{model.name} has no stage {stage}: use 1 to {len(indices)}")
    layer = backbone.get_submodule(feature_info(backbone)[indices[(stage or len(indices)) - 1]]["module"])
    if hasattr(backbone, "num_prefix_tokens"):
        layer = getattr(layer, "norm1", layer)
    channels_last = isinstance(backbone, Conv2FormerIsotropic) or getattr(backbone, "output_fmt", "NCHW") == "NHWC"

    def as_map(output: Tensor) -> Tensor:
        if output.ndim == 3:
            tokens = output[:, getattr(backbone, "num_prefix_tokens", 0) :]
            return tokens.transpose(1, 2).unflatten(2, backbone.patch_embed.grid_size)
        return output.permute(0, 3, 1, 2) if channels_last else output

    return layer, as_map


def library() -> Any:
    """pytorch-grad-cam; raises UserError where it is not installed."""
    try:
        return importlib.import_module("pytorch_grad_cam")
    except ImportError as error:
        raise UserError(
            f"class activation maps need the package grad-cam ({one_line(error)}): pip install grad-cam"
        ) from None


class ActivationMaps:
    """Class activation maps of a model.

    Args:
        model: Of any task.
        method: A key of ``METHODS``; None for 'gradcam', of a detector 'eigencam'.
        target: Name or number of a class; None for the one that the model finds: the most probable of a classifier,
            the largest of a segmentation model.
        stage: Whose map is taken, from 1; None for the last.

    Raises:
        UserError: A method, class or stage that the model does not have, or the library is missing.
    """

    def __init__(self, model: Explained, *, method: str | None, target: str | None, stage: int | None) -> None:
        if method is not None and method not in METHODS:
            raise UserError(f"--method {method!r} is unknown: use one of {', '.join(METHODS)}")
        scores = model.task.scores()
        if scores is None and method not in (None, CLASSLESS):
            raise UserError(
                f"--method {method} needs scores of classes with gradients, which a {model.task.name} model does not "
                f"have: use {CLASSLESS}"
            )
        self.model = model
        self.method = method or (CLASSLESS if scores is None else "gradcam")
        if self.method == CLASSLESS and target is not None:
            other = "" if scores is None else ", or take gradcam"
            raise UserError(f"{CLASSLESS} knows no classes: leave --class out{other}")
        self.target = None if target is None else model.class_index(target)
        self.layer, self.as_map = target_layer(model, stage)
        self.network: Any = model.task.trunk if scores is None else scores
        self.make = getattr(library(), METHODS[self.method])

    def compute(self, image: Image.Image) -> tuple[np.ndarray, np.ndarray, int | None, np.ndarray | None]:
        """The view (h, w, 3), its map (h, w) from 0 to 1, the class, and a segmentation model's mask (h, w).

        Raises:
            NotShown: A segmentation model finds no pixel of the class.
            UserError: A stage's map is too large for EigenCAM.
        """
        view = self.model.task.preprocess(image).pixels
        height, width = view.shape[:2]
        batch = self.model.task.inputs(view)
        index, mask = self._chosen(batch, (height, width))
        with self.make(self.network, [self.layer], reshape_transform=self.as_map) as method, torch.enable_grad():
            values = method(batch, [] if index is None else [lambda output: output[index]])[0]
        return view, np.clip(values[:height, :width], 0, 1), index, mask

    def _chosen(self, batch: Tensor, size: tuple[int, int]) -> tuple[int | None, np.ndarray | None]:
        """The class, and a segmentation model's mask; checks what can be checked before gradients are computed."""
        network, maps = self.network, []
        if hasattr(network, "mask"):
            network.size = size
        with torch.no_grad(), self.layer.register_forward_hook(lambda *call: maps.append(self.as_map(call[2]))):
            scores = network(batch)
        if self.method == CLASSLESS:
            positions = maps[-1][0, 0].numel() if maps else 0
            if positions > MOST_POSITIONS:
                raise UserError(
                    f"{CLASSLESS} takes maps of up to {MOST_POSITIONS:,} positions, not {positions:,}: give a later "
                    "--stage"
                )
            return None, None
        if not hasattr(network, "mask"):
            return (int(scores[0].argmax()) if self.target is None else self.target), None
        mask = network.mask.cpu().numpy()
        counts = np.bincount(mask.ravel(), minlength=len(self.model.task.classes))
        index = int(counts.argmax()) if self.target is None else self.target
        if not counts[index]:
            raise NotShown(f"no pixel of it is found to be {self.model.task.classes[index]!r}")
        return index, mask

    def sheet(self, image: Image.Image) -> tuple[dict[str, Any], Figure]:
        """Fields for the JSON line, and the image beside its map, of a segmentation model with the class between them.

        ``empty`` says that nothing in the map is evidence for the class.
        """
        view, values, index, mask = self.compute(image)
        name = None if index is None else self.model.task.classes[index]
        panels = [("image", view)]
        if mask is not None and index is not None:
            rgb = class_colours(self.model.task.classes)[index] or colour(index)
            tint(marked := view.copy(), mask == index, rgb)
            panels.append((f"found to be {name}", marked))
        empty = not values.any()
        title = (self.method if name is None else f"{self.method}: {name}") + (" (nothing)" if empty else "")
        panels.append((title, over(view, values)))
        return dict(method=self.method, label=name, index=index, empty=empty), sheet([("", panels)])


def run_cams(
    checkpoint: Path,
    inputs: Sequence[Path],
    *,
    out: Path,
    method: str | None = None,
    target: str | None = None,
    stage: int | None = None,
    device: str = "auto",
) -> int:
    """``conv2former explain cam``: a sheet ``NAME.cam.png`` for each image; returns the exit status.

    Raises:
        UserError: See ``ActivationMaps``; no images, or a folder that cannot be written.
    """
    maps = ActivationMaps(open_explained(checkpoint, device=device), method=method, target=target, stage=stage)
    return each_image(inputs, out, "cam", maps.sheet)
