"""Devices and processes of a run, from the recipe and from what torchrun or SLURM says."""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
from timm.models._manipulate import group_parameters
from torch import nn

from conv2former.config import EngineSection, Recipe
from conv2former.engine.torch_settings import is_nvidia
from conv2former.errors import UserError, one_line

if TYPE_CHECKING:
    import lightning as L

PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "64": "64-true"}
TIMEOUT = timedelta(minutes=30)  # of a collective; a process that died is noticed long before (``processes``)


# How torchrun and srun tell a process which one it is, and of how many. A batch script of SLURM, which is one process,
# has SLURM_NTASKS too: only srun sets the number of tasks of a step.
PLACES = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))


def place() -> tuple[int, int, int]:
    """This process's number, that of all processes, and its number on this machine."""
    for names in PLACES:
        if all(os.environ.get(name, "").isdecimal() for name in names):
            rank, world, local = (int(os.environ[name]) for name in names)
            return rank, world, local
    return 0, 1, 0


def make_fabric(recipe: Recipe) -> L.Fabric:
    """Lightning Fabric for a recipe, not launched yet.

    Raises:
        UserError: Devices that are not there, or settings that exclude each other.
    """
    import lightning as L  # seconds, which predictions do without
    from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy

    # Lightning's tips and device report are left out; our own summary says what matters
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    engine = recipe.engine
    accelerator = _accelerator(engine)
    if accelerator == "cpu" and engine.precision == "16":
        raise UserError("engine.precision=16 needs a GPU: use bf16 on a CPU")  # Lightning would take bf16 in silence
    devices, nodes = _layout(engine)
    _refuse_tasks_that_nobody_starts()
    if devices == "auto" and accelerator == "cpu":
        devices = 1
    several = nodes > 1 or (devices if devices != "auto" else torch.cuda.device_count()) > 1
    strategy: Any = "auto"
    if engine.strategy == "fsdp":
        if recipe.optim.ema_decay:
            raise UserError("optim.ema_decay does not work with engine.strategy=fsdp: use ddp")
        if engine.precision == "16":
            raise UserError("engine.precision=16 does not work with engine.strategy=fsdp: use bf16")
        if several:
            world = nodes * (devices if devices != "auto" else torch.cuda.device_count())
            strategy = ModelParallelStrategy(
                shard,
                data_parallel_size=world,
                tensor_parallel_size=1,
                save_distributed_checkpoint=False,
                timeout=TIMEOUT,
            )
    elif several:
        strategy = DDPStrategy(timeout=TIMEOUT)
    if several and not (port := os.environ.get("MASTER_PORT", "0")).isdecimal():
        raise UserError(f"MASTER_PORT={port} in the environment is no port: give a number, or unset it")
    try:
        return L.Fabric(
            accelerator=accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=strategy,
            precision=PRECISIONS[engine.precision],
        )
    except Exception as error:  # Lightning has several kinds for devices that are not there
        raise UserError(
            f"engine.accelerator={engine.accelerator} with engine.devices={engine.devices}: {one_line(error)}"
        ) from None


def on_nvidia_gpu(recipe: Recipe) -> bool:
    """Whether ``make_fabric`` would take an NVIDIA GPU here."""
    return is_nvidia(torch.device(_accelerator(recipe.engine)))


def _accelerator(engine: EngineSection) -> Literal["cpu", "cuda"]:
    if engine.accelerator == "auto":  # Lightning's own choice may fall on Apple's MPS, which lacks float64
        return "cuda" if torch.cuda.is_available() else "cpu"
    return engine.accelerator


def _layout(engine: EngineSection) -> tuple[Any, int]:
    """Processes per machine and machines: torchrun's or SLURM's where one of them has started this process."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        devices = _count("LOCAL_WORLD_SIZE")
        found, by = (devices, _count("WORLD_SIZE") // devices), "torchrun"
    elif "SLURM_NTASKS" in environment and environment.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        nodes = _count("SLURM_NNODES", "1")
        found, by = (_count("SLURM_NTASKS") // nodes, nodes), "SLURM"
    else:
        return engine.devices, 1 if engine.nodes == "auto" else engine.nodes
    for name, given, real in (("devices", engine.devices, found[0]), ("nodes", engine.nodes, found[1])):
        if given not in ("auto", real):
            raise UserError(f"engine.{name}={given}, but {by} has started {real}: add --set engine.{name}=auto")
    return found


def _refuse_tasks_that_nobody_starts() -> None:
    """A batch script of SLURM is one process of a job of several tasks: the others would be waited for."""
    environment = os.environ
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    started = {"SLURM_STEP_NUM_TASKS", "TORCHELASTIC_RUN_ID"} & environment.keys()  # the first is set by srun alone
    if "SLURM_NTASKS" in environment and not interactive and not started and (tasks := _count("SLURM_NTASKS")) > 1:
        raise UserError(
            f"this SLURM job has {tasks} tasks, and srun has not started this process: write srun before the command, "
            "or ask for one task (#SBATCH --ntasks=1)"
        )


def _count(name: str, absent: str = "") -> int:
    """A number of processes or machines in the environment."""
    value = os.environ.get(name, absent)
    if not value.isdecimal() or not int(value):
        raise UserError(f"{name}={value} in the environment is no number of processes: start with torchrun or srun")
    return int(value)


def world_size(recipe: Recipe) -> int:
    """Processes of ``make_fabric``."""
    devices, nodes = _layout(recipe.engine)
    if devices == "auto":
        devices = torch.cuda.device_count() if _accelerator(recipe.engine) == "cuda" else 1
    return max(devices * nodes, 1)


def shard(task: Any, mesh: Any) -> nn.Module:
    """FSDP: every block, then the rest, has its weights sharded and gathered when it computes."""
    from torch.distributed.fsdp import fully_shard

    network: Any = task.get_submodule("model")
    for child in task.children():  # the strategy moves what is sharded alone
        if child is not network:
            child.to(mesh.device_type)
    own, called = blocks(task.backbone), task.sharded_blocks
    for name in own if called is None else sorted(called):
        fully_shard(own[name], mesh=mesh["data_parallel"])
    fully_shard(network, mesh=mesh["data_parallel"])
    return task


def blocks(network: Any) -> dict[str, nn.Module]:
    """The repeated parts of a network with timm's ``group_matcher``, as its layer-wise decay knows them, by name."""
    if not hasattr(network, "group_matcher"):
        return {}
    found: dict[str, nn.Module] = {}
    for names in group_parameters(network, network.group_matcher(coarse=False)).values():
        for name in names:
            parts = name.split(".")
            # the outermost entry of a list that lies in this group whole
            for end in [end for end, part in enumerate(parts) if part.isdecimal()]:
                path = ".".join(parts[: end + 1])
                block = network.get_submodule(path)
                if any(block.children()) and {f"{path}.{own}" for own, _ in block.named_parameters()} <= set(names):
                    found[path] = block
                    break
    return found
