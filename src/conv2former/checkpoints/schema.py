"""What a ``config.json`` may say. It may be somebody else's: nothing in it leads to another file or address."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from conv2former.config import MOST_SIDE
from conv2former.errors import printable, shortened
from conv2former.models.meta import check_args

MOST_CLASSES = 1 << 20

MOST_OF_A_NAME = 10_000  # characters of a class's name, a path, a version


def _name(value: Any) -> Any:
    # pydantic's own texts refuse the undecodable bytes that names of files may hold
    if not isinstance(value, (str, int)) or len(str(value)) > MOST_OF_A_NAME:
        raise ValueError(f"a text of at most {MOST_OF_A_NAME:,} characters is needed")
    return value


Name = Annotated[Any, AfterValidator(_name)]
Number = Annotated[int, Field(ge=0, le=MOST_CLASSES)]
Text = Annotated[str, Field(max_length=1000)]
Names = Annotated[list[Name], Field(max_length=MOST_CLASSES)] | dict[Name, Name]
Size = tuple[
    Annotated[int, Field(ge=1, le=1024)],
    Annotated[int, Field(ge=1, le=MOST_SIDE // 2)],
    Annotated[int, Field(ge=1, le=MOST_SIDE // 2)],
]
Part = Annotated[float, Field(ge=0.05, le=2)]
Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
Channels = Annotated[list[FiniteFloat], Field(min_length=1, max_length=1024)]
Spread = Annotated[list[Annotated[FiniteFloat, Field(ge=1e-6)]], Field(min_length=1, max_length=1024)]


class Preprocessing(BaseModel):
    """Of timm's ``pretrained_cfg`` what says how images are prepared and what the classes are.

    Where weights come from (``url``, ``file``, ``hf_hub_id``, ``custom_load``, ``source``, ...) is left out: they lie
    beside the file.
    """

    model_config = ConfigDict(extra="ignore")

    architecture: Text | None = None
    input_size: Size | None = None
    test_input_size: Size | None = None
    min_input_size: Size | None = None
    fixed_input_size: bool = False
    interpolation: Interpolation | None = None
    crop_pct: Part | None = None
    test_crop_pct: Part | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None
    mean: Channels | None = None
    std: Spread | None = None
    num_classes: Number | None = None
    label_offset: Number | None = None
    label_names: Names | None = None
    label_descriptions: Names | None = None
    pool_size: tuple[Number, Number] | None = None
    test_pool_size: tuple[Number, Number] | None = None
    first_conv: Text | list[Text] | None = None
    classifier: Text | list[Text] | None = None
    license: Text | None = None

    @model_validator(mode="after")
    def _can_be_prepared(self) -> Self:
        if self.mean and self.std and len(self.mean) != len(self.std):
            raise ValueError("mean and std must have as many numbers")
        side = max((self.input_size or (3, 224, 224))[1:]) / (self.crop_pct or 1)
        if side > MOST_SIDE:
            raise ValueError(f"images would be enlarged to {side:,.0f} pixels, more than {MOST_SIDE:,}")
        return self


class ExportedModel(Preprocessing):
    """What an exported file says of its model."""

    task: Annotated[str, Field(min_length=1, max_length=100)]
    architecture: Text
    labels: list[Text]
    input_size: Size
    dynamic_size: bool = False
    outputs: list[Text] = []
    recipe: dict[str, Any] | None = None  # of a detector or segmentation model, not checked yet


class SavedModel(Preprocessing):
    """A whole ``config.json``, timm's or ours. Older files of timm's have the preprocessing at the top."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    architecture: Text
    task: Annotated[str, Field(min_length=1, max_length=100)] = "classification"
    num_features: Number | None = None
    pretrained_cfg: Preprocessing | None = None
    model_args: dict[Text, Any] = {}
    labels: Names | None = None
    recipe: dict[str, Any] | None = None
    conv2former: Any = None  # what our training notes; nothing here reads it

    @model_validator(mode="after")
    def _as_many_names_as_classes(self) -> Self:
        inner = self.pretrained_cfg
        counts = {cfg.num_classes for cfg in (inner, self) if cfg and cfg.num_classes is not None}
        names = self.label_names or (inner.label_names if inner else None) or self.labels
        if names and counts and len(names) not in counts:
            raise ValueError(f"{len(names):,} label names for {max(counts):,} classes")
        check_args(self.model_args, "model_args")
        return self


def first_fault(error: ValidationError) -> str:
    """The first thing that is wrong with a file, in a line."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    given = "" if fault["type"] in ("value_error", "missing") else f", not {shortened(fault['input'])}"
    words = str(fault["ctx"]["error"]) if fault["type"] == "value_error" else fault["msg"]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return printable(f"{where}{': ' * bool(where)}{words}{given}{more}")[:400]
