"""Reading a checkpoint of any origin without running what is in it."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from conv2former.errors import UserError, some

StrPath = str | os.PathLike[str]

# What timm-style checkpoints hold beyond tensors, numbers and containers: the command line. A Namespace is attributes
# and nothing else. NumPy's constructors are left out on purpose: no known checkpoint needs them.
SAFE_GLOBALS: list[Any] = [argparse.Namespace]

EMA_KEYS = (
    *("state_dict_ema", "model_ema", "ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "ema_state"),
    *("ema_model_state_dict", "ema_params", "averaged_model", "swa_model", "swa_state_dict", "state_dict_swa"),
)
PLAIN_KEYS = ("state_dict", "model", "model_state_dict", "net")
# torch.compile, activation checkpointing, FSDP: also around parts of a network
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
MOST_OF_A_HEADER = 10**8  # bytes, of the JSON that a safetensors file begins with behind its length
# what a download may leave in the place of a file
FOREIGN = (
    (b"version https://git-lfs", "a pointer of Git LFS: fetch the file itself with `git lfs pull`"),
    (b"<!doctype", "a web page: download the file itself"),
    (b"<html", "a web page: download the file itself"),
    (b"\x1f\x8b", "compressed by gzip: unpack it first"),
)


def read_state_dict(path: StrPath, *, ema: bool = True) -> dict[str, Tensor]:
    """Reads the weights of a checkpoint without executing anything in it.

    The content says whether safetensors reads it or ``torch.load(weights_only=True)``. The state dict may be the top
    level or sit under one of ``EMA_KEYS`` or ``PLAIN_KEYS``, these also nested. What DistributedDataParallel and
    ``WRAPPERS`` add to names is removed; whatever is not a tensor (optimizer, arguments, epoch) is left out.

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
    state_dict = extract_weights(read_checkpoint(Path(path)), path, ema=ema)[0]
    check_types(state_dict, path)
    return state_dict


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
        with path.open("rb") as file:
            start = file.read(512)
        if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < MOST_OF_A_HEADER:
            return load_file(path)
        if start.startswith(b"PK") and (inside := _packed(path)):
            raise UserError(f"{path} is no checkpoint but a zip file (of {some(inside, 2)}): unpack it first")
        for known, what in FOREIGN:
            if start.lstrip().lower().startswith(known):
                raise UserError(f"{path} is no checkpoint but {what}")
        if start[257:262] == b"ustar":
            raise UserError(f"{path} is no checkpoint but a tar file: unpack it first")
        if path.suffix == ".safetensors" and start.startswith((b"PK", b"\x80")):  # whose name promises no pickle
            raise UserError(f"{path} is no safetensors file but PyTorch's: rename it to {path.stem}.pth")
        return load_file(path) if path.suffix == ".safetensors" else load_pickle(path)
    except UserError:
        raise
    except Exception as error:
        if "TorchScript" in str(error):
            raise UserError(f"{path} is a TorchScript program: save its state_dict() and give that") from None
        # a damaged file decides which error its bytes end in: KeyError, EOFError, struct.error
        raise UserError(
            f"{path} cannot be read as a checkpoint ({reason(error)}): it is damaged, cut short or something else; "
            "copy or download it again"
        ) from error


def _packed(path: Path) -> list[str]:
    """The names in a zip file that is not PyTorch's."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):  # a damaged one, which PyTorch's error is about
        return []
    return [] if any(name.endswith(("data.pkl", "constants.pkl")) for name in names) else names


def load_pickle(path: Path) -> Any:
    """``torch.load`` restricted to data: tensors, containers, and ``SAFE_GLOBALS`` besides."""
    with warnings.catch_warnings(), torch.serialization.safe_globals(SAFE_GLOBALS):
        warnings.simplefilter("ignore")  # remarks on the pickle's protocol; what matters becomes a UserError
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            refused = refused_globals(path, error)
            if not refused:
                raise
            raise UserError(
                f"{path} was refused and nothing in it was executed: its pickle asks for {some(refused, 3)}, which "
                "the safe reader does not take; where you trust the file, save its weights alone, as "
                "tensors, with torch.save(state_dict, FILE) and give that one"
            ) from error


def refused_globals(path: Path, error: pickle.UnpicklingError) -> list[str]:
    """Names of the classes and functions that made ``torch.load`` refuse a file; none where it is merely damaged."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not torch's zip format, or a pickle protocol that torch does not read
        return re.findall(r"GLOBAL (\S+)", str(error))[:1]


def extract_weights(checkpoint: Any, path: StrPath, *, ema: bool) -> tuple[dict[str, Tensor], bool]:
    """The state dict inside a checkpoint, and whether it is a moving average; see ``read_state_dict``."""
    averaged = False
    if isinstance(checkpoint, Mapping) and {"task", "optimizer", "position"} <= checkpoint.keys():
        raise UserError(f"{path} is what a training resumes from: give its run folder, or continue it with --resume")
    for _ in range(4):  # a bound, because a pickle can hold a dictionary that contains itself
        if not isinstance(checkpoint, Mapping):
            break
        inside = [key for key in EMA_KEYS + PLAIN_KEYS if _may_hold_weights(checkpoint.get(key))]
        if not inside and not any(_is_weight(value) for value in checkpoint.values()):
            # whatever it is called: the only dictionary that holds tensors, or dictionaries
            inside = [key for key, value in checkpoint.items() if _may_hold_weights(value)]
            inside = inside if len(inside) == 1 else []
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
        name = key
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        while name.startswith("module."):  # DistributedDataParallel
            name = name.removeprefix("module.")
        if name in state_dict:
            raise UserError(f"{path} holds {name} twice, with and without a wrapper's prefix: save one model alone")
        # sparse, quantized and meta tensors would fail later in a less clear way
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise UserError(f"{path} holds {name} in a form without plain values: save dense tensors")
        state_dict[name] = value.detach()
    return state_dict, averaged


def _may_hold_weights(value: Any) -> bool:
    inner = value.values() if isinstance(value, Mapping) else ()
    return any(_is_weight(one) or isinstance(one, Mapping) for one in inner)


def _is_weight(value: Any) -> bool:
    """Whether it is a tensor and no single number, such as a moving average's decay."""
    return isinstance(value, Tensor) and value.ndim > 0


def check_types(state_dict: Mapping[str, Tensor], path: StrPath) -> None:
    """Refuses weights that are not in floating point; counters, indices and masks are not weights. Raises UserError."""
    for name, tensor in state_dict.items():
        counts = not tensor.is_complex() and not name.endswith((".weight", ".bias", ".gamma"))
        if not tensor.is_floating_point() and not counts:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{path} holds {name} as {kind}: save the weights in floating point")


def check_finite(state_dict: Mapping[str, Tensor], path: StrPath) -> None:
    """Refuses weights that hold what is no number; raises UserError."""
    wrong = [name for name, tensor in state_dict.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if wrong:
        raise UserError(f"{path} holds values that are no numbers ({some(wrong, 3)}): take an earlier checkpoint")


def reason(error: Exception) -> str:
    """An error in a few words on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, pickle.UnpicklingError):  # torch's text advises to read the file unsafely
        return "not a pickle of tensors"
    sentence = re.split(r"\. |\n", str(error).strip())[0]
    return sentence[:160] or type(error).__name__
