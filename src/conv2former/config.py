"""The parts of a recipe that all tasks share. Unknown keys and wrong types are errors that name the key."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from conv2former.errors import UserError, nearest, shortened

NORMALISATION = ("data.mean", "data.std")
MOST_FAULTS = 10  # of a recipe that are named at once
MOST_SIDE = 8192  # pixels, of an image that is prepared for a network
Side = Annotated[int, Field(ge=1, le=MOST_SIDE)]
Width = Annotated[int, Field(ge=1, le=1 << 16)]  # channels of a layer, objects of an image
Beta = Annotated[float, Field(ge=0, lt=1)]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Section(BaseModel):
    """A part of a recipe: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_no_booleans(cls, given: Any, info: ValidationInfo) -> Any:
        kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
        parts = given if isinstance(given, list | tuple) else [given]
        if any(isinstance(part, bool) for part in parts) and kinds & {int, float} and bool not in kinds:
            either = "a number or null" if type(None) in kinds else "a number"
            raise PydanticCustomError("boolean", f"YAML reads yes, no, on and off as true and false: give {either}")
        return given


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    return {annotation}.union(*(_kinds(part) for part in get_args(annotation)))


class Claim(Section):
    """The header: what the experiment is in the paper and what came out here."""

    source: str = Field(default="not in the paper", description="table and row of the paper, or 'not in the paper'")
    command: str = Field(default="", description="the command that runs it")
    hardware: str = Field(default="any", description="hardware that the time is meant for")
    time: str = Field(default="not run", description="wall time expected there, or 'not run'")
    processes: PositiveInt = Field(default=1, description="processes (GPUs) of that hardware")
    images: PositiveInt | None = Field(default=None, description="training images of the data that the claim is about")
    classes: PositiveInt | None = Field(default=None, description="classes of that data")
    notes: str = Field(default="", description="choices where the paper is silent, with their reasons")
    paper: float | None = Field(default=None, description="the paper's number: the task's monitored metric, in percent")
    measured: float | Literal["not run"] = Field(default="not run", description="the same, measured here")


class ModelSection(Section):
    """The network: a classifier, or the backbone of a detector or segmentation model."""

    name: str = Field(max_length=200, description="any name that timm knows")
    args: dict[str, Any] = Field(default={}, description="keyword arguments of timm.create_model")
    weights: str | None = Field(
        default=None,
        description="to start from: a run, folder or file, hf-hub:OWNER/NAME, or timm for what timm publishes of the "
        "model; the classifier may differ",
    )
    needs_weights: bool = Field(default=False, description="refuse to start from random weights")
    fit_head: bool | Literal["only"] = Field(
        default=False,
        description="fit a new classifier to the features of the weights before training (a linear probe); 'only' "
        "stops there",
    )
    drop_path_rate: float = Field(default=0.0, ge=0, lt=1, description="stochastic depth of the last block")
    drop_rate: float = Field(default=0.0, ge=0, lt=1, description="dropout before the classifier")
    freeze_batchnorm: bool = Field(
        default=False,
        description="batch norms (the stem's) keep the statistics, scales and shifts that they start with",
    )


class ImagesSection(Section):
    """How image files are read, for every task."""

    workers: int = Field(default=2, ge=0, le=256, description="processes that read images, per training process")
    on_bad_image: Literal["error", "skip"] = Field(
        default="error", description="what an image that cannot be read does: end the run, or be listed and replaced"
    )
    max_bad_images: int = Field(default=100, ge=0, description="files that may be skipped before the run stops")
    max_pixels: PositiveInt = Field(default=1 << 27, description="larger images count as images that cannot be read")
    mean: tuple[float, float, float] = Field(default=IMAGENET_MEAN, description="subtracted from colours of 0 to 1")
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = Field(
        default=IMAGENET_STD, description="what the difference is divided by"
    )


class AnnotatedSection(ImagesSection):
    """Images with something that belongs to their pixels."""

    exif: Literal["turn", "ignore"] = Field(
        default="turn",
        description="'turn' shows images as their EXIF orientation says, and masks as theirs does; 'ignore' leaves "
        "both as they are stored, for annotations made so",
    )


class OptimSection(Section):
    """The optimizer. Norms, biases and layer scales are not decayed (timm's rule for vectors)."""

    name: str = Field(default="adamw", description="an optimizer that timm knows")
    base_lr: float = Field(default=1e-3, gt=0, description="learning rate for an effective batch of base_batch")
    base_batch: PositiveInt = Field(default=1024, description="effective batch that base_lr is meant for")
    batch_size: PositiveInt = Field(default=128, description="images per process and forward pass")
    accumulate: PositiveInt = Field(default=1, description="forward passes per optimizer step")
    global_batch: PositiveInt | None = Field(
        default=None,
        description="images per optimizer step over all processes; accumulate then follows from it, and batch_size is "
        "the most that a process takes at once",
    )
    weight_decay: float = Field(default=0.05, ge=0, description="of weights; norms, biases and layer scales have none")
    betas: tuple[Beta, Beta] | None = Field(default=None, description="None for the optimizer's own")
    eps: float | None = Field(default=None, gt=0, description="None for the optimizer's own")
    clip_grad: float | None = Field(default=None, gt=0, description="largest norm of the gradient")
    layer_decay: float | None = Field(default=None, gt=0, le=1, description="learning-rate decay from block to block")
    head_lr: PositiveFloat = Field(
        default=1.0, description="factor of the learning rate of the classifier, or of all that stands on the backbone"
    )
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="moving average of the weights, which is then evaluated and saved"
    )

    @model_validator(mode="after")
    def _one_way_to_say_the_batch(self) -> OptimSection:
        if self.global_batch is not None and self.accumulate != 1:
            raise ValueError("optim.accumulate follows from optim.global_batch: give one of them")
        return self


class ScheduleSection(Section):
    """How long, and the learning rate on the way: linear warm-up, then cosine, steps or a polynomial.

    Lengths are in epochs; whoever counts optimizer steps gives ``steps``, ``warmup_steps`` and ``eval_every_steps``.
    """

    kind: Literal["cosine", "multistep", "polynomial"] = Field(
        default="cosine", description="how the learning rate falls after the warm-up"
    )
    epochs: PositiveInt = Field(default=300, description="length in epochs")
    steps: PositiveInt | None = Field(default=None, description="length in optimizer steps; epochs is then not used")
    warmup_epochs: float = Field(default=0, ge=0, description="epochs in which the learning rate rises from near 0")
    warmup_steps: int | None = Field(default=None, ge=0, description="warm-up in optimizer steps, for warmup_epochs")
    warmup_lr: float = Field(default=1e-6, ge=0, description="learning rate at step 0 of the warm-up")
    min_lr: float = Field(default=1e-6, ge=0, description="learning rate at the end of the cosine or polynomial")
    milestones: list[float] = Field(default=[], description="epochs after which 'multistep' lowers the learning rate")
    gamma: float = Field(default=0.1, gt=0, lt=1, description="the factor of each milestone")
    power: float = Field(default=1.0, gt=0, description="of the polynomial")
    eval_every: PositiveInt = Field(default=1, description="epochs between evaluations")
    eval_every_steps: PositiveInt | None = Field(default=None, description="the same in optimizer steps")

    @model_validator(mode="after")
    def _fits(self) -> ScheduleSection:
        if self.steps is None and self.warmup_epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs}) must be less than epochs ({self.epochs}): lower it")
        if self.warmup_steps is not None and self.warmup_epochs:
            raise ValueError("give schedule.warmup_steps or schedule.warmup_epochs, not both")
        if self.steps is not None and (self.warmup_steps or 0) >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be less than steps ({self.steps})")
        if bool(self.milestones) != (self.kind == "multistep"):
            raise ValueError("schedule.milestones and schedule.kind=multistep require each other: give both or neither")
        late = [epoch for epoch in self.milestones if epoch <= 0 or (self.steps is None and epoch >= self.epochs)]
        if late:
            raise ValueError(f"schedule.milestones: {late[0]:g} does not lie within the {self.epochs} epochs")
        if self.steps is not None and self.warmup_epochs:
            raise ValueError("schedule.steps requires schedule.warmup_steps in the place of warmup_epochs")
        for one, other in (("eval_every", self.eval_every_steps), ("epochs", self.steps)):
            if other is not None and getattr(self, one) != type(self).model_fields[one].default:
                raise ValueError(f"give schedule.{one} or its counterpart in steps, not both")
        return self

    def total(self, steps_per_epoch: int) -> int:
        """Optimizer steps in all."""
        return self.epochs * steps_per_epoch if self.steps is None else self.steps

    def warmup(self, steps_per_epoch: int) -> int:
        """Optimizer steps of warm-up."""
        warmup = round(self.warmup_epochs * steps_per_epoch) if self.warmup_steps is None else self.warmup_steps
        return min(warmup, self.total(steps_per_epoch) - 1)

    def interval(self, steps_per_epoch: int) -> int:
        """Optimizer steps between evaluations."""
        return self.eval_every * steps_per_epoch if self.eval_every_steps is None else self.eval_every_steps

    def length(self) -> str:
        """The length in words."""
        return f"{self.epochs} epochs" if self.steps is None else f"{self.steps:,} steps"


class LoggerSection(Section):
    """A logger of Lightning's beside TensorBoard and CSV."""

    name: str = Field(description="class in lightning.pytorch.loggers, WandbLogger for example")
    args: dict[str, Any] = Field(
        default={}, description="its keyword arguments; save_dir is the run's loggers/ unless given"
    )


class EngineSection(Section):
    """How it is computed."""

    seed: int = Field(default=0, ge=0, description="all random numbers follow from it")
    precision: Literal["64", "32", "bf16", "16"] = Field(
        default="32", description="autocast type; 64 computes in double precision, to compare runs"
    )
    channels_last: bool = Field(default=True, description="memory in the order that the blocks work in")
    compile: bool | Literal["auto"] = Field(
        default=False, description="torch.compile; 'auto' is true on an NVIDIA GPU, decided when the run is started"
    )
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = Field(
        default="default", description="of torch.compile"
    )
    float32_matmul_precision: Literal["highest", "high"] = Field(
        default="highest", description="of torch.set_float32_matmul_precision; 'high' allows TF32 in matrix products"
    )
    cudnn_benchmark: bool = Field(
        default=False,
        description="cuDNN times its algorithms in training; a resumed run may then differ in the last bits",
    )
    grad_checkpointing: bool = Field(
        default=False, description="keep only the inputs of blocks and compute them twice: less memory, more time"
    )
    accelerator: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="what to compute on; auto takes the GPUs if there are any"
    )
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
    stall_seconds: float = Field(
        default=60,
        ge=0,
        description="where an image takes longer to read, or a step longer than this and than ten times the longest "
        "before, the run says so and ends; 0 for never",
    )
    loggers: list[LoggerSection] = Field(default=[], description="further loggers")

    @field_validator("precision", mode="before")
    @classmethod
    def _precision_is_a_word(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value  # YAML reads 32 as a number

    @model_validator(mode="after")
    def _a_mode_needs_the_compiler(self) -> EngineSection:
        if self.compile_mode != "default" and self.compile is False:
            raise ValueError(
                f"engine.compile_mode={self.compile_mode} requires engine.compile=true (or auto): set that too, or "
                "leave the mode out"
            )
        return self


# settings in optimizer steps, with those that they stand for
COUNTERPARTS = {
    "steps": ("epochs", "warmup_epochs", "eval_every"),
    "warmup_steps": ("warmup_epochs",),
    "eval_every_steps": ("eval_every",),
}
Choices = dict[str, tuple[Any, str]]  # section.key -> value and the reason for it


@dataclass(frozen=True)
class Start:
    """What automatic settings are decided by.

    Attributes:
        images: Training images.
        weights: Whether there are any to start from.
        gpu: Whether the training runs on one.
        sharded: Whether FSDP shards the weights, of which there can be no moving average then.
        epochs: If somebody has set them.
        counted: What of ``COUNTERPARTS`` is set.
        world: Processes.
        masks: Whether one of the objects has a mask.
        short_side: Of images of a detector, if somebody has set it.
        mean: Of the images that the weights were trained on, None where they do not say; ``std`` likewise.
    """

    images: int = 1000
    weights: bool = True
    gpu: bool = False
    sharded: bool = False
    epochs: int | None = None
    counted: frozenset[str] = frozenset()
    world: int = 1
    masks: bool = True
    short_side: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None

    def schedule(self, epochs: int, evaluations: int) -> Choices:
        """The length, a tenth of it for warm-up, and the number of evaluations."""
        length = self.epochs or epochs
        found: Choices = {
            "schedule.epochs": (length, f"{self.images:,} training images"),
            "schedule.warmup_epochs": (round(length / 10, 1), "a tenth of the epochs"),
            "schedule.eval_every": (max(length // evaluations, 1), f"about {min(evaluations, length)} evaluations"),
        }
        for other in self.counted:  # what is set in steps must not be set in epochs, too
            for key in COUNTERPARTS[other]:
                found[f"schedule.{key}"] = (ScheduleSection.model_fields[key].default, f"schedule.{other} is set")
        return found


class Recipe(Section):
    """One experiment, as far as the engine knows it; each task adds its own sections.

    Attributes:
        auto: Settings ``section.key`` that are decided when the run is started; in YAML their value is ``auto``.
    """

    name: str
    task: str
    claim: Claim = Claim()
    model: ModelSection
    data: ImagesSection
    optim: OptimSection = OptimSection()
    schedule: ScheduleSection = ScheduleSection()
    engine: EngineSection = EngineSection()
    auto: tuple[str, ...] = Field(default=(), exclude=True)
    # settings that are 'auto' unless the recipe says them; a task that adds some keeps these: (*Recipe.left_open, ...)
    left_open: ClassVar[tuple[str, ...]] = NORMALISATION
    # settings that came later, with what was done before: a recipe with these values keeps its hash
    later: ClassVar[dict[str, dict[str, Any]]] = dict(
        model=dict(fit_head=False),
        data=dict(exif="turn", mask_values=None, mask_nearest=False),
        optim=dict(head_lr=1.0),
        engine=dict(compile_mode="default", float32_matmul_precision="highest", cudnn_benchmark=False),
    )

    @classmethod
    def choices(cls, start: Start) -> Choices:
        """The settings that may be 'auto': what is chosen, and why."""
        if start.mean is None or start.std is None:
            return {"data.mean": (IMAGENET_MEAN, "ImageNet's"), "data.std": (IMAGENET_STD, "ImageNet's")}
        return {"data.mean": (start.mean, "of the weights"), "data.std": (start.std, "of the weights")}

    @property
    def pairs(self) -> bool:
        """Whether the images of a forward pass are mixed in pairs, so that it needs an even number of them."""
        return False

    @property
    def brings_data(self) -> bool:
        """Whether it needs no ``--data``."""
        return False

    def value(self, key: str) -> Any:
        """Of a setting ``section.key``."""
        section, name = key.split(".")
        return getattr(getattr(self, section), name)

    def raw(self) -> dict[str, Any]:
        """The recipe as it is written in YAML."""
        raw = self.model_dump(mode="json")
        for key in self.auto:
            _put(raw, key, "auto")
        return raw

    def to_yaml(self) -> str:
        """The recipe with every default spelled out."""
        return yaml.safe_dump(self.raw(), sort_keys=False, allow_unicode=True, width=120)

    def settled(self, values: dict[str, Any]) -> Self:
        """The recipe with ``values`` (section.key -> value) in place of 'auto'; other settings stay; UserError."""
        raw = self.raw()
        for key in [key for key in self.auto if key in values]:
            _put(raw, key, values[key])
        return validated(type(self), raw, self.name)

    def settings(self) -> dict[str, Any]:
        """All that changes the result: everything but ``FREE`` settings."""
        return self.model_dump(mode="json", exclude=FREE)

    def digest(self) -> str:
        """A hash of the settings.

        A recipe keeps its hash when the schema gets new settings (``later``). In ``engine.compile`` 'auto' counts as
        false, so that ``reproduce`` finds the rows and runs of a recipe on every machine.
        """
        settings = self.settings()
        for section, later in self.later.items():
            if section in settings:
                given = settings[section].items()
                settings[section] = {k: value for k, value in given if later.get(k, ...) != value}
        if settings["engine"]["compile"] == "auto":
            settings["engine"]["compile"] = False
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def decided(self, compiles: bool | Literal["auto"]) -> Self:
        """The recipe with ``compiles`` in place of 'auto' in ``engine.compile``; one without 'auto' as it is."""
        if self.engine.compile != "auto":
            return self
        mode = self.engine.compile_mode if compiles else "default"
        engine = self.engine.model_copy(update=dict(compile=compiles, compile_mode=mode))
        return self.model_copy(update=dict(engine=engine))


# what a resumed run may change without --force: names, reading, saving and reporting
FREE: dict[str, Any] = dict(
    name=True,
    claim=True,
    model={"needs_weights"},
    data={"workers", "on_bad_image", "max_bad_images", "max_pixels"},
    engine={"devices", "nodes", "checkpoint_minutes", "max_skipped_steps", "stall_seconds", "loggers"},
)


def validated(config_class: type[Recipe], raw: dict[str, Any], origin: str) -> Any:
    """A task's recipe from its parsed text; messages call it ``origin``.

    Raises:
        UserError: Unknown key or wrong type; the message names the nearest right one.
    """
    epochs = _value(raw, "schedule.epochs")
    counted = frozenset(key for key in COUNTERPARTS if _value(raw, f"schedule.{key}") is not None)
    known = config_class.choices(Start(epochs=epochs if isinstance(epochs, int) else None, counted=counted))
    auto = [key for key in known if _value(raw, key, "auto" if key in config_class.left_open else None) == "auto"]
    if auto and isinstance(raw, dict):
        raw = {name: dict(part) if isinstance(part, dict) else part for name, part in raw.items()} | dict(auto=auto)
        for key in auto:
            _put(raw, key, known[key][0])  # until it is decided
    try:
        return config_class.model_validate(raw)
    except ValidationError as error:
        found = list(dict.fromkeys(_explain(fault, config_class) for fault in error.errors()[:MOST_FAULTS]))
        more = max(error.error_count() - MOST_FAULTS, 0)
        found += [f"and {more:,} more"] * bool(more)
        raise UserError(f"recipe {origin}: {'; '.join(found)}") from None


def _value(raw: dict[str, Any], key: str, absent: Any = None) -> Any:
    """A setting ``section.key`` of a recipe that is not checked yet."""
    section, name = key.split(".")
    part = raw.get(section) if isinstance(raw, dict) else raw
    if part is None:  # an empty section is written as nothing
        return absent
    return part.get(name, absent) if isinstance(part, dict) else None


def _put(raw: dict[str, Any], key: str, value: Any) -> None:
    section, name = key.split(".")
    raw[section] = (raw.get(section) or {}) | {name: value}


def _explain(error: Any, recipe: type[Recipe]) -> str:
    path = [
        str(part)[:100] for part in error["loc"][:2]
    ]  # behind section and key pydantic names members of a union or tuple
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = _fields(recipe, path[:-1])
        return f"unknown key {key!r}{nearest(path[-1], known) or '; there are: ' + ', '.join(known)}"
    if error["type"] == "missing":
        lacks = f"lacks values, got {shortened(error['input'])}"
        return f"{key!r} {lacks if len(error['loc']) > len(path) else 'is missing'}"
    if error["type"] == "value_error":  # from a validator above, whose message names the keys itself
        return str(error["ctx"]["error"])
    return f"{key!r}: {error['msg']}, got {shortened(error['input'])}"


def _fields(recipe: type[Recipe], path: list[str]) -> list[str]:
    model: Any = recipe
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        model = next((a for a in (annotation, *get_args(annotation)) if isinstance(a, type)), recipe)
        if not issubclass(model, BaseModel):
            return []
    return list(model.model_fields)
