"""Where the metrics of a run go while it goes on."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import lightning.pytorch.loggers as lightning_loggers
import torch
from torch.utils.tensorboard import SummaryWriter

from conv2former.config import LoggerSection, Recipe
from conv2former.engine.run_dir import RunDir
from conv2former.errors import UserError, failing, nearest_or_all, one_line, say


class RunLog:
    """``metrics.jsonl``, ``metrics.csv`` and TensorBoard, and Lightning's loggers that the recipe names.

    Args:
        run: The run folder.
        recipe: Names further loggers; all of them get its settings.
        step: Steps done before; None for a new run.
        enabled: Off on all processes but one.

    Raises:
        UserError: A logger whose package is not installed, or that does not start.
    """

    def __init__(self, run: RunDir, recipe: Recipe, *, step: int | None, enabled: bool) -> None:
        self.run, self.enabled = run, enabled
        self.loggers: list[Any] = []
        if not enabled:
            return
        self.tensorboard = SummaryWriter(str(run.path / "tensorboard"), purge_step=None if step is None else step + 1)
        for section in recipe.engine.loggers:
            logger = _lightning_logger(section, run)
            logger.log_hyperparams(recipe.model_dump(mode="json"))
            self.loggers.append(logger)

    def row(self, kind: str, *, step: int, epoch: float, **values: Any) -> dict[str, Any]:
        """One row of metrics; what is None is not known and not drawn."""
        row = dict(kind=kind, step=step, epoch=round(epoch, 4)) | values
        if self.enabled:
            self.run.add_row(row)
            known = {f"{kind}/{name}": value for name, value in values.items() if value is not None}
            for name, value in known.items():
                self.tensorboard.add_scalar(name, value, step)
            for logger in [*self.loggers]:
                self._try(logger, "log_metrics", known, step=step)
        return row

    def flush(self) -> None:
        """Has what was logged so far written, as a checkpoint is about to say that it was."""
        if self.enabled:
            self.tensorboard.flush()

    def _try(self, logger: Any, method: str, *args: Any, **options: Any) -> None:
        """A service that fails does not end a training: its logger is left out from then on."""
        try:
            getattr(logger, method)(*args, **options)
        except Exception as error:
            say(f"{type(logger).__name__} fails and is left out: {one_line(error)}")
            self.loggers.remove(logger)

    def close(self, status: str) -> None:
        """Writes what is left; ``status`` is 'success' or 'failed', as Lightning's loggers know it."""
        if self.enabled:
            self.tensorboard.close()
            for logger in [*self.loggers]:
                self._try(logger, "finalize", status)


def check_loggers(sections: list[LoggerSection]) -> None:
    """Refuses loggers that Lightning does not have, before anything is made.

    Raises:
        UserError: The message names the nearest one.
    """
    names = [name for name in lightning_loggers.__all__ if name != "Logger"]
    for section in sections:
        if section.name not in names:
            hint = nearest_or_all(section.name, names)
            raise UserError(f"engine.loggers: unknown logger {section.name!r}{hint}")


def _lightning_logger(section: LoggerSection, run: RunDir) -> Any:
    kind = getattr(lightning_loggers, section.name)
    folder = run.path / "loggers"
    folder.mkdir(exist_ok=True)
    where = {"save_dir": str(folder)} if "save_dir" in inspect.signature(kind).parameters else {}
    with failing(f"engine.loggers: {section.name} does not start"):  # no package, no service, unknown arguments
        return kind(**(where | section.args))


def peak_memory_gb(device: torch.device) -> float:
    """The most memory taken so far in gigabytes: of a GPU by tensors, else of this process; not a number on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # on Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9  # macOS counts bytes, Linux kibibytes
