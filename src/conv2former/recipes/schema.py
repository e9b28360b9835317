"""What a recipe may say. Unknown keys and wrong types are errors that name the key."""

from __future__ import annotations

import hashlib
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from conv2former.errors import UserError, nearest, one_line


class Section(BaseModel):
    """A part of a recipe: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Claim(Section):
    """The header: what the experiment is in the paper and what came out here."""

    source: str = Field(description="table and row of the paper, or 'not in the paper'")
    command: str = Field(description="the command that runs it")
    hardware: str = Field(description="hardware that the time is meant for")
    time: str = Field(description="wall time expected there, or 'not run'")
    processes: PositiveInt = Field(default=1, description="processes (GPUs) of that hardware")
    images: PositiveInt | None = Field(default=None, description="training images of the data that the claim is about")
    classes: PositiveInt | None = Field(default=None, description="classes of that data")
    notes: str = Field(default="", description="choices where the paper is silent, with their reasons")
    paper: float | None = Field(default=None, description="the paper's top-1 in percent")
    measured: float | Literal["not run"] = Field(default="not run", description="top-1 in percent measured here")


class ModelSection(Section):
    """The network."""

    name: str = Field(description="any name that timm knows")
    args: dict[str, Any] = Field(default={}, description="keyword arguments of timm.create_model")
    weights: str | None = Field(
        default=None, description="run, folder or file to start from; its classifier may differ"
    )
    drop_path_rate: float = Field(default=0.0, ge=0, lt=1, description="stochastic depth of the last block")
    drop_rate: float = Field(default=0.0, ge=0, lt=1, description="dropout before the classifier")


class DataSection(Section):
    """Images in and how they are read."""

    source: Literal["folder", "tar", "wds", "hfds", "digits"] = Field(
        default="folder",
        description="'folder' for class folders, 'tar' for tar files of them, 'wds' for webdataset shards, 'hfds' for "
        "a Hugging Face dataset, 'digits' for scikit-learn's handwritten digits",
    )
    input_size: int = Field(default=224, ge=8, description="side of the square that the network sees, pixels")
    val_fraction: float = Field(default=0.0, ge=0, lt=1, description="share held out where there is no val/ folder")
    workers: int = Field(default=2, ge=0, description="processes that read images, per training process")
    crop_pct: float = Field(default=0.9, gt=0, le=1, description="share of the resized image kept in evaluation")
    on_bad_image: Literal["error", "skip"] = Field(
        default="error", description="what an image that cannot be read does: end the run, or be listed and replaced"
    )
    max_bad_images: int = Field(default=100, ge=0, description="files that may be skipped before the run stops")
    max_pixels: PositiveInt = Field(default=1 << 27, description="larger pictures count as images that cannot be read")
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


class AugmentSection(Section):
    """Training augmentation, all of timm's. The defaults leave everything off but the crop and the flip."""

    scale: tuple[float, float] = Field(default=(0.08, 1.0), description="area of the random crop")
    ratio: tuple[float, float] = Field(default=(0.75, 1.3333333), description="aspect ratio of the random crop")
    hflip: float = Field(default=0.5, ge=0, le=1)
    color_jitter: float = Field(default=0.0, ge=0, description="used where auto_augment is not")
    auto_augment: str | None = Field(default=None, description="timm's policy string, rand-m9-mstd0.5-inc1 for example")
    random_erasing: float = Field(default=0.0, ge=0, le=1)
    mixup: float = Field(default=0.0, ge=0, description="alpha of MixUp")
    cutmix: float = Field(default=0.0, ge=0, description="alpha of CutMix")
    mix_prob: float = Field(default=1.0, ge=0, le=1, description="probability that a batch is mixed at all")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


class OptimSection(Section):
    """The optimizer. Norms, biases and layer scales are not decayed (timm's rule for vectors)."""

    name: str = Field(default="adamw", description="an optimizer that timm knows")
    base_lr: float = Field(default=1e-3, gt=0, description="learning rate for an effective batch of base_batch")
    base_batch: PositiveInt = 1024
    batch_size: PositiveInt = Field(default=128, description="images per process and forward pass")
    accumulate: PositiveInt = Field(default=1, description="forward passes per optimizer step")
    global_batch: PositiveInt | None = Field(
        default=None,
        description="images per optimizer step over all processes; accumulate then follows from it, and batch_size is "
        "the most that a process takes at once",
    )
    weight_decay: float = Field(default=0.05, ge=0)
    betas: tuple[float, float] | None = Field(default=None, description="None for the optimizer's own")
    eps: float | None = Field(default=None, gt=0, description="None for the optimizer's own")
    clip_grad: float | None = Field(default=None, gt=0, description="largest norm of the gradient")
    layer_decay: float | None = Field(default=None, gt=0, le=1, description="learning-rate decay from block to block")
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="moving average of the weights, which is then evaluated and saved"
    )

    @model_validator(mode="after")
    def _one_way_to_say_the_batch(self) -> OptimSection:
        if self.global_batch is not None and self.accumulate != 1:
            raise ValueError("optim.accumulate follows from optim.global_batch: give one of them")
        return self


class ScheduleSection(Section):
    """Cosine decay with linear warm-up, counted in optimizer steps."""

    epochs: PositiveInt = 300
    warmup_epochs: float = Field(default=0, ge=0)
    warmup_lr: float = Field(default=1e-6, ge=0, description="learning rate at step 0 of the warm-up")
    min_lr: float = Field(default=1e-6, ge=0, description="learning rate at the end of the cosine")
    eval_every: PositiveInt = Field(default=1, description="epochs between evaluations")

    @model_validator(mode="after")
    def _warmup_fits(self) -> ScheduleSection:
        if self.warmup_epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs}) must be less than epochs ({self.epochs})")
        return self


class LoggerSection(Section):
    """A logger of Lightning's beside TensorBoard and CSV."""

    name: str = Field(description="class in lightning.pytorch.loggers, WandbLogger for example")
    args: dict[str, Any] = Field(
        default={}, description="its keyword arguments; save_dir is the run's loggers/ unless given"
    )


class EngineSection(Section):
    """How it is computed."""

    seed: int = Field(default=0, ge=0)
    precision: Literal["32", "bf16", "16"] = Field(default="32", description="autocast type")
    channels_last: bool = True
    compile: bool = False
    grad_checkpointing: bool = False
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: PositiveInt | Literal["auto"] = Field(
        default="auto", description="processes on each machine; torchrun and SLURM say it themselves"
    )
    nodes: PositiveInt | Literal["auto"] = Field(default="auto", description="machines; as above")
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        default="auto", description="'fsdp' shards weights and optimizer over the processes; 'auto' is DDP"
    )
    sync_batchnorm: bool = Field(default=False, description="batch norm (the stem's) over the images of all processes")
    checkpoint_minutes: float = Field(default=10, gt=0, description="most time between two checkpoints, minutes")
    max_skipped_steps: PositiveInt = Field(
        default=10, description="steps in a row whose loss is not finite, after which the run stops"
    )
    loggers: list[LoggerSection] = Field(default=[], description="further loggers")

    @field_validator("precision", mode="before")
    @classmethod
    def _precision_is_a_word(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value  # YAML reads 32 as a number


class Recipe(Section):
    """One experiment."""

    name: str
    claim: Claim
    model: ModelSection
    data: DataSection = DataSection()
    augment: AugmentSection = AugmentSection()
    optim: OptimSection = OptimSection()
    schedule: ScheduleSection = ScheduleSection()
    engine: EngineSection = EngineSection()

    @model_validator(mode="after")
    def _mixing_needs_pairs(self) -> Recipe:
        if (self.augment.mixup or self.augment.cutmix) and self.optim.batch_size % 2:
            raise ValueError(f"optim.batch_size ({self.optim.batch_size}) must be even with augment.mixup or cutmix")
        return self

    def to_yaml(self) -> str:
        """The resolved recipe, every default spelled out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)

    def digest(self) -> str:
        """A hash of all that changes the result: everything but ``FREE`` settings."""
        settings = self.model_dump(mode="json", exclude=FREE)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


# what a resumed run may change without being forced: names, reading, saving and reporting
FREE: dict[str, Any] = dict(
    name=True,
    claim=True,
    data={"workers", "on_bad_image", "max_bad_images", "max_pixels"},
    engine={"devices", "nodes", "checkpoint_minutes", "max_skipped_steps", "loggers"},
)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader that reads ``1e-6`` as a number, as YAML 1.2 does and PyYAML does not."""


_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """What a YAML text says; raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def recipe_names() -> list[str]:
    """The shipped recipes."""
    folder = resources.files("conv2former.recipes")
    names = (entry.name for entry in folder.iterdir())
    # a leading underscore marks what others are based on and is no experiment by itself
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml") and not name.startswith("_"))


def load_recipe(name: str | Path, *, overrides: list[str] | None = None) -> Recipe:
    """Reads a shipped recipe by name, or a file of one's own by its path (it must end in .yaml or .yml).

    Args:
        name: Name or path.
        overrides: Assignments ``section.key=value``, the value in YAML.

    Raises:
        UserError: No such recipe, not YAML, unknown key or wrong type; the message names the nearest right one.
    """
    raw = _raw(str(name), ())
    for assignment in overrides or []:
        _assign(raw, assignment)
    return parse_recipe(raw, str(name))


def _raw(name: str, above: tuple[str, ...]) -> dict[str, Any]:
    """A recipe as it is written, laid over the one that it names as its ``base``."""
    try:
        raw = parse_yaml(_read(name))
    except yaml.YAMLError as error:
        raise UserError(f"recipe {name} is not YAML: {one_line(error)}") from None
    if not isinstance(raw, dict):
        raise UserError(f"recipe {name} holds no sections: it must start with name:, claim:, model:")
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str) or base in (name, *above):
        raise UserError(f"recipe {name}: base must name another recipe, not {base!r}")
    below = _raw(base, (name, *above))
    if name.endswith((".yaml", ".yml")):  # what the paper claims of the base says nothing of somebody's own recipe
        command = f"conv2former train --recipe {name} --data DIR --out RUN"
        own = dict(source=f"based on {base}", command=command, notes="", paper=None, measured="not run")
        below["claim"] = below.get("claim", {}) | own
    return _laid_over(below, raw)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = below | above
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = _laid_over(below[key], above[key])
    return merged


def parse_recipe(raw: dict[str, Any], origin: str) -> Recipe:
    """Checks a recipe that is already parsed; ``origin`` stands in error messages."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"recipe {origin}: {'; '.join(_explain(e) for e in error.errors())}") from None


def _read(name: str) -> str:
    if name.endswith((".yaml", ".yml")):
        try:
            return Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read recipe {name}: {getattr(error, 'strerror', None) or error}") from None
    file = resources.files("conv2former.recipes").joinpath(f"{name}.yaml")
    if not file.is_file():
        names = recipe_names()
        hint = nearest(name, names) or f"; there are: {', '.join(names)}"
        raise UserError(f"unknown recipe {name!r}{hint} (a file of your own must end in .yaml)")
    return file.read_text(encoding="utf-8")


def _assign(raw: dict[str, Any], assignment: str) -> None:
    key, equals, value = assignment.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(f"--set {assignment!r} is not of the form section.key=value")
    target = raw
    for part in path[:-1]:
        # a section that the file leaves out, or writes as an empty line, starts empty
        child = target.get(part)
        target[part] = child = {} if child is None else child
        if not isinstance(child, dict):
            raise UserError(f"--set {assignment!r}: {part!r} holds a value, not a section")
        target = child
    try:
        target[path[-1]] = parse_yaml(value)
    except yaml.YAMLError:
        raise UserError(f"--set {assignment!r}: the value is not YAML") from None


def _explain(error: Any) -> str:
    path = [str(part) for part in error["loc"][:2]]  # behind section and key pydantic names members of a union or tuple
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = _fields(path[:-1])
        return f"unknown key {key!r}{nearest(path[-1], known) or '; there are: ' + ', '.join(known)}"
    if error["type"] == "missing":
        return f"{key!r} is missing"
    if error["type"] == "value_error":  # from a validator above, whose message names the keys itself
        return str(error["ctx"]["error"])
    return f"{key!r}: {error['msg']}, got {error['input']!r}"


def _fields(path: list[str]) -> list[str]:
    model: Any = Recipe
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        model = next((a for a in (annotation, *get_args(annotation)) if isinstance(a, type)), Recipe)
        if not issubclass(model, BaseModel):
            return []
    return list(model.model_fields)
