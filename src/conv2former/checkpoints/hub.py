"""Folders in timm's hub layout: written whole or not at all, read with a check that the weights fit."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shlex
import shutil
import socket
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from timm.models import filter_pretrained_cfg, save_for_hf
from timm.models._hub import _parse_model_cfg
from torch import Tensor, nn

from conv2former.checkpoints.reading import StrPath, read_state_dict, reason
from conv2former.checkpoints.schema import Preprocessing, SavedModel, first_fault
from conv2former.errors import UserError, nearest, one_line, printable, resume_command, some
from conv2former.files import flush, parse_json, read_within, remedy
from conv2former.models.meta import build_on_meta

CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # timm's names, in its order of preference
FROM_FOLDER = f"a run, or a folder with {CONFIG_FILE} and {WEIGHT_FILES[0]}"
HUB = re.compile(r"hf[-_]hub:/*(.*)")
RUN_FOLDERS = ("best", "last")


class MissingWeights(UserError):
    """A path at which there is nothing."""


def save_pretrained(
    model: nn.Module,
    folder: StrPath,
    *,
    label_names: list[str] | None = None,
    model_args: dict[str, Any] | None = None,
    pretrained_cfg: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes a timm model in hub layout, whole or not at all; a model that is in ``folder`` already is replaced.

    The files are written to a hidden folder beside ``folder``, which is renamed when complete. If the process is killed
    before, the old model stays (between two renames: beside it, as ``.NAME.PID.old``).

    Args:
        model: A model built by timm, without wrappers such as DistributedDataParallel. It is not changed.
        folder: Where to; parents are made.
        label_names: Names of the classes, in order.
        model_args: Arguments of ``timm.create_model`` that the architecture's name does not imply, such as
            ``kernel_size``. Newer timm records those that the model was built with by itself, older does not.
        pretrained_cfg: Changes to the preprocessing and the rest of timm's ``pretrained_cfg``; None takes an entry out.
        extra: Further top-level entries of ``config.json``.
        state_dict: The weights; None for the model's own.

    Returns:
        The folder.

    Raises:
        UserError: The model is fused, or ``folder`` is a file, holds something else than a model, or cannot be written.
        ValueError: Another number of ``label_names`` than the model has classes.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    if not hasattr(model, "num_classes"):
        raise UserError(
            f"a {type(model).__name__} is no model of timm's (features_only makes parts): save the whole model"
        )
    if getattr(getattr(model, "head", None), "fused", False):
        raise UserError("a fused network has other weights than timm builds it with: save it before fuse()")
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(f"{len(label_names)} label names for {model.num_classes} classes: give one for each")
    folder = Path(folder)
    check_replaceable(folder, overwrite=True)
    folder = folder.resolve()

    # save_for_hf takes the weights and the configuration from the model: a shallow copy gets what shall be written
    export: Any = copy.copy(model)
    # the preprocessing is saved with the weights; where earlier weights came from, their tag and labels are not
    dropped = {"state_dict", "tag"}
    if export.pretrained_cfg.get("num_classes") != model.num_classes:
        dropped |= {"label_names", "label_descriptions", "label_offset"}
    cfg = {key: value for key, value in export.pretrained_cfg.items() if key not in dropped}
    cfg |= (pretrained_cfg or {}) | {"num_classes": model.num_classes}
    export.pretrained_cfg = filter_pretrained_cfg(cfg, remove_source=True)
    weights = model.state_dict() if state_dict is None else state_dict
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    export.state_dict = lambda: tensors
    model_config = dict(extra or {}) | ({"label_names": list(label_names)} if label_names else {})

    with written_whole(folder) as new:
        save_for_hf(export, str(new), model_config=model_config, model_args=model_args, safe_serialization=True)
        leave_out_what_is_known(new / CONFIG_FILE)
    return folder


def leave_out_what_is_known(path: Path) -> None:
    """Takes the number of classes and the default pooling out of a ``config.json``'s ``model_args``.

    timm finds the number of classes in the entry of its own. transformers passes it on from there, and fails where
    ``model_args`` has it too.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    known = {"num_classes": config["num_classes"], "global_pool": "avg"}
    args = config.pop("model_args", {})
    if args := {key: value for key, value in args.items() if key not in known or known[key] != value}:
        config["model_args"] = args
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Gives a hidden folder to write to; it replaces ``folder`` when the body has ended well. Raises UserError."""
    new = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(new, ignore_errors=True)
        try:
            yield new
            usual = (new / CONFIG_FILE).stat().st_mode
            for path in new.iterdir():  # safetensors makes files that nobody else may read
                path.chmod(usual)
            for path in (*new.iterdir(), new):  # a power cut must not leave torn weights in the place of whole ones
                flush(path)
            old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            if replaces := folder.exists():
                folder.rename(old)
            try:
                new.rename(folder)
            except OSError:
                if replaces:
                    old.rename(folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder} cannot be written ({reason(error)}): {remedy(error)}, or give another folder"
        ) from error


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
    foreign = [name for name in files if name not in (CONFIG_FILE, WEIGHT_FILES[0], CARD_FILE)]
    if foreign:
        raise UserError(f"{folder} holds {some(foreign, 3)} and is not replaced: give a new folder")
    if files and not overwrite:
        raise UserError(f"{folder} holds a model already: give a new folder, or overwrite it")


def load_pretrained(path: StrPath, **model_args: Any) -> nn.Module:
    """Builds the model of a folder in timm's hub layout, with its weights, in evaluation mode, on the CPU.

    As ``timm.create_model("local-dir:PATH", pretrained=True, **model_args)``, but the weights go through
    ``read_state_dict``, because timm before 1.0.26 executes the pickles that it finds in such a folder, and they are
    compared with the folder's configuration first, because timm lets missing weights pass when ``num_classes`` changes.

    Args:
        path: The folder, its weights file, or a training run's folder, of which ``best/`` is taken, else ``last/``.
        **model_args: For ``timm.create_model``: ``num_classes``, ``in_chans``, ``features_only``, ``drop_path_rate``.

    Raises:
        UserError: No such path, not such a folder, a checkpoint that has to be converted, a damaged file, an
            architecture that timm does not know, weights that do not fit.
    """
    folder, weights = find_model(path)
    cfg, architecture, saved_args = read_config(folder)
    state_dict = read_state_dict(weights)
    with _described_by(folder):
        expected = expected_shapes(architecture, cfg, **saved_args)
    if difference := differences(expected, state_dict):
        raise UserError(f"{weights} does not fit {CONFIG_FILE} beside it ({architecture}): {difference}")

    cfg = cfg | {"state_dict": state_dict}
    with contextlib.nullcontext() if model_args else _described_by(folder):
        model = timm.create_model(architecture, pretrained=True, pretrained_cfg=cfg, **(saved_args | model_args))
    for module in model.modules():  # timm keeps a copy of the weights in every pretrained_cfg
        getattr(module, "pretrained_cfg", {}).pop("state_dict", None)
    return model.eval()


@contextlib.contextmanager
def _described_by(folder: Path) -> Iterator[None]:
    """For what is built of a ``config.json`` alone, whatever timm raises; raises UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{folder / CONFIG_FILE} does not describe a model that timm can build ({reason(error)}): "
            "mend it, or save the model again"
        ) from error


def _way(path: Path) -> str:
    """How a bare checkpoint becomes a folder; raises UserError where it cannot be read."""
    from conv2former.checkpoints.convert import network_prefixes

    if network_prefixes(read_state_dict(path)):
        return (
            "turn the checkpoint into a folder first, "
            f"`conv2former convert {shlex.quote(str(path))} DST --model NAME`, and give DST"
        )
    return (
        "load it into its model in Python, save that with timm.models.save_for_hf(model, FOLDER), and give the folder"
    )


def find_model(path: StrPath) -> tuple[Path, Path]:
    """The folder with ``config.json`` that ``path`` means, and its weights file.

    ``path`` may also be ``local-dir:PATH`` or ``hf-hub:OWNER/NAME`` (``@REVISION`` behind it), which is downloaded to
    the cache of the Hugging Face hub; raises UserError.
    """
    if match := HUB.fullmatch(os.fspath(path)):
        return _downloaded(match[1])
    given = os.fspath(path).removeprefix("local-dir:")
    path = Path(given)
    if not os.path.exists(path):
        meant = get_close_matches(path.name, _runs_in(path.parent), n=1)
        known = printable(f" ({path.parent / meant[0]} does)") if meant else ""
        raise MissingWeights(f"{given} does not exist{known}: give {FROM_FOLDER}{_elsewhere(given)}")
    if not path.is_dir():
        if path.name in WEIGHT_FILES and (path.parent / CONFIG_FILE).is_file():
            return path.parent, path
        raise UserError(f"{path} is a bare file without a {CONFIG_FILE} that says which model it is: {_way(path)}")
    for folder in (path, *(path / name for name in RUN_FOLDERS)):
        if (folder / CONFIG_FILE).is_file():
            for name in WEIGHT_FILES:
                if (folder / name).is_file():
                    return folder, folder / name
            shards = (folder / f"{WEIGHT_FILES[0]}.index.json").is_file()
            way = (
                "its weights are in several files: save the model again, in one"
                if shards
                else "copy the weights as well"
            )
            raise UserError(f"{folder} has {CONFIG_FILE} but no {WEIGHT_FILES[0]}: {way}")
    if (path / "recipe.yaml").is_file():
        raise UserError(
            f"{path} has no weights yet, because it was not evaluated: continue it with `{resume_command(path)}`"
        )
    known = f" (runs in it: {some(inside)})" if (inside := _runs_in(path)) else ""
    raise UserError(printable(f"{path} has no {CONFIG_FILE}{known}: give {FROM_FOLDER}"))


def _runs_in(folder: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return [file.parent.name for file in sorted(folder.glob("[!.]*/recipe.yaml"))]
    return []


def _elsewhere(given: str) -> str:
    """Where a name that is no path may lead instead."""
    if re.match("https?:", given):
        return "; addresses are not fetched: download it, or give hf-hub:OWNER/NAME"
    if timm.is_model(given.partition(".")[0]):
        return f" (train takes what timm publishes: --model {given} --pretrained)"
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", given) and not Path(given).parent.exists() and not Path(given).suffix
    return f", or hf-hub:{given} for a repository on the hub" if named else ""


@contextlib.contextmanager
def hub_if_reachable() -> Iterator[None]:
    """The hub's cache alone while the hub cannot be reached: its client would try again for half a minute."""
    before = constants.HF_HUB_OFFLINE
    address = urlsplit(constants.ENDPOINT)
    if not before and not getproxies():
        try:
            port = address.port or (443 if address.scheme == "https" else 80)
            socket.create_connection((address.hostname or "", port), timeout=10).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _downloaded(name: str) -> tuple[Path, Path]:
    repo, _, revision = name.partition("@")
    if repo.count("/") != 1:
        raise UserError(f"hf-hub:{name} names no repository: give hf-hub:OWNER/NAME")
    try:
        with hub_if_reachable():
            config = hf_hub_download(repo, CONFIG_FILE, revision=revision or None)
            for file in WEIGHT_FILES:
                with contextlib.suppress(EntryNotFoundError):
                    return Path(config).parent, Path(hf_hub_download(repo, file, revision=revision or None))
    except LocalEntryNotFoundError as error:  # offline, and not in the cache; it is an EntryNotFoundError, too
        raise download_failure(f"hf-hub:{name}", error) from error
    except EntryNotFoundError as error:
        raise UserError(f"hf-hub:{name} has no {CONFIG_FILE}: give a repository in timm's layout") from error
    except Exception as error:  # of the hub's client or of the HTTP library beneath it, which changes with the client
        raise download_failure(f"hf-hub:{name}", error) from error
    raise UserError(f"hf-hub:{name} has no {WEIGHT_FILES[0]}: give a repository in timm's layout")


def download_failure(what: str, error: Exception, instead: str = FROM_FOLDER) -> UserError:
    """The line for a download that did not work, with what to give in its place."""
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        return UserError(f"{what} is not on the hub, or is private: check the name, or log in with `hf auth login`")
    why = one_line(error).split(". ")[0][:160]
    return UserError(
        f"{what}: neither in the cache nor to be downloaded ({why}): check the network, "
        f"HF_ENDPOINT and HF_HUB_OFFLINE, or give {instead}"
    )


def read_config(folder: Path) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """``pretrained_cfg``, architecture and ``model_args`` of a classifier's ``config.json``, as timm reads them."""
    config = read_json(folder)
    task = config.get("task", "classification")
    if task != "classification":
        raise UserError(f"{folder} holds a {task} model, not a classifier: give one that was trained to classify")
    with _described_by(folder):
        cfg, architecture, model_args = _parse_model_cfg(config, extra_fields={})
    # the weights are handed over, not read from anywhere
    return _checked(Preprocessing, cfg, folder) | {"source": ""}, architecture, model_args


def _checked(schema: type[BaseModel], found: dict[str, Any], folder: Path) -> dict[str, Any]:
    try:
        return schema.model_validate(found).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise UserError(f"{folder / CONFIG_FILE} is not what timm writes: {first_fault(error)}") from None


def saved_task(path: StrPath) -> str:
    """The task that a saved model was trained for."""
    return str(saved_config(path).get("task", "classification"))


def saved_config(path: StrPath) -> dict[str, Any]:
    """The ``config.json`` of a saved model of any task; raises UserError."""
    return read_json(find_model(path)[0])


def read_json(folder: Path) -> dict[str, Any]:
    """A ``config.json``, which names an architecture that timm knows; raises UserError."""
    path = folder / CONFIG_FILE
    try:
        found = parse_json(read_within(path))
    except (OSError, ValueError) as error:  # ValueError: neither UTF-8 nor JSON, or beyond the limits
        raise UserError(f"{path} is not JSON ({reason(error)}): copy it again, or save the model again") from error
    if not isinstance(found, dict) or not isinstance(found.get("architecture"), str):
        raise UserError(f"{path} names no architecture: expected the configuration that timm writes for a model")
    config = _checked(SavedModel, found, folder)
    architecture = config["architecture"]
    if not timm.is_model(architecture):
        hint = nearest(architecture, timm.list_models("conv2former*"))
        advice = hint or ": import the package that registers it, or update timm"
        raise UserError(f"{path} names the architecture {architecture!r}, which timm does not know{advice}")
    return config


def expected_shapes(name: str, pretrained_cfg: dict[str, Any] | None = None, **model_args: Any) -> dict[str, Any]:
    """Names and shapes of the state dict of a timm model."""
    model = build_on_meta(name, pretrained_cfg=pretrained_cfg, **model_args)
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
    parts = [f"missing {some(missing, 3)}"] * bool(missing)
    parts += [f"unexpected {some(unexpected, 3)}"] * bool(unexpected)
    parts += [some(shapes, 3)] * bool(shapes)
    return "; ".join(parts)
