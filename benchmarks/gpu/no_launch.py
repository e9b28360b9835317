"""A driver with which Triton does all that it does for a GPU, on a machine without one, except to launch.

``activate()`` makes the driver Triton's. From then on a kernel that is called with tensors of the CPU is specialised,
tuned and compiled for a GPU of compute capability 9.0, by the real compiler and assembler. Its outputs stay as they
were: nothing is computed. So mistyped names, missing configurations and spills show, and the time that a call takes on
the host can be measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

PROCESSORS = 132  # of an H200, as are the other figures
PROPERTIES = dict(
    max_shared_mem=232448,
    max_num_regs=65536,
    multiprocessor_count=PROCESSORS,
    warpSize=32,
    sm_clock_rate=1980000,
    mem_clock_rate=3201000,
    mem_bus_width=6144,
)


class Counts:
    """What was compiled, launched and timed by the tuner, by the kernel's name."""

    def __init__(self) -> None:
        self.compiled: Counter[str] = Counter()
        self.launched: Counter[str] = Counter()
        self.timed = 0


class Utils:
    """What Triton asks the CUDA driver."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    def load_binary(self, name: str, *_: Any) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills and threads of a block."""
        self._counts.compiled[name] += 1
        return 1, 2, 100, 0, 1024

    def unload_module(self, *_: Any) -> None:
        """There is none."""

    def get_device_properties(self, *_: Any) -> dict[str, int]:
        """Of an H200."""
        return PROPERTIES


class NoLaunch(DriverBase):
    """Triton's driver for a GPU that is not there."""

    def __init__(self, counts: Counts) -> None:
        class Launcher:
            def __init__(self, src: Any, metadata: Any) -> None:
                self._name = metadata["name"] if isinstance(metadata, dict) else metadata.name

            def __call__(self, *_: Any) -> None:
                counts.launched[self._name] += 1

        self.utils = Utils(counts)
        self.launcher_cls = Launcher
        self._counts = counts
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None
        self.get_current_stream = lambda device=None: 0
        self.get_device_capability = lambda device=0: (9, 0)

    @staticmethod
    def is_active() -> bool:
        """Whether it could be chosen by Triton itself."""
        return False

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        """Asked for by some releases; nothing of it is used."""
        return torch.cuda

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Asked for where a launcher is built."""
        return ty

    def get_benchmarker(self) -> Callable[..., float]:
        """The tuner's clock: every configuration takes the same time, so that the first one is chosen."""

        def same(call: Callable[[], Any], *_: Any, **__: Any) -> float:
            self._counts.timed += 1
            call()
            return 1.0

        return same

    def get_empty_cache_for_benchmark(self) -> None:
        """Nothing is timed."""

    def clear_cache(self, cache: Any) -> None:
        """Nothing is timed."""


def activate() -> Counts:
    """Makes it Triton's driver, and has the operations on the CPU computed (that is, not computed) by Triton.

    Returns:
        Counts that go on counting.
    """
    from conv2former import ops
    from conv2former.ops import triton as kernels
    from conv2former.ops.triton import large_kernel, three_rows

    counts = Counts()
    triton.runtime.driver.set_active(NoLaunch(counts))
    kernels.unusable = lambda device: None
    for module in (large_kernel, three_rows):
        module.processors = lambda x: PROCESSORS
    ops.set_backend("triton")
    return counts
