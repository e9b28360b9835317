"""Files of a run folder, read back. The folder may be somebody else's: each file is checked before anything uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from conv2former.checkpoints.schema import Name, first_fault
from conv2former.errors import UserError, one_line
from conv2former.files import MOST_YAML, parse_json, parse_yaml, read_lines, read_within

Count = Annotated[int, Field(ge=0)]


class Machine(BaseModel):
    """What computed."""

    model_config = ConfigDict(extra="allow")

    system: Name | None = None
    cpus: Count | None = None
    gpus: list[Name] = []


class Step(BaseModel):
    """What every optimizer step consists of (``engine.batch``)."""

    images: PositiveInt
    micro_batches: int = Field(ge=1, le=1_000_000)
    keys: Literal[1, 2]


class Facts(BaseModel):
    """``run.json``; what is not named here is kept as it is."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    data: Name | None = None
    classes: list[Name] = []
    images: dict[Name, Count] = {}
    images_hash: Name | None = None
    processes: PositiveInt | None = None
    batch: Step | None = None
    model_args: dict[Name, Any] = {}
    recipe_hash: Name | None = None
    seed: Count | None = None
    versions: dict[Name, Name] = {}
    commit: Name | None = None
    machine: Machine = Machine()


def read_facts(path: Path) -> dict[str, Any]:
    """What a ``run.json`` says; raises UserError."""
    try:
        return Facts.model_validate(_json(path)).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise UserError(f"{path} is not what a training writes: {first_fault(error)}") from None


def read_report(path: Path) -> dict[str, Any]:
    """An ``evaluation.json``, of which numbers are taken alone; raises UserError."""
    found = _json(path, finite=False)
    if not isinstance(found, dict):
        raise UserError(f"{path} is not what an evaluation writes: evaluate the run again")
    return found


def read_raw_recipe(path: Path) -> Any:
    """A ``recipe.yaml``, not checked; raises UserError."""
    try:
        return parse_yaml(read_within(path, 4 * MOST_YAML).decode())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl`` or ``skipped_steps.jsonl`` that have a step, with an epoch if they have a kind.

    What a crash cut short is passed over, and so is what no run writes.
    """
    rows = []
    for row in read_lines(path):
        measured = "kind" in row
        known = not measured or (isinstance(row["kind"], str) and _is_number(row.get("epoch")))
        if not known or not _is_number(row.get("step")):
            continue
        if measured:
            row = {key: value for key, value in row.items() if value is None or key == "kind" or _is_number(value)}
        rows.append(row)
    return rows


def _json(path: Path, *, finite: bool = True) -> Any:
    try:
        return parse_json(read_within(path), finite=finite)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
