"""The tasks. ``TASKS`` is the only table of them; a task of your own comes in by an entry point or by ``register``."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conv2former.checkpoints.exported import ExportedNetwork, is_exported
from conv2former.checkpoints.hub import saved_task
from conv2former.errors import UserError, one_line

if TYPE_CHECKING:
    from conv2former.tasks.base import Task

__all__ = ["TASKS", "load", "register", "set_options", "task_class", "task_names"]

REQUIRED = ("name", "config_class", "monitor", "reported", "words")  # of a task's class
GROUP = "conv2former.tasks"  # of entry points, NAME = "MODULE:CLASS"
TASKS: dict[str, Any] = dict(
    classification="conv2former.tasks.classification.task:ClassificationTask",
    detection="conv2former.tasks.detection.task:DetectionTask",
    segmentation="conv2former.tasks.segmentation.task:SegmentationTask",
)


def register(task: type[Task]) -> type[Task]:
    """Adds a task under its name; a decorator for its class. ``conv2former --import MODULE`` imports your module."""
    _check(task)
    known = TASKS.get(task.name, task)
    other, own = known if isinstance(known, str) else _place(known), _place(task)
    if other != own:  # the same class again comes from a reload or a notebook
        raise UserError(f"there is a task of the name {task.name!r} already, {other}: give {own} another")
    TASKS[task.name] = task
    return task


def _place(task: type[Task]) -> str:
    return f"{task.__module__}:{task.__qualname__}"


def _check(task: Any) -> None:
    from conv2former.tasks.base import Task  # with PyTorch, which lists of names do without

    if not (isinstance(task, type) and issubclass(task, Task)):
        raise UserError(f"{task!r} is no task: a class on conv2former.tasks.base.Task is needed")
    missing = [name for name in REQUIRED if getattr(task, name, None) is None] + sorted(task.__abstractmethods__)
    if missing:
        raise UserError(f"the task {_place(task)} lacks {', '.join(missing)}")


def task_names() -> list[str]:
    """All that are known."""
    return [*TASKS, *(point.name for point in entry_points(group=GROUP) if point.name not in TASKS)]


def task_class(name: str) -> type[Task]:
    """A task by its name; the others, and the libraries that they need, are not imported.

    Raises:
        UserError: No such task, or one that cannot be imported.
    """
    found: Any = TASKS.get(name)
    if found is None:
        points = entry_points(group=GROUP, name=name)
        if not points:
            raise UserError(
                f"unknown task {name!r}; there are: {', '.join(task_names())} (conv2former --import MODULE adds one of "
                "your own)"
            )
        try:
            found = next(iter(points)).load()
        except (Exception, SystemExit) as error:  # whatever somebody's module raises
            raise UserError(f"the task {name!r} cannot be imported: {one_line(error)}") from error
        _check(found)
        if found.name != name:
            raise UserError(f"the entry point {name!r} gives the task {found.name!r}: they need the same name")
    elif isinstance(found, str):
        module, _, attribute = found.partition(":")
        found = getattr(import_module(module), attribute)
    TASKS[name] = found
    return found


def load(path: Path | str) -> Task:
    """The model of a run folder, a saved model, a folder in timm's layout or an exported file, in evaluation mode.

    Raises:
        UserError: No such folder, a damaged file, weights that do not fit, an unknown task.
    """
    if is_exported(Path(path)):
        network = ExportedNetwork(Path(path))
        return task_class(network.facts["task"]).of_exported(network)
    return task_class(saved_task(path)).load(Path(path))


def set_options(task: Task, **given: Any) -> None:
    """Sets what the user has chosen of ``task.options``; None is no choice.

    Raises:
        UserError: The task does not know an option.
    """
    for name, value in given.items():
        if value is None:
            continue
        if name not in task.options:
            known = [other for other in task_names() if other in TASKS and name in task_class(other).options]
            raise UserError(
                f"--{name.replace('_', '-')} is for {' and '.join(known)}, this is a {task.name} model: leave it out"
            )
        setattr(task, name, value)
