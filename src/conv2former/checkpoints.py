"""Weights on disk: reading checkpoints safely, the authors' names and ours, folders in timm's hub layout.

Three kinds of files meet here. A training checkpoint (``.pth.tar``, ``.pth``) is a pickle that may hold anything; it is
read with ``weights_only=True`` and never executed. The authors' checkpoints name the parameters in their own way. What
this project writes is timm's hub layout: a folder with ``config.json`` and ``model.safetensors``, which
``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads and the Hugging Face hub takes as it is.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import hashlib
import json
import os
import pickle
import pickletools
import re
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import filter_pretrained_cfg, get_pretrained_cfg, save_for_hf
from timm.models._hub import load_model_config_from_path
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from conv2former import model as hierarchical
from conv2former.errors import UserError

__all__ = [
    "ConvertReport",
    "authors_state_dict",
    "convert",
    "convert_authors_state_dict",
    "load_pretrained",
    "read_state_dict",
    "save_pretrained",
]

StrPath = str | os.PathLike[str]

# Reading ----------------------------------------------------------------------

# What timm-style checkpoints hold beyond tensors, numbers and containers: the command line. A Namespace is attributes
# and nothing else. NumPy's constructors are left out on purpose: no known checkpoint needs them.
SAFE_GLOBALS: list[Any] = [argparse.Namespace]

EMA_KEYS = ("state_dict_ema", "model_ema")
PLAIN_KEYS = ("state_dict", "model")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile


def read_state_dict(path: StrPath, *, ema: bool = True) -> dict[str, Tensor]:
    """Reads the weights of a checkpoint without executing anything in it.

    ``.safetensors`` is read by safetensors, anything else by ``torch.load(weights_only=True)``. The state dict may be
    the top level or sit under ``state_dict_ema``, ``model_ema``, ``state_dict`` or ``model``, these also nested. The
    prefixes of DistributedDataParallel and torch.compile go; whatever is not a tensor (optimizer, arguments, epoch) is
    left out.

    Args:
        path: The file.
        ema: Take the moving average of the weights where the file has one; False takes the weights themselves. A file
            with a single set of weights under ``state_dict`` or at its top level reads the same either way.

    Returns:
        Names to tensors on the CPU, in the file's order.

    Raises:
        UserError: No such file, a folder, not a checkpoint, damaged, refused because reading it could run code, without
            weights, or (``ema=False``) with averaged weights only.
    """
    return extract_weights(read_checkpoint(Path(path)), path, ema=ema)[0]


def read_checkpoint(path: Path) -> Any:
    """What the file holds, tensors on the CPU; see ``read_state_dict``."""
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist: give the path of a checkpoint file")
    if os.path.isdir(path):
        unpacked = [*path.glob("data.pkl"), *path.glob("*/data.pkl")]
        advice = " (a .pth.tar is one file: do not unpack it)" if unpacked else ""
        raise UserError(f"{path} is a folder: give the checkpoint file itself{advice}")
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty (0 bytes): copy or download it again")
        if path.suffix == ".safetensors":
            return load_file(path)
        return load_pickle(path)
    except UserError:
        raise
    except Exception as error:  # a damaged file decides which error its bytes end in: KeyError, EOFError, struct.error
        raise UserError(
            f"{path} cannot be read as a checkpoint ({reason(error)}): it is damaged, cut short or something else; "
            "copy or download it again"
        ) from error


def load_pickle(path: Path) -> Any:
    """``torch.load`` restricted to data: tensors and containers, then once more with ``SAFE_GLOBALS`` besides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on the pickle's protocol; what matters becomes a UserError
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            pass
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                refused = refused_globals(path, error)
                if not refused:
                    raise
                raise UserError(
                    f"{path} was refused and nothing in it was executed: its pickle asks for {some(refused)}, which "
                    "the safe reader does not take; where you trust the file, save its weights alone with "
                    "torch.save(state_dict, FILE) and give that one"
                ) from error


def refused_globals(path: Path, error: pickle.UnpicklingError) -> list[str]:
    """Names of the classes and functions that made ``torch.load`` refuse a file; none where it is merely damaged."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not torch's zip format, or a pickle protocol that torch does not read
        named = re.search(r"GLOBAL (\S+)", str(error))
        return [named[1]] if named else pickle_globals(path)


def pickle_globals(path: Path) -> list[str]:
    """Names of everything that a pickle would import, read off its bytes; nothing is imported or run."""
    names: set[str] = set()
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                record = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                with archive.open(record) as file:
                    collect_globals(file, names)
        else:
            with open(path, "rb") as file:
                collect_globals(file, names)
    except Exception:  # bytes that are no pickle: what was found before them counts
        pass
    # a list is cut after a few, and the harmless ones that every checkpoint has are not why it was refused
    return sorted(names, key=lambda name: (name.startswith(("torch.", "collections.")), name))


def collect_globals(file: IO[bytes], names: set[str]) -> None:
    """Adds the globals of one pickle to ``names``. Protocol 4 takes module and name from the last two strings."""
    strings = [""]
    memo: dict[int, str] = {}
    arg: Any
    for opcode, arg, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            names.add(arg.replace(" ", "."))
        elif opcode.name == "STACK_GLOBAL":
            names.add(".".join(strings[-2:]))
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = strings[-1]
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[arg] = strings[-1]
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            strings.append(memo.get(arg, ""))
        elif isinstance(arg, str):
            strings.append(arg)


def extract_weights(checkpoint: Any, path: StrPath, *, ema: bool) -> tuple[dict[str, Tensor], bool]:
    """The state dict inside a checkpoint, and whether it is a moving average; see ``read_state_dict``."""
    averaged = False
    for _ in range(4):  # a bound, because a pickle can hold a dictionary that contains itself
        if not isinstance(checkpoint, Mapping):
            break
        inside = [key for key in EMA_KEYS + PLAIN_KEYS if isinstance(checkpoint.get(key), Mapping) and checkpoint[key]]
        if not inside:
            break
        if not ema and inside[0] in EMA_KEYS:
            inside = [key for key in inside if key in PLAIN_KEYS]
            if not inside:
                raise UserError(
                    f"{path} holds only moving averages of the weights: take those, without ema=False (--no-ema)"
                )
        averaged = averaged or inside[0] in EMA_KEYS
        checkpoint = checkpoint[inside[0]]

    if not isinstance(checkpoint, Mapping):
        raise UserError(f"{path} holds a {type(checkpoint).__name__} and not a state dict: give a model's checkpoint")
    tensors = {key: value for key, value in checkpoint.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        keys = some([str(key) for key in checkpoint]) or "nothing"
        raise UserError(f"{path} holds no weights, only {keys}: give a model's checkpoint")
    state_dict: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = strip_wrappers(key)
        if name in state_dict:
            raise UserError(f"{path} holds {name} twice, with and without a wrapper's prefix: save one model alone")
        # sparse, quantized and meta tensors would fail later in a less clear way
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise UserError(f"{path} holds {name} in a form without plain values: save dense tensors")
        state_dict[name] = value.detach()
    return state_dict, averaged


def strip_wrappers(name: str) -> str:
    """A parameter's name without the prefixes that wrappers put before it."""
    while name.startswith(WRAPPER_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def reason(error: Exception) -> str:
    """An error in a few words on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, pickle.UnpicklingError):  # torch's text advises to read the file unsafely
        return "not a pickle of tensors"
    sentence = re.split(r"\. |\n", str(error).strip())[0]
    return sentence[:160] or type(error).__name__


def some(items: list[str], limit: int = 3) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


# Names ------------------------------------------------------------------------

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
    return rename(state_dict, [(compile_template(theirs), ours, linear) for theirs, ours, linear in NAMES], to_linear)


def authors_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``convert_authors_state_dict``: the hierarchical network's names to the authors'."""
    return rename(state_dict, [(compile_template(ours), theirs, linear) for theirs, ours, linear in NAMES], to_conv)


def compile_template(template: str) -> re.Pattern[str]:
    """A pattern for the names under a module of the table; group ``tail`` is '.weight' and the like, or empty."""
    pattern = re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(template))
    return re.compile(rf"{pattern}(?P<tail>(?:\.\w+)?)")


def rename(
    state_dict: Mapping[str, Tensor], table: list[tuple[re.Pattern[str], str, bool]], reshape: Any
) -> dict[str, Tensor]:
    """Every tensor under its new name, weights of the marked rows reshaped."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        for pattern, template, linear in table:
            if match := pattern.fullmatch(name):
                groups = match.groupdict()
                name = template.format(**groups) + groups["tail"]
                tensor = reshape(tensor) if linear and groups["tail"] == ".weight" else tensor
                break
        if name in renamed:
            raise UserError(f"the checkpoint holds {name} under two names: save one model alone")
        renamed[name] = tensor
    return renamed


def to_linear(weight: Tensor) -> Tensor:
    """(out, in, 1, 1) -> (out, in); any other shape stays and is reported where it does not fit."""
    return weight.flatten(1) if weight.ndim == 4 and weight.shape[2:] == (1, 1) else weight


def to_conv(weight: Tensor) -> Tensor:
    """(out, in) -> (out, in, 1, 1)."""
    return weight[:, :, None, None] if weight.ndim == 2 else weight


# Fit --------------------------------------------------------------------------


class SkipFilling(TorchFunctionMode):
    """Leaves out the arithmetic of initialisation, most of the time that a model on the meta device takes to build."""

    FILLING = frozenset({"add_", "clamp_", "erfinv_", "fill_", "mul_", "normal_", "uniform_", "zero_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The tensor as it is for a method that fills it, the function's result otherwise."""
        filling = args and getattr(func, "__name__", "") in self.FILLING
        return args[0] if filling else func(*args, **(kwargs or {}))


def expected_shapes(name: str, pretrained_cfg: dict[str, Any] | None = None, **model_args: Any) -> dict[str, Any]:
    """Names and shapes of the state dict of a timm model."""
    try:
        with torch.device("meta"), SkipFilling():
            model = timm.create_model(name, pretrained_cfg=pretrained_cfg, **model_args)
    except (NotImplementedError, RuntimeError):  # models outside this package that look at values while they are built
        model = timm.create_model(name, pretrained_cfg=pretrained_cfg, **model_args)
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


def differences(expected: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> str:
    """The first names that a model and a state dict do not share, on one line; empty where they fit."""
    missing = [name for name in expected if name not in state_dict]
    unexpected = [name for name in state_dict if name not in expected]
    shapes = [
        f"{name} is {tuple(state_dict[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in state_dict and state_dict[name].shape != shape
    ]
    parts = [f"missing {some(missing)}"] * bool(missing)
    parts += [f"unexpected {some(unexpected)}"] * bool(unexpected)
    parts += [some(shapes)] * bool(shapes)
    return "; ".join(parts)


# Converting -------------------------------------------------------------------

MEAN_STD = {
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "half": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
}


@dataclass(frozen=True)
class ConvertReport:
    """What ``convert`` did.

    Attributes:
        folder: The folder written.
        model: Registered name of the architecture.
        kernel_size: Side of the modulation kernel, read off the checkpoint.
        num_classes: Classes, read off the checkpoint.
        parameters: Number of parameters.
        normalisation: 'imagenet' or 'half', as recorded.
        ema: Whether the weights are a moving average.
        source: Name of the file converted.
        sha256: Its hash.
    """

    folder: Path
    model: str
    kernel_size: int
    num_classes: int
    parameters: int
    normalisation: str
    ema: bool
    source: str
    sha256: str

    def __str__(self) -> str:
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
    mean_std: Literal["imagenet", "half"] = "imagenet",
    ema: bool = True,
    overwrite: bool = False,
) -> ConvertReport:
    """Turns a checkpoint with the authors' names, or with ours, into a folder in timm's hub layout.

    The kernel size and the number of classes come from the checkpoint; the stride of the stem, which leaves no trace in
    the weights, is taken for the paper's. The result loads with ``timm.create_model("local-dir:DST", pretrained=True)``
    and with ``load_pretrained``.

    Args:
        src: The checkpoint, see ``read_state_dict``.
        dst: The folder to write.
        model: A registered hierarchical Conv2Former; a tag sets the input size (``conv2former_b.untrained_384``).
        mean_std: Normalisation of the images to record. The authors' README says ImageNet's mean and deviation;
            the default of their old library was 0.5 and 0.5 ('half'). Evaluate both where accuracy looks low.
        ema: Prefer the moving average of the weights.
        overwrite: Replace a model that is in ``dst`` already. A folder with anything else in it is never replaced.

    Raises:
        UserError: Unknown model, unreadable checkpoint, a checkpoint that does not fit the model, ``dst`` taken or not
            writable.
    """
    if mean_std not in MEAN_STD:
        raise UserError(f"mean_std is {mean_std!r}: use 'imagenet' or 'half'")
    architecture = check_model_name(model)
    src, dst = Path(src), Path(dst)
    check_replaceable(dst, overwrite=overwrite)

    weights, averaged = extract_weights(read_checkpoint(src), src, ema=ema)
    state_dict = convert_authors_state_dict(weights)
    kernel = state_dict.get("stages.0.blocks.0.mod.dwconv.weight")
    if kernel is None or kernel.ndim != 4:
        raise UserError(
            f"{src} is not a Conv2Former checkpoint: it has no depthwise convolution (theirs: stages.0.0.attn.att.2, "
            f"ours: stages.0.blocks.0.mod.dwconv) but {some(list(weights))}"
        )
    kernel_size = kernel.shape[-1]
    if kernel_size % 2 == 0:
        raise UserError(f"{src} has modulation kernels of side {kernel_size}: Conv2Former's are odd")
    classifier = state_dict.get("head.fc.bias")
    num_classes = 0 if classifier is None else classifier.numel()

    model_args: dict[str, Any] = dict(kernel_size=kernel_size, num_classes=num_classes)
    if difference := differences(expected_shapes(model, **model_args), state_dict):
        fitting = [
            name for name in family() if not differences(expected_shapes(name, **model_args), state_dict)
        ]  # the sizes differ in width or depth, so that one fits at most
        advice = f"it fits {fitting[0]}: give that as model" if fitting else "it fits no registered size"
        raise UserError(f"{src} does not fit {architecture}: {difference}; {advice}")

    mean, std = MEAN_STD[mean_std]
    network = timm.create_model(model, **model_args)
    network.load_state_dict(state_dict)
    with open(src, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    provenance = dict(source=src.name, sha256=sha256, normalisation=mean_std, ema=averaged)
    save_pretrained(
        network,
        dst,
        model_args=dict(kernel_size=kernel_size),
        # nobody states a license for the authors' weights, so none is recorded
        pretrained_cfg=dict(mean=mean, std=std, license=None),
        extra=dict(conv2former=provenance),
    )
    return ConvertReport(
        folder=dst,
        model=architecture,
        kernel_size=kernel_size,
        num_classes=num_classes,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        normalisation=mean_std,
        ema=averaged,
        source=src.name,
        sha256=sha256,
    )


def family() -> list[str]:
    """Registered names of the hierarchical network, the paper's sizes first; its ablations are not among them."""
    names = [
        name
        for name in timm.list_models("conv2former*")
        if timm.model_entrypoint(name).__module__ == hierarchical.__name__
    ]
    return sorted(names, key=lambda name: name.removeprefix("conv2former_") not in hierarchical.SIZES)


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


# Folders ----------------------------------------------------------------------

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # timm's names, in its order of preference
RUN_FOLDERS = ("best", "last")


def save_pretrained(
    model: nn.Module,
    folder: StrPath,
    *,
    label_names: list[str] | None = None,
    model_args: dict[str, Any] | None = None,
    pretrained_cfg: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Writes a timm model in hub layout, whole or not at all; a model that is in ``folder`` already is replaced.

    The files are written to a hidden folder beside ``folder``, which is renamed when complete. Whoever is killed on the
    way leaves the old model in place (between two renames: beside it, as ``.NAME.PID.old``).

    Args:
        model: A model built by timm, without wrappers such as DistributedDataParallel. It is not changed.
        folder: Where to; parents are made.
        label_names: Names of the classes, in order.
        model_args: Arguments of ``timm.create_model`` that the architecture's name does not imply, such as
            ``kernel_size``. Newer timm records those that the model was built with by itself, older does not.
        pretrained_cfg: Changes to the preprocessing and the rest of timm's ``pretrained_cfg``; None takes an entry out.
        extra: Further top-level entries of ``config.json``.

    Returns:
        The folder.

    Raises:
        UserError: ``folder`` is a file, holds something else than a model, or cannot be written.
        ValueError: Another number of ``label_names`` than the model has classes.
    """
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(f"{len(label_names)} label names for {model.num_classes} classes: give one for each")
    folder = Path(folder)
    check_replaceable(folder, overwrite=True)
    folder = folder.resolve()

    # save_for_hf takes the weights and the configuration from the model: a shallow copy gets what shall be written
    export: Any = copy.copy(model)
    export.pretrained_cfg = exported_cfg(model, pretrained_cfg or {})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    export.state_dict = lambda: tensors
    model_config = dict(extra or {}) | ({"label_names": list(label_names)} if label_names else {})

    new = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(new, ignore_errors=True)
        try:
            save_for_hf(export, str(new), model_config=model_config, model_args=model_args, safe_serialization=True)
            swap(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be written ({reason(error)}): give a folder on a disk with room") from error
    return folder


def exported_cfg(model: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """The model's ``pretrained_cfg`` as it describes the weights of now: without their source, tag and old labels."""
    cfg = dict(model.pretrained_cfg)
    dropped = {"state_dict", "tag"}
    if cfg.get("num_classes") != model.num_classes:
        dropped |= {"label_names", "label_descriptions", "label_offset"}
    cfg = (
        {key: value for key, value in cfg.items() if key not in dropped} | changes | {"num_classes": model.num_classes}
    )
    return filter_pretrained_cfg(cfg, remove_source=True)


def check_replaceable(folder: Path, *, overwrite: bool) -> None:
    """Refuses a target that is a file, a model unless ``overwrite``, or a folder with anything that is not ours."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: give a folder")
    try:
        files = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({reason(error)}): give another folder") from error
    foreign = [name for name in files if name not in (CONFIG_FILE, WEIGHT_FILES[0])]
    if foreign:
        raise UserError(f"{folder} holds {some(foreign)} and is not replaced: give a new folder")
    if files and not overwrite:
        raise UserError(f"{folder} holds a model already: give a new folder, or overwrite it")


def swap(new: Path, folder: Path) -> None:
    """Puts a complete folder in the place of ``folder``, which comes back where that fails."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if not folder.exists():
        new.rename(folder)
        return
    folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def load_pretrained(path: StrPath, **model_args: Any) -> nn.Module:
    """Builds the model of a folder in timm's hub layout, with its weights, in evaluation mode, on the CPU.

    As ``timm.create_model("local-dir:PATH", pretrained=True, **model_args)``, but the weights go through
    ``read_state_dict``, because timm before 1.0.26 executes the pickles that it finds in such a folder, and they are
    held against the folder's configuration first, because timm lets missing weights pass when ``num_classes`` changes.

    Args:
        path: The folder, its weights file, or a training run's folder, of which ``best/`` is taken, else ``last/``.
        **model_args: For ``timm.create_model``: ``num_classes``, ``in_chans``, ``features_only``, ``drop_path_rate``.

    Raises:
        UserError: No such path, not such a folder, a checkpoint that has to be converted, a damaged file, an
            architecture that timm does not know, weights that do not fit.
    """
    folder, weights = find_model(Path(path))
    cfg, architecture, saved_args = read_config(folder)
    state_dict = read_state_dict(weights)
    try:
        expected = expected_shapes(architecture, cfg, **saved_args)
    except Exception as error:  # nothing but the file's own values goes in
        raise UserError(
            f"{folder / CONFIG_FILE} does not describe a model that timm can build ({reason(error)}): "
            "mend it, or save the model again"
        ) from error
    if difference := differences(expected, state_dict):
        raise UserError(f"{weights} does not fit {CONFIG_FILE} beside it ({architecture}): {difference}")

    cfg = cfg | {"state_dict": state_dict}
    model = timm.create_model(architecture, pretrained=True, pretrained_cfg=cfg, **(saved_args | model_args))
    for module in model.modules():  # timm keeps a copy of the weights in every pretrained_cfg
        getattr(module, "pretrained_cfg", {}).pop("state_dict", None)
    return model.eval()


def find_model(path: Path) -> tuple[Path, Path]:
    """The folder with ``config.json`` that ``path`` means, and its weights file."""
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist: give a folder with {CONFIG_FILE} and {WEIGHT_FILES[0]}")
    if not path.is_dir():
        if path.name in WEIGHT_FILES and (path.parent / CONFIG_FILE).is_file():
            return path.parent, path
        raise UserError(
            f"{path} is a bare file without a {CONFIG_FILE} that says which model it is: turn a checkpoint into a "
            f"folder first, `conv2former convert {path} DST --model NAME`, and give DST"
        )
    for folder in (path, *(path / name for name in RUN_FOLDERS)):
        if (folder / CONFIG_FILE).is_file():
            for name in WEIGHT_FILES:
                if (folder / name).is_file():
                    return folder, folder / name
            raise UserError(f"{folder} has {CONFIG_FILE} but no {WEIGHT_FILES[0]}: copy the weights as well")
    raise UserError(
        f"{path} has no {CONFIG_FILE}: give a folder with {CONFIG_FILE} and {WEIGHT_FILES[0]}, or a run's folder with "
        "best/ or last/ in it"
    )


def read_config(folder: Path) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """``pretrained_cfg``, architecture and ``model_args`` of a ``config.json``, as timm reads them."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: neither UTF-8 nor JSON
        raise UserError(f"{path} is not JSON ({reason(error)}): copy it again, or save the model again") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise UserError(f"{path} names no architecture: expected the configuration that timm writes for a model")
    for key in ("pretrained_cfg", "model_args"):
        if not isinstance(config.get(key, {}), dict):
            raise UserError(f"{path} has a {key} that is no JSON object: expected what timm writes for a model")
    architecture = config["architecture"]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models("conv2former*"), n=1)
        advice = f"the nearest name is {near[0]}" if near else "import the package that registers it, or update timm"
        raise UserError(f"{path} names the architecture {architecture!r}, which timm does not know: {advice}")
    cfg, architecture, model_args = load_model_config_from_path(folder)
    return cfg | {"source": ""}, architecture, model_args  # the weights are handed over, not read from the folder
