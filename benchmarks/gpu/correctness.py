"""First call: what the machine is, whether the kernels are right, whether a training step is. 170 seconds.

Exit status 1 where something is wrong: then nothing is worth timing.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from common import Archive, parser
from torch import Tensor
from torch.nn import functional as F

from conv2former import ops
from conv2former.doctor import maps
from conv2former.machine import machine_facts

TESTS = Path(__file__).parents[2] / "tests"
GPU_TESTS = ("test_triton.py", "test_synchronisation.py")
FACTOR = 2.0  # of plain PyTorch's error in the same dtype
LOSS_SCALE = 1024.0  # keeps float16's gradients from vanishing


def machine(archive: Archive) -> None:
    """Versions, and what the driver and PyTorch say of the GPU."""
    archive.add(what="machine", **machine_facts())
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
        answer = subprocess.run(["nvidia-smi", query, "--format=csv"], capture_output=True, text=True)
        archive.add(what="nvidia-smi", text=answer.stdout.strip() or answer.stderr.strip())
    if torch.cuda.is_available():
        archive.add(what="properties", text=str(torch.cuda.get_device_properties(0)))


def warm(archive: Archive, *, rehearse: bool) -> None:
    """Fills Triton's cache."""
    from conv2former.ops.triton.warm import warm as compile_ahead

    began = time.monotonic()
    name, size = ("conv2former_test", 32) if rehearse else ("conv2former_t", 224)
    count = compile_ahead(maps(name, size=size, dtype=torch.bfloat16), processes=1 if rehearse else 8)
    archive.add(what="programs compiled", model=name, programs=count, seconds=time.monotonic() - began)


def tests(archive: Archive, *, rehearse: bool) -> bool:
    """The tests that need a GPU; a row for each that fails, as soon as it has."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rfE", "--tb=line", "-p", "no:cacheprovider"]
    with contextlib.suppress(ImportError):
        import xdist  # noqa: F401

        command += ["--numprocesses", "2" if rehearse else "8"]
    command += [str(TESTS / name) for name in GPU_TESTS]
    began, last = time.monotonic(), ""
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(("FAILED", "ERROR", "E ")) or ": AssertionError" in line:
                archive.add(what="test", text=line.strip())
            last = line.strip() or last
    passed = process.returncode == 0 and bool(re.search(r"\d+ passed", last))
    skipped = rehearse and bool(re.search(r"\d+ skipped", last)) and "failed" not in last
    archive.add(what="tests", right=passed or skipped, summary=last, seconds=time.monotonic() - began)
    return passed or skipped


def gradients(model: Any, images: Tensor, labels: Tensor, backend: str, dtype: torch.dtype) -> tuple[float, Tensor]:
    """The loss, and all gradients in one row, in float64."""
    scale = LOSS_SCALE if dtype == torch.float16 else 1.0
    model.zero_grad()
    with ops.use_backend(backend), torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        loss = F.cross_entropy(model(images).float(), labels)
    (loss * scale).backward()
    return loss.item(), torch.cat([p.grad.double().flatten() / scale for p in model.parameters()])


def training_step(archive: Archive, *, rehearse: bool) -> bool:
    """A step of N with the kernels and without, against float32. The layer scale is 1: 1e-6 would hide the blocks."""
    device = "cpu" if rehearse else "cuda"
    name, size, batch = ("conv2former_test", 64, 2) if rehearse else ("conv2former_n", 224, 16)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, ls_init_value=1.0).to(device, memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % 10
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    _, exact = gradients(model, images, labels, "reference", torch.float32)
    right = True
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if rehearse and dtype == torch.float16:
            continue
        errors, losses = {}, {}
        for backend in ("auto", "reference"):
            losses[backend], found = gradients(model, images, labels, backend, dtype)
            errors[backend] = ((found - exact).norm() / exact.norm()).item()
        good = errors["auto"] <= FACTOR * errors["reference"] + 1e-5
        right = right and good
        archive.add(
            what="training step", model=name, dtype=str(dtype), backend=ops.backend_for(device), right=good,
            error=errors["auto"], plain=errors["reference"], losses=losses,
        )  # fmt: skip
    return right


def rehearse_launches(archive: Archive) -> None:
    """A training step whose kernels are chosen, compiled and all but launched; what it computes means nothing."""
    import no_launch

    counts = no_launch.activate()
    model = timm.create_model("conv2former_test", num_classes=10)
    gradients(model, torch.randn(2, 3, 32, 32), torch.arange(2), "triton", torch.bfloat16)
    archive.add(what="rehearsed launches", launched=counts.launched, timed=counts.timed)
    ops.set_backend("auto")


def main() -> None:
    """Runs all; the exit status says whether all is right."""
    options = parser(__doc__).parse_args()
    archive = Archive("correctness", options)
    machine(archive)
    if options.rehearse:
        rehearse_launches(archive)
    warm(archive, rehearse=options.rehearse)
    right = [tests(archive, rehearse=options.rehearse), training_step(archive, rehearse=options.rehearse)]
    archive.add(what="verdict", right=all(right))
    sys.exit(not all(right))


if __name__ == "__main__":
    main()
