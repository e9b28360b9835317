"""What must not change unnoticed: losses, weights, checkpoints, the command line. Stored in ``tests/assets``.

``python tests/nets.py`` writes the files anew, which a change of arithmetic or of the command line needs; the run
folders of an earlier release, ``assets/runs.tar.xz``, stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import typer

ASSETS = Path(__file__).parent / "assets"
TIMING = {"images_per_second", "data_wait", "memory_gb", "seconds"}


def recipes() -> dict[str, Any]:
    """A short run of each task, and the quick start's first two epochs."""
    from conv2former.recipes import load_recipe
    from digits import tiny_recipe
    from runs import EVERYTHING
    from scenes import small_detector, small_segmenter

    return dict(
        classification=tiny_recipe(*EVERYTHING),
        detection=small_detector(),
        segmentation=small_segmenter(),
        quickstart=load_recipe("quickstart", overrides=["schedule.epochs=2", "schedule.warmup_epochs=1"]),
    )


def write_data(root: Path) -> dict[str, Path | None]:
    """The images of these runs."""
    from digits import write_digits
    from scenes import write_coco, write_pairs

    return dict(
        classification=write_digits(root / "digits"),
        detection=write_coco(root / "coco"),
        segmentation=write_pairs(root / "pairs"),
        quickstart=None,
    )


def trained(name: str, root: Path) -> Path:
    """One of the runs."""
    from conv2former.engine.train import train

    train(recipes()[name], data=write_data(root / "data")[name], out=root / name)
    return root / name


def machine() -> dict[str, Any]:
    """On what results are equal to the last bit."""
    return dict(torch=torch.__version__, capability=torch.backends.cpu.get_cpu_capability(), cpu=_cpu())


def _cpu() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return ", ".join(dict.fromkeys(line for line in lines if line.startswith(("vendor_id", "cpu family", "model"))))


def outcome(run: Path) -> dict[str, Any]:
    """A run's figures, and a hash of its last weights."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = [{key: value for key, value in row.items() if key not in TIMING} for row in rows]
    digest = hashlib.sha256((run / "last" / "model.safetensors").read_bytes()).hexdigest()
    return dict(rows=figures, weights=digest)


def checkpoint_keys(run: Path) -> dict[str, Any]:
    """What is in the newest checkpoint: names, with shapes; the optimizer's in one number for each kind of state."""
    newest = max((run / "checkpoints").glob("*.ckpt"))
    content = torch.load(newest, weights_only=True)
    optimizer = content["optimizer"]
    kinds = [key for state in optimizer["state"].values() for key in state]
    groups = [dict(keys=sorted(group), tensors=len(group["params"])) for group in optimizer["param_groups"]]
    content["optimizer"] = dict(state={kind: kinds.count(kind) for kind in kinds}, groups=groups)
    return _described(content)


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return [*value.shape]
    if isinstance(value, dict):
        return {str(key): _described(part) for key, part in value.items()}
    return value if isinstance(value, list) else type(value).__name__


def command_line() -> dict[str, Any]:
    """Every command with its options and their defaults."""
    import conv2former_cli

    return _commands(typer.main.get_command(conv2former_cli.app))


def _commands(command: Any) -> dict[str, Any]:
    if hasattr(command, "commands"):
        return {name: _commands(child) for name, child in sorted(command.commands.items())}
    return {
        "/".join([*parameter.opts, *parameter.secondary_opts]): dict(
            default=repr(parameter.default),
            required=parameter.required,
            multiple=bool(getattr(parameter, "multiple", 0)),
        )
        for parameter in command.params
    }


def write(name: str, content: Any) -> None:
    (ASSETS / f"{name}.json").write_text(json.dumps(content, sort_keys=True, separators=(",", ":")) + "\n")


def stored(name: str) -> Any:
    return json.loads((ASSETS / f"{name}.json").read_text())


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: trained(name, Path(folder) / name) for name in recipes()}
        write("losses", dict(machine=machine(), runs={name: outcome(run) for name, run in runs.items()}))
        write("checkpoints", {name: checkpoint_keys(run) for name, run in runs.items() if name != "quickstart"})
    write("command_line", command_line())
