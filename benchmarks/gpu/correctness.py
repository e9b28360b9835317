"""First call: what the machine is, whether the kernels are right, whether a training step is. 170 seconds.

Exit status 1 where something is wrong: then nothing is worth timing.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from common import Archive, parser
from torch import Tensor
from torch.nn import functional as F

from conv2former import ops
from conv2former.engine.machine import machine_facts
from conv2former.tools.doctor import maps

TESTS = Path(__file__).parents[2] / "tests"
FACTOR = 2.0  # of plain PyTorch's error in the same dtype
SMALL = 2e-5  # of the gradient: where plain PyTorch happens to be exact
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = {f"{name}_kernel" for name in ("pad", "pad_backward", "convolution", "weight_gradient", "three_rows")}
LOSS_SCALE = 1024.0  # keeps float16's gradients from vanishing


def machine(archive: Archive) -> None:
    """Versions, and what the driver and PyTorch say of the GPU."""
    commit = Path(__file__).parents[2] / ".gpu" / "commit"  # of prepare.sh: the copy may have no git
    archive.add(
        what="machine", prepared_from=commit.read_text().strip() if commit.exists() else None, **machine_facts()
    )
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
        answer = subprocess.run(["nvidia-smi", query, "--format=csv"], capture_output=True, text=True)
        archive.add(what="nvidia-smi", text=answer.stdout.strip() or answer.stderr.strip())
    if torch.cuda.is_available():
        archive.add(what="properties", text=str(torch.cuda.get_device_properties(0)))


def warm(archive: Archive, *, rehearse: bool) -> None:
    """Fills Triton's cache with what the training step here and the second call need."""
    from conv2former.ops.triton.warm import warm as compile_ahead

    began = time.monotonic()
    if rehearse:
        needed = maps("conv2former_test", size=32, dtype=torch.bfloat16)
    else:
        needed = maps("conv2former_t", size=224, dtype=torch.bfloat16)
        needed += [each for dtype in DTYPES for each in maps("conv2former_n", size=224, dtype=dtype)]
    count = compile_ahead(needed, processes=1 if rehearse else os.cpu_count() or 8)
    archive.add(what="programs compiled", programs=count, seconds=time.monotonic() - began)


def tests(archive: Archive, name: str, *, rehearse: bool) -> bool:
    """The tests of a file that need a GPU; a row for each that fails, as soon as it has. None may be skipped."""
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "--tb=line", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["--numprocesses", "2" if rehearse else str(os.cpu_count() or 8)]
    if not archive.has_time(20, name):
        return False
    began, summary = time.monotonic(), ""
    with subprocess.Popen(
        [*command, str(TESTS / name)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        timer = threading.Timer(max(archive.left() - 5, 1), os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if re.search(r"\b(FAILED|ERROR)\b|AssertionError", line):
                archive.add(what="test", text=line.strip())
            if re.search(r"\d+ (passed|failed|skipped|error)", line):
                summary = line.strip(" =\n")
        timer.cancel()
    right = process.returncode == 0 and ("skipped" in summary if rehearse else "skipped" not in summary)
    archive.add(
        what="tests", file=name, right=right, summary=summary, status=process.returncode,
        seconds=time.monotonic() - began,
    )  # fmt: skip
    return right


def gradients(model: Any, images: Tensor, labels: Tensor, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Of all parameters, in float64. Whatever dtype is computed in, the parameters stay what they are."""
    scale = LOSS_SCALE if dtype == torch.float16 else 1.0
    model.zero_grad()
    autocast = dtype in (torch.bfloat16, torch.float16)
    with ops.use_backend(backend), torch.autocast(images.device.type, dtype if autocast else None, enabled=autocast):
        loss = F.cross_entropy(model(images).to(torch.promote_types(dtype, torch.float32)), labels)
    (loss * scale).backward()
    return [p.grad.double() / scale for p in model.parameters()]


def compare(ours: list[Tensor], plain: list[Tensor], exact: list[Tensor], names: list[str]) -> list[tuple[float, str]]:
    """Of each parameter our error over what is allowed, the largest first: above 1 something is wrong.

    Allowed is twice plain PyTorch's error, and a small part of the gradient. One norm over all parameters would hide
    depthwise weights, whose gradients are small. What is not finite counts as infinitely wrong.
    """
    found = []
    for mine, theirs, true, name in zip(ours, plain, exact, names, strict=True):
        allowed = (FACTOR * (theirs - true).norm() + SMALL * true.norm() + 1e-12).item()
        error = (mine - true).norm().item()
        found.append((error / allowed if math.isfinite(error) and math.isfinite(allowed) else math.inf, name))
    return sorted(found, reverse=True)


def training_step(archive: Archive, *, rehearse: bool) -> bool:
    """A step of N with the kernels and without, against float64. The layer scale is 1: 1e-6 would hide the blocks."""
    device = "cpu" if rehearse else "cuda"
    name, size, batch = ("conv2former_test", 64, 2) if rehearse else ("conv2former_n", 224, 16)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, ls_init_value=1.0).to(device, memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % 10
    names = [name for name, _ in model.named_parameters()]
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    exact = gradients(copy.deepcopy(model).double(), images.double(), labels, "reference", torch.float64)
    right = True
    for dtype in DTYPES[: 2 if rehearse else 3]:
        plain = gradients(model, images, labels, "reference", dtype)
        with counted_launches() as launches:
            ours = gradients(model, images, labels, "auto", dtype)
        worst = compare(ours, plain, exact, names)
        ran = rehearse or set(launches) == KERNELS
        good = ran and worst[0][0] <= 1
        right = right and good
        archive.add(
            what="training step", model=name, dtype=str(dtype), backend=ops.backend_for(device), right=good,
            launches=launches, of_allowed=worst[:3],
        )  # fmt: skip
    return right


@contextlib.contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """Counts the launches of each kernel: plain PyTorch compared with itself is always right."""
    from conv2former.ops.triton import large_kernel, three_rows

    count, launch = Counter[str](), large_kernel.launch

    def counting(kernel: Any, *args: Any, **constants: Any) -> None:
        count[kernel.__name__] += 1
        launch(kernel, *args, **constants)

    large_kernel.launch = three_rows.launch = counting
    try:
        yield count
    finally:
        large_kernel.launch = three_rows.launch = launch


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
    right = True
    for part in (warm, training_step):
        try:
            right = part(archive, rehearse=options.rehearse) is not False and right
        except Exception as error:  # the tests, in processes of their own, tell which kernel it was
            right = False
            archive.add(what=part.__name__, right=False, error=f"{type(error).__name__}: {error}"[:500])
    right = tests(archive, "test_triton.py", rehearse=options.rehearse) and right
    tests(archive, "test_synchronisation.py", rehearse=options.rehearse)  # says nothing about the kernels
    archive.add(what="verdict", right=right)
    sys.exit(not right)


if __name__ == "__main__":
    main()
