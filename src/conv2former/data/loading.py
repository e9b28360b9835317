"""Samples to read and batch under keyed randomness, for every task.

Workers hand out 8-bit images, a quarter of the bytes of normalised ones; ``Normalizer`` turns a whole batch into what
the network sees, on the network's device (as timm's prefetching loader does).
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils import signal_handling

from conv2former.data import activity
from conv2former.data.images import MAX_PIXELS, BadImage
from conv2former.data.sampling import Purpose, SampleKey, seed_cpu
from conv2former.errors import UserError, one_line

CPU = torch.device("cpu")
PATIENCE = 1.0  # seconds between looks at whatever may end the wait for a batch
REPLACEMENTS = 16  # images tried in place of a broken one

KILLED_READER = (
    "a process that reads images was killed, most likely because memory ran out: lower the number of workers or "
    "data.max_pixels, and start a container with docker run --shm-size=8g; a training continues with --resume"
)
NO_SHARED_MEMORY = (
    "/dev/shm has no room for the images: lower --set data.workers=N or optim.batch_size, or start the container with "
    "docker run --shm-size=8g; a training continues with --resume"
)


class AnyBatch(Protocol):
    """What the engine knows of a batch of any task."""

    @property
    def indices(self) -> Tensor: ...  # (B,), numbers of the images in their source

    @property
    def bad(self) -> tuple[BadImage, ...]: ...  # images that could not be read and were replaced


class KeyedDataset(Dataset):
    """Samples of a source, prepared under the random numbers of their key.

    A broken image comes out as its ``BadImage``, so that a worker process does not turn it into a traceback.

    Args:
        source: Where the images are; anything with a length that ``read`` can read.
        seed: Of the run.
        on_bad_image: 'error' gives out the ``BadImage``; 'replace' the next image that can be read, with it (the same
            one whenever the key is the same); 'mask' a blank one that does not count, with it.
        max_pixels: Larger images count as broken.
    """

    def __init__(
        self,
        source: Any,
        *,
        seed: int = 0,
        on_bad_image: Literal["error", "replace", "mask"] = "error",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.source, self.seed, self.on_bad_image, self.max_pixels = source, seed, on_bad_image, max_pixels

    def read(self, index: int) -> Any:
        """The image with that number, whatever the task needs of it; raises BadImage."""
        return self.source.load(index, self.max_pixels)

    def prepare(self, content: Any, index: int, *, counted: bool) -> Any:
        """What goes into a batch, of what ``read`` gave; of nothing (None) a blank image that does not count."""
        raise NotImplementedError

    def join(self, samples: Sequence[Any], indices: Tensor, bad: tuple[BadImage, ...]) -> Any:
        """A batch of what ``prepare`` gave."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey) -> tuple[Any, int, list[BadImage]] | BadImage:
        bad: list[BadImage] = []
        index, counted, content = key.image, not key.padding, None
        while True:
            try:
                activity.reading(self.source.name(index))
                content = self.read(index)
                break
            except BadImage as error:
                bad.append(error)
                if self.on_bad_image == "error" or len(bad) > REPLACEMENTS:
                    return error
                if self.on_bad_image == "mask":
                    counted = False
                    break
                index = (index + 1) % len(self)
        seed_cpu(Purpose.AUGMENT, self.seed, key.epoch, key.image)
        return self.prepare(content, index, counted=counted), index, bad

    def collate(self, samples: list[Any]) -> Any:
        """A batch, or the first broken image in it."""
        for sample in samples:
            if isinstance(sample, BadImage):
                return sample
        contents, indices, bad = zip(*samples, strict=True)
        batch = self.join(contents, torch.tensor(indices), tuple(error for errors in bad for error in errors))
        return batch if get_worker_info() is None else _shared(batch)


class Normalizer(nn.Module):
    """8-bit images (B, 3, H, W) to what a network expects: scaled to 0..1, minus mean, over std, in float32."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, 255 * torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) of uint8 to the same of floats, in the same layout."""
        if not images.is_contiguous(memory_format=torch.channels_last):
            return images.to(self.mean.dtype).sub_(self.mean).div_(self.std)
        # by rows: a broadcast over the three innermost numbers would leave a CPU's vector units idle
        width = images.shape[3]
        rows = images.permute(0, 2, 3, 1).flatten(2).to(self.mean.dtype)
        rows.sub_(self.mean.flatten().repeat(width)).div_(self.std.flatten().repeat(width))
        return rows.unflatten(2, (width, 3)).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class _NoSharedMemory:
    """Comes in the place of a batch that cannot be handed over."""

    reason: str


def _shared(batch: Any) -> Any:
    """The batch in shared memory, here where a failure can be reported: PyTorch's own thread would drop the batch."""
    from lightning.fabric.utilities.apply_func import apply_to_collection  # seconds, which predictions do without

    activity.doing("handing over a batch")
    try:
        return apply_to_collection(batch, Tensor, Tensor.share_memory_)
    except RuntimeError as error:
        return _NoSharedMemory(one_line(error)[:200])


def checked(batch: Any) -> Any:
    """The batch; raises what has come in its place in the process that asked for it."""
    if isinstance(batch, _NoSharedMemory):
        raise UserError(f"{NO_SHARED_MEMORY} ({batch.reason})")
    if isinstance(batch, BadImage):
        # a new one: raised, the value itself would hold on to the frames that hold the loader, whose workers then end
        # by the garbage collector alone, which takes PyTorch ten seconds for each
        raise BadImage(batch.file, batch.reason)
    return batch


def killed_reader(error: Exception) -> UserError | None:
    """The message for the user if a loader's error means that a process that reads images was killed, else None.

    PyTorch's signal handler would raise again, at any moment, for each further process that ends. It is removed here;
    the next loader sets it again.
    """
    if not isinstance(error, (ConnectionError, EOFError)) and "DataLoader worker (pid" not in str(error):
        return None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal_handling._SIGCHLD_handler_set = False
    return UserError(KILLED_READER)


class Batches:
    """The batches of a loader on a device.

    Args:
        loader: One of this module's.
        device: Where to.
        meanwhile: Called every second while a batch is waited for; what it raises ends the wait.
    """

    def __init__(self, loader: DataLoader, device: torch.device, meanwhile: Callable[[], None] = lambda: None) -> None:
        from lightning.fabric.utilities import move_data_to_device

        self.device, self.meanwhile, self.patience = device, meanwhile, 5  # readers may have to start
        self.move = move_data_to_device
        # PyTorch waits for readers that stay between two passes with the same limit, where nobody could go on waiting
        if (kept := getattr(loader, "_iterator", None)) is not None:
            kept._timeout = 0
        self.batches: Any = iter(loader)
        if loader.num_workers:
            self.batches._timeout = PATIENCE

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while True:
            try:
                batch = self.move(checked(next(self.batches)), self.device)
                self.patience = 1
                return batch
            except RuntimeError as error:
                if "DataLoader timed out" not in str(error):
                    raise
            self.meanwhile()


# it counts the processors of this process; the progress line shows whether reading is too slow
warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)


def keyed_loader(dataset: KeyedDataset, *, workers: int, device: torch.device = CPU, **options: Any) -> DataLoader:
    """PyTorch's loader of what a sampler asks for; its ``options`` are ``batch_sampler``, or ``sampler`` and a size."""
    if workers:
        atexit.unregister(_kill_workers)
        atexit.register(_kill_workers)  # after multiprocessing's own, hence before it when the process ends
    options |= dict(num_workers=workers, persistent_workers=workers > 0)
    start = functools.partial(_start_worker, board=activity.current(), first=activity.reserve(workers))
    options |= dict(worker_init_fn=start)
    return DataLoader(dataset, collate_fn=dataset.collate, pin_memory=device.type == "cuda", **options)


def _start_worker(worker: int, *, board: activity.Board | None, first: int) -> None:
    signal.set_wakeup_fd(-1)  # the training process's
    sys.excepthook = _unless_disconnected
    activity.announce(board, activity.slot(first + worker))
    activity.doing("waiting for work")
    # they reach the whole process group; the training process stops the workers when its step is done
    for number in activity.STOPS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def _unless_disconnected(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Nobody needs the traceback of a reader whose training process is gone."""
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _kill_workers() -> None:
    """Ends workers that are left when the process ends: they ignore Python's SIGTERM, and it would wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would take it for an accident
    for process in multiprocessing.active_children():
        if process.daemon:  # which Python would end, too
            process.kill()
