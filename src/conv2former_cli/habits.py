"""What people type out of habit (``--epochs 5``, ``lr=1e-3``, ``train finetune``), in the words of ``train``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from conv2former_cli.common import say

# words of other tools whose setting has another name
ALIASES = {
    "lr": "optim.base_lr",
    "learning_rate": "optim.base_lr",
    "b": "optim.batch_size",
    "bs": "optim.batch_size",
    "batch": "optim.batch_size",
    "wd": "optim.weight_decay",
    "opt": "optim.name",
    "optimizer": "optim.name",
    "img_size": "data.input_size",
    "image_size": "data.input_size",
    "imgsz": "data.input_size",
    "size": "data.input_size",
    "num_workers": "data.workers",
    "j": "data.workers",
    "gpus": "engine.devices",
    "num_gpus": "engine.devices",
    "device": "engine.accelerator",
    "warmup": "schedule.warmup_epochs",
    "drop_path": "model.drop_path_rate",
}


class TrainCommand(TyperCommand):
    """Takes settings without ``--set``, a recipe or folder without its option, and ``--resume`` without a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts in what was left out, and says so."""
        options = {name: parameter for parameter in self.params for name in parameter.opts}
        full: list[str] = []
        rest = [*args]
        while rest:
            word = rest.pop(0)
            name, equals, value = word.partition("=")
            known = options.get(name)
            if name == "--resume" and not equals and (not rest or rest[0] not in ("yes", "auto")):
                full.append("--resume=yes")
            elif known is not None or name in ("-h", "--help"):
                full.append(word)
                if known is not None and not equals and not getattr(known, "is_flag", False) and rest:
                    full.append(rest.pop(0))
            elif setting := _setting(name.lstrip("-")) if name.startswith("-") or equals else None:
                if not equals:
                    value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
                full += _said("--set", f"{setting}={value}")
            elif not name.startswith("-") and (option := _option(word)):
                full += _said(option, word)
            else:
                if name.startswith("--") and (near := _near(name, options)):
                    say(f"there is no option {name}; did you mean {near}?")
                full.append(word)
        return super().parse_args(ctx, full)


def _said(option: str, value: str) -> list[str]:
    say(f"taken as {option} {value}")
    return [option, value]


def _option(word: str) -> str | None:
    """The option that a word alone may stand for."""
    if Path(word).is_dir():
        return "--data"
    from conv2former.recipes.load import recipe_names

    return "--recipe" if word in recipe_names() or word.endswith((".yaml", ".yml")) else None


def _settings() -> set[str]:
    """All that recipes may say, ``section.key``."""
    from conv2former.tasks import TASKS, task_class

    return {
        f"{section}.{key}"
        for task in TASKS
        for section, field in task_class(task).config_class.model_fields.items()
        for key in getattr(field.annotation, "model_fields", {})
        if section != "claim"
    }


def _near(name: str, options: Iterable[str]) -> str | None:
    """The option or setting whose name is nearly that of an unknown one."""
    settings = [f"--{key.partition('.')[2].replace('_', '-')}" for key in _settings()]
    return next(iter(difflib.get_close_matches(name, {*options, *settings}, n=1, cutoff=0.75)), None)


def _setting(word: str) -> str | None:
    """The setting ``section.key`` that a word means; None where there is none, or several."""
    word, known = word.replace("-", "_"), _settings()
    word = ALIASES.get(word, word)
    found = [word] if word in known else [key for key in known if key.partition(".")[2] == word]
    return found[0] if len(found) == 1 else None
