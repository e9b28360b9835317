"""The authors' checkpoints to ours: names, shapes, and the folder that timm loads."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
from pydantic import ValidationError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import get_pretrained_cfg
from torch import Tensor

from conv2former.checkpoints.hub import check_replaceable, differences, expected_shapes, save_pretrained
from conv2former.checkpoints.reading import StrPath, check_finite, check_types, extract_weights, read_checkpoint
from conv2former.checkpoints.schema import Preprocessing, first_fault
from conv2former.errors import UserError, one_line, some
from conv2former.models import variants
from conv2former.models.meta import check_args

# The authors' modules and ours. {i}: stage, {j}: block, {n}: LayerNorm 0 or convolution 1 of a downsampling. The last
# column marks the 1x1 convolutions, (out, in, 1, 1) with them and (out, in) with us. The first match counts, so that
# the stem, their downsample_layers.0, comes before the downsamplings.
NAMES = [
    ("downsample_layers.0.0", "stem.conv1", False),
    ("downsample_layers.0.2", "stem.norm1", False),
    ("downsample_layers.0.3", "stem.conv2", False),
    ("downsample_layers.0.5", "stem.norm2", False),
    ("downsample_layers.0.6", "stem.conv3", False),
    ("downsample_layers.{i}.{n}", "stages.{i}.downsample.{n}", False),
    ("stages.{i}.{j}.attn.norm", "stages.{i}.blocks.{j}.norm1", False),
    ("stages.{i}.{j}.attn.att.0", "stages.{i}.blocks.{j}.mod.w1", True),
    ("stages.{i}.{j}.attn.att.2", "stages.{i}.blocks.{j}.mod.dwconv", False),
    ("stages.{i}.{j}.attn.v", "stages.{i}.blocks.{j}.mod.w2", True),
    ("stages.{i}.{j}.attn.proj", "stages.{i}.blocks.{j}.mod.proj", True),
    ("stages.{i}.{j}.layer_scale_1", "stages.{i}.blocks.{j}.ls1.gamma", False),
    ("stages.{i}.{j}.mlp.norm", "stages.{i}.blocks.{j}.norm2", False),
    ("stages.{i}.{j}.mlp.fc1", "stages.{i}.blocks.{j}.mlp.fc1", True),
    ("stages.{i}.{j}.mlp.pos", "stages.{i}.blocks.{j}.mlp.dwconv", False),
    ("stages.{i}.{j}.mlp.fc2", "stages.{i}.blocks.{j}.mlp.fc2", True),
    ("stages.{i}.{j}.layer_scale_2", "stages.{i}.blocks.{j}.ls2.gamma", False),
    ("head.0", "head.conv", True),
    ("head.2", "head.norm", False),
    ("pred", "head.fc", False),
]


def convert_authors_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names and shapes to ours; names that are not theirs, ours among them, stay as they are.

    Args:
        state_dict: As in the authors' checkpoints, 1x1 convolutions (out, in, 1, 1).

    Returns:
        The same tensors under the names of ``conv2former.Conv2Former``, linear layers (out, in).

    Raises:
        UserError: Two names stand for the same parameter.
    """
    table = []
    for theirs, ours, linear in NAMES:
        module = re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(theirs))
        table.append((re.compile(rf"{module}(?P<tail>(?:\.\w+)?)"), ours, linear))  # tail: '.weight' and the like
    renamed: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        for pattern, template, linear in table:
            if match := pattern.fullmatch(name):
                groups = match.groupdict()
                name = template.format(**groups) + groups["tail"]
                tensor = _to_linear(tensor) if linear and groups["tail"] == ".weight" else tensor
                break
        if name in renamed:
            raise UserError(f"the checkpoint holds {name} under two names: save one model alone")
        renamed[name] = tensor
    return renamed


def _to_linear(weight: Tensor) -> Tensor:
    """(out, in, 1, 1) -> (out, in); any other shape stays and is reported where it does not fit."""
    return weight.flatten(1) if weight.ndim == 4 and weight.shape[2:] == (1, 1) else weight


MEAN_STD = {
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "half": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
}


# the modulation's convolution in the first block, which every checkpoint of the network has: ours and theirs
ANCHORS = ("stages.0.blocks.0.mod.dwconv.weight", "stages.0.0.attn.att.2.weight")
# what profilers (thop) and AveragedModel leave among the weights
COUNTERS = (".total_ops", ".total_params", ".n_averaged")
HEAD = "head."
# arguments of a network that are taken from beside its weights; the kernel and the classes are read off the weights
TAKEN = (
    *("stem_stride", "act_layer", "output_stride", "global_pool"),  # without a trace in the weights
    *("dims", "depths", "mlp_ratio", "head_hidden_size", "ls_init_value"),
)
# what names say of a network that was changed, with the way back
CHANGED = (
    (r"\.lora_|\.base_layer\.", "it has adapters: merge them into the weights first"),
    (r"\.weight_orig$", "it is pruned: make that permanent first, with torch.nn.utils.prune.remove"),
    (r"stages\.\d+\.blocks\.\d+\.weights$", "it was fused: save it before fuse()"),
    (r"(^|\.)stages_\d\.", "it was made with features_only: save the whole model"),
    (r"_packed_params|\.zero_point$", "it is quantized: save it before"),
)


def _changed(names: Collection[str]) -> str | None:
    """What was done to a network, as its names show."""
    return next((way for pattern, way in CHANGED if any(re.search(pattern, name) for name in names)), None)


def network_prefixes(names: Collection[str]) -> list[str]:
    """What stands before the names of each Conv2Former among some names of weights."""
    return [name.removesuffix(anchor) for anchor in ANCHORS for name in names if f".{name}".endswith(f".{anchor}")]


def network_part(state_dict: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of the network alone, without the prefix that a program around it gave them (``model.``, ``net.``).

    Returns:
        The weights, and the names of those that belong to something else.

    Raises:
        UserError: There is no Conv2Former, or there are several.
    """
    prefixes = network_prefixes(state_dict)
    if not prefixes:
        if way := _changed(state_dict):
            raise UserError(f"{path} does not hold the weights of a plain Conv2Former: {way}")
        raise UserError(
            f"{path} is not a Conv2Former checkpoint: no name in it ends in {ANCHORS[0]} (ours) or {ANCHORS[1]} "
            f"(theirs), there are {some(list(state_dict), 3)}"
        )
    if len(prefixes) > 1:
        named = some([prefix or "no prefix" for prefix in prefixes])
        raise UserError(f"{path} holds {len(prefixes)} networks ({named}): save one model alone")
    prefix = prefixes[0]
    own = {name: tensor for name, tensor in state_dict.items() if not f".{name}".endswith(COUNTERS)}
    part = {name.removeprefix(prefix): tensor for name, tensor in own.items() if name.startswith(prefix)}
    return part, [name for name in own if not name.startswith(prefix)]


@dataclass(frozen=True)
class ConvertReport:
    """What ``convert`` did."""

    folder: Path  # that was written
    model: str  # registered name of the architecture
    kernel_size: int  # side of the modulation kernel, read off the checkpoint
    num_classes: int  # read off the checkpoint
    parameters: int  # how many
    normalisation: str  # 'imagenet', 'half' or 'of its arguments', as recorded
    ema: bool  # whether the weights are a moving average
    source: str  # name of the file converted
    sha256: str  # its hash
    notes: tuple[str, ...] = ()  # what the user should know besides

    def __str__(self) -> str:
        return "\n".join([self._line(), *self.notes])

    def _line(self) -> str:
        return (
            f"{self.folder}: {self.model}, kernel {self.kernel_size}, {self.num_classes} classes, "
            f"{self.parameters:,} parameters, {'averaged weights' if self.ema else 'weights'} of {self.source} "
            f"(sha256 {self.sha256}), normalisation {self.normalisation}"
        )


def convert(
    src: StrPath,
    dst: StrPath,
    *,
    model: str,
    mean_std: Literal["imagenet", "half"] | None = None,
    ema: bool = True,
    overwrite: bool = False,
) -> ConvertReport:
    """Turns a checkpoint with the authors' names, or with ours, into a folder in timm's hub layout.

    The kernel size and the number of classes come from the weights. What leaves no trace in them (the stride of the
    stem, the pooling, the images' size and normalisation) comes from the arguments that timm's train.py keeps beside
    them, else it is taken for the paper's; ``model``'s tag and ``mean_std`` come first. The result loads with
    ``timm.create_model("local-dir:DST", pretrained=True)`` and with ``load_pretrained``.

    Args:
        src: The checkpoint, see ``read_state_dict``.
        dst: The folder to write.
        model: A registered hierarchical Conv2Former; a tag sets the input size (``conv2former_b.untrained_384``).
        mean_std: Normalisation of the images to record, whatever the arguments say; None for theirs, else 'imagenet'.
            The authors' README says ImageNet's mean and deviation; the default of their old library was 0.5 and 0.5
            ('half'). Evaluate both where accuracy looks low.
        ema: Prefer the moving average of the weights.
        overwrite: Replace a model that is in ``dst`` already. A folder with anything else in it is never replaced.

    Raises:
        UserError: Unknown model, unreadable checkpoint, a checkpoint that does not fit the model, ``dst`` taken or not
            writable.
    """
    if mean_std and mean_std not in MEAN_STD:
        raise UserError(f"mean_std is {mean_std!r}: use 'imagenet' or 'half'")
    architecture = check_model_name(model)
    src, dst = Path(src), Path(dst)
    check_replaceable(dst, overwrite=overwrite)

    checkpoint = read_checkpoint(src)
    args, cfg = _said(checkpoint, src, architecture)
    asked = ("mean", "std") * bool(mean_std) + ("input_size",) * ("." in model)
    cfg = {key: value for key, value in cfg.items() if key not in asked}
    weights, averaged = extract_weights(checkpoint, src, ema=ema)
    weights, others = network_part(weights, src)
    check_types(weights, src)
    check_finite(weights, src)
    notes = [f"{len(others)} tensors beside the network are left out ({some(others, 3)})"] * bool(others)
    if beside := [f"{key} {value}" for key, value in (args | cfg).items()]:
        notes.append(f"from the arguments in {src.name}: {', '.join(beside)}")
    state_dict = convert_authors_state_dict(weights)
    kernel = state_dict[ANCHORS[0]]
    kernel_size = kernel.shape[-1] if kernel.ndim == 4 else 0
    if kernel_size % 2 == 0:
        raise UserError(
            f"{src} has modulation kernels of shape {tuple(kernel.shape)}: Conv2Former's are (C, 1, K, K), K odd"
        )
    classifier = state_dict.get("head.fc.bias")
    num_classes = 0 if classifier is None else classifier.numel()
    model_args: dict[str, Any] = args | dict(kernel_size=kernel_size, num_classes=num_classes)
    expected = _expected(model, model_args, src)
    network = timm.create_model(model, **model_args)
    headless = not any(name.startswith(HEAD) for name in state_dict)
    if headless:
        notes.append(
            "it has no head: what is in front of a classifier starts new; fine-tune it, or take it as a backbone"
        )
    own = {  # the counts of batches, which older programs leave out, are zero here
        name: tensor
        for name, tensor in network.state_dict().items()
        if name.endswith(".num_batches_tracked") or (headless and name.startswith(HEAD))
    }
    _check_fit(own | state_dict, expected, src, architecture, model_args)
    network.load_state_dict(own | state_dict)
    mean, std = MEAN_STD[mean_std or "imagenet"]
    with open(src, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    normalisation = "of its arguments" if {"mean", "std"} & cfg.keys() else mean_std or "imagenet"
    provenance: dict[str, Any] = dict(source=src.name, sha256=sha256, normalisation=normalisation, ema=averaged)
    save_pretrained(
        network,
        dst,
        model_args=args | dict(kernel_size=kernel_size),
        # nobody states a license for the authors' weights, so none is recorded
        pretrained_cfg=dict(mean=mean, std=std, license=None) | cfg,
        extra=dict(conv2former=provenance),
    )
    parameters = sum(parameter.numel() for parameter in network.parameters())
    found: dict[str, Any] = dict(folder=dst, model=architecture, parameters=parameters, notes=tuple(notes))
    return ConvertReport(**found, kernel_size=kernel_size, num_classes=num_classes, **provenance)


def _expected(model: str, model_args: dict[str, Any], path: Path) -> dict[str, Any]:
    """Names and shapes of the weights; raises UserError where a checkpoint's arguments are none of the network's."""
    try:
        return expected_shapes(model, **model_args)
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"no network has the arguments in {path.name}: {one_line(error)}") from None


def _check_fit(
    state_dict: dict[str, Tensor], expected: dict[str, Any], src: Path, architecture: str, model_args: dict[str, Any]
) -> None:
    """Raises UserError, with the network that they fit, where weights do not fit the one that was named."""
    if difference := differences(expected, state_dict):
        # the sizes differ in width or depth, so that one fits at most
        fits = next((n for n in family() if not differences(expected_shapes(n, **model_args), state_dict)), None)
        unknown = _changed(state_dict) or "it fits no registered size"
        advice = f"it fits {fits}: give that as model" if fits else unknown
        raise UserError(f"{src} does not fit {architecture}: {difference}; {advice}")


def _said(checkpoint: Any, path: Path, architecture: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What timm's train.py keeps beside weights: arguments of the network, and how its images are prepared.

    Raises:
        UserError: It is of another network, or of none.
    """
    if not isinstance(checkpoint, Mapping):
        return {}, {}
    options = checkpoint.get("args")
    given = dict(vars(options)) if isinstance(options, argparse.Namespace) else {}
    named = str(checkpoint.get("arch") or given.get("model") or architecture).partition(".")[0]
    if named.startswith("conv2former") and named != architecture and timm.is_model(named):
        way = f"give --model {named}" if named in family() else "convert takes the authors' networks alone"
        raise UserError(f"{path} says that it holds a {named}: {way}")
    own = given.get("model_kwargs")
    args = {key: value for key, value in (own if isinstance(own, dict) else {}).items() if key in TAKEN}
    if given.get("gp") not in (None, "avg"):
        args["global_pool"] = given["gp"]
    check_args(args, f"the arguments in {path}")
    cfg = {key: given[key] for key in ("input_size", "mean", "std", "crop_pct", "interpolation") if given.get(key)}
    if given.get("img_size") and "input_size" not in cfg:
        cfg["input_size"] = (3, given["img_size"], given["img_size"])
    if cfg.get("interpolation") == "random":  # of training alone
        del cfg["interpolation"]
    try:
        cfg = Preprocessing(**cfg).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise UserError(
            f"the arguments in {path} prepare no images: {first_fault(error)}: save the weights alone, without them"
        ) from None
    return args, {key: tuple(value) if isinstance(value, list) else value for key, value in cfg.items()}


def family() -> list[str]:
    """Registered names of the hierarchical network, the paper's sizes first; its ablations are not among them."""
    sizes = sorted(variants.SIZES) + sorted(variants.SMALL_SIZES)
    return [f"conv2former_{size}" for size in sizes]


def check_model_name(model: str) -> str:
    """The architecture that ``model`` names, tag taken off."""
    architecture, _, tag = model.partition(".")
    if architecture in family():
        try:
            get_pretrained_cfg(model)
        except RuntimeError as error:
            raise UserError(f"{architecture} has no variant {tag!r}: leave it out, or see timm's registry") from error
        return architecture
    if timm.is_model(architecture):
        raise UserError(f"{architecture} is not a network of the authors' checkpoints: use one of {some(family(), 5)}")
    nearest = difflib.get_close_matches(architecture, family(), n=1, cutoff=0)[0]
    raise UserError(f"there is no model {architecture!r}: the nearest name is {nearest}")
