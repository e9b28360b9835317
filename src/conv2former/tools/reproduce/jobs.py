"""The trainings behind a table: which there are, which have been measured, and how one is run."""

from __future__ import annotations

import ctypes
import hashlib
import math
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import safe_open

from conv2former.config import Recipe
from conv2former.engine.run_dir import RunDir
from conv2former.engine.signals import RESUME_ME, stops
from conv2former.errors import UserError, attempt, nearest_or_all, say
from conv2former.files import append_line, read_lines, replace_text
from conv2former.tasks import task_class
from conv2former.tools.reproduce.scales import Scale, at_scale
from conv2former.tools.reproduce.tables import PaperRow, PaperTable

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of batch norms: no parameters
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
        table: Key of ``TABLES``.
        data: Images of the rows; None to train nothing and render what there is.
        pretraining_data: Images of the recipes that the rows' weights come from.
        scale: 'full' or 'small'.
        seeds: Trainings of each row, with seeds 0, 1, ...
        out: Folder for runs, measured rows and tables.
        only: Names of rows; none for all.
        settings: Changes ``section.key=value`` to the recipe of every row.
    """

    table: str
    data: Path | None = None
    pretraining_data: Path | None = None
    scale: Scale = "small"
    seeds: int = 1
    out: Path = Path("reproduction")
    only: Sequence[str] = ()
    settings: Sequence[str] = ()

    @property
    def measured(self) -> Path:
        """The file of measured rows."""
        return self.out / "rows.jsonl"


@dataclass(frozen=True)
class Job:
    """One training."""

    recipe: Recipe  # with the seed in it
    data: Path | None  # None where the images are not known
    run: Path  # its folder
    after: Job | None = None  # the training whose weights it starts from
    row: PaperRow | None = None  # None for a pre-training

    @property
    def key(self) -> str:
        """A hash of all settings, with those of the training before; where the weights lie makes no difference."""
        model = self.recipe.model.model_copy(update=dict(weights=None))
        own = self.recipe.model_copy(update=dict(model=model)).digest()
        return hashlib.sha256(f"{own}{self.after.key}".encode()).hexdigest()[:16] if self.after else own


@dataclass
class Outcome:
    """What came of the jobs of a table."""

    trained: int = 0  # jobs that were measured now
    skipped: int = 0  # those that had been measured
    failed: dict[Path, str] = field(default_factory=dict)  # a line for each run that could not be trained


class Stopped(Exception):
    """A training was asked to stop; its state is saved. ``code`` is the training's exit status."""

    def __init__(self, code: int) -> None:
        super().__init__("stopped with the state saved: the same command goes on from there")
        self.code = code


class Images:
    """Hashes of the images that jobs are trained on, each computed once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path | None, str], str] = {}

    def digest(self, job: Job) -> str:
        """The same for all seeds, even where a seed decides which images are held out; raises UserError."""
        key = job.data, job.recipe.data.model_dump_json()
        if key not in self._known:
            engine = job.recipe.engine.model_copy(update=dict(seed=0))
            recipe = job.recipe.model_copy(update=dict(engine=engine))
            self._known[key] = task_class(recipe.task).open_splits(recipe, job.data).digest()
        return self._known[key]


def table_jobs(request: Request, table: PaperTable, images: Images) -> list[Job]:
    """The trainings of the rows that have a recipe at this scale, seed after seed.

    Raises:
        UserError: No such row or scale, a setting that a recipe does not take, images that cannot be used.
    """
    if table.only_full and request.scale == "small":
        raise UserError(f"{request.table} has no small scale: {table.only_full}; use --scale full")
    for setting in request.settings:
        if setting.partition("=")[0].strip() in ("model.weights", "engine.seed"):
            raise UserError(f"--set {setting}: rows have weights and seeds of their own, leave it out")
    names = [row.name for row in table.rows if row.recipe]
    for name in request.only:
        if name not in names:
            hint = nearest_or_all(name, names)
            raise UserError(f"no row {name!r} can be trained{hint}")
    rows = [row for row in table.rows if row.recipe and (not request.only or row.name in request.only)]
    jobs = [_job(request, row, seed, images) for seed in range(request.seeds) for row in rows]
    return [job for job in jobs if job]


def _job(request: Request, row: PaperRow, seed: int, images: Images) -> Job | None:
    recipe = at_scale(str(row.recipe), row.model, request.scale, [*request.settings, f"engine.seed={seed}"])
    if recipe is None:
        return None
    after = None
    if recipe.model.weights:  # as the recipes name them: runs/RECIPE
        before = Path(recipe.model.weights).name
        if request.data is not None and request.pretraining_data is None:
            raise UserError(f"{row.name} starts from {before}: name the images of that with --pretraining-data")
        first = at_scale(before, row.model, request.scale, [f"engine.seed={seed}"])
        assert first is not None
        name = replace(row, recipe=before).name
        after = _placed(request, Job(first, request.pretraining_data, Path(name)), images)
        weights = recipe.model.model_copy(update=dict(weights=str(after.run)))
        recipe = recipe.model_copy(update=dict(model=weights))
    return _placed(request, Job(recipe, request.data, Path(row.name), after, row), images)


def _placed(request: Request, job: Job, images: Images) -> Job:
    """The job in a folder of its own: other settings and other images, also of the pre-training, are other runs."""
    folder = request.out / "runs" / f"{job.run}.{request.scale}"
    seen = images.digest(job) if job.data is not None else ""
    if job.after:
        seen = hashlib.sha256(f"{seen}{job.after.run.name}".encode()).hexdigest()
    return replace(job, run=folder / f"seed{job.recipe.engine.seed}-{job.key[:6]}-{seen[:6]}")


def measured_rows(request: Request) -> list[dict[str, Any]]:
    """All rows that were ever measured; none if there is no file. Raises UserError."""
    with attempt(f"read {request.measured}"):
        return read_lines(request.measured)


def measured(request: Request, found: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """The measured row of each job's key. If rows are of several data sets, only those of the last row's are taken.

    Numbers on different images do not belong into one table.
    """
    keys = {job.key for job in found}
    rows = [row for row in measured_rows(request) if row.get("key") in keys]
    return {row["key"]: row for row in rows if _images_of(row) == _images_of(rows[-1])}


def _images_of(row: dict[str, Any]) -> tuple[Any, Any]:
    return row["images_hash"], row.get("pretraining_images_hash")


def run(request: Request, found: Sequence[Job], images: Images, each: Callable[[], Any]) -> Outcome:
    """Trains the jobs that have not been measured, and calls ``each`` after each of them.

    Raises:
        UserError: The data cannot be used, or the folder cannot be written.
        Stopped: By a signal.
    """
    outcome = Outcome()
    done = {(row["key"], *_images_of(row)) for row in measured_rows(request)}
    for job in found:
        own, before = images.digest(job), images.digest(job.after) if job.after else None
        if (job.key, own, before) in done:
            outcome.skipped += 1
        elif all(_trained(part, outcome) for part in (job.after, job) if part):
            with attempt(f"write {request.measured}"):
                append_line(request.measured, _row(request, job, own, before))
            outcome.trained += 1
            each()
    return outcome


def _trained(job: Job, outcome: Outcome) -> bool:
    """Whether the job's run is there, or could be made."""
    if job.run in outcome.failed or _finished(job):
        return job.run not in outcome.failed
    code = _train(job)
    if code in (RESUME_ME, 128 + signal.SIGINT):
        raise Stopped(code)
    if code:
        outcome.failed[job.run] = f"{job.run}: training ended with status {code}"
    return not code


def _finished(job: Job) -> bool:
    """Whether the run has its report; its folder's name stands for its images."""
    run = RunDir(job.run)
    if not (run.exists() and (job.run / "evaluation.json").is_file()):
        return False
    own = run.recipe()
    return own.digest() == job.recipe.decided(own.engine.compile).digest()


def _train(job: Job) -> int:
    """``conv2former train`` as a process of its own, which gets this one's signals; returns its exit status.

    The signals need all of this: a scheduler asks both processes, a terminal tells both of Ctrl-C, and a parent that is
    killed must not leave a training behind that holds the folder's lock. That is why it is no ``subprocess.run``.

    Raises:
        Stopped: This process was asked to stop, however the training took it: a second signal may kill what has just
            saved its state.
    """
    say(f"--- {job.run.parent.name}, seed {job.recipe.engine.seed}")
    recipe = job.run.with_name(f"{job.run.name}.yaml")
    with attempt(f"write {recipe}"):
        recipe.parent.mkdir(parents=True, exist_ok=True)
        replace_text(recipe, job.recipe.to_yaml())
    command = [sys.executable, "-m", "conv2former_cli", "train", f"--recipe={recipe}", f"--out={job.run}"]
    command += [f"--data={job.data}", "--resume=auto"]
    child = subprocess.Popen(command, stdout=sys.stderr, preexec_fn=_stop_with_parent)
    asked = False

    def pass_on(signum: int, _: Any) -> None:
        nonlocal asked
        asked = True
        child.send_signal(signum)

    # Ctrl-C is ignored: the terminal tells the child itself
    handlers: dict[signal.Signals, Any] = dict.fromkeys(stops(), pass_on) | {signal.SIGINT: signal.SIG_IGN}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if asked:
        raise Stopped(RESUME_ME)
    return code


def _stop_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _row(request: Request, job: Job, trained_on: str, pretrained_on: str | None) -> dict[str, Any]:
    """What a finished run has shown."""
    run = RunDir(job.run)
    facts = run.facts()
    (_, value), *_ = run.recorded(task_class(job.recipe.task).reported)
    assert job.row is not None
    with safe_open(job.run / "best" / "model.safetensors", framework="np") as file:
        names = [name for name in file.keys() if not name.endswith(STATISTICS)]  # noqa: SIM118, no dictionary
        parameters = sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return dict(
        key=job.key,
        row=job.row.name,
        scale=request.scale,
        seed=job.recipe.engine.seed,
        value=value,
        parameters=parameters,
        data=Path(str(facts["data"])).name,
        images=facts["images"],
        images_hash=trained_on,
        pretraining_images_hash=pretrained_on,
        commit=facts["commit"],
        versions=facts["versions"],
        machine=facts["machine"],
        date=datetime.now(UTC).date().isoformat(),
    )
