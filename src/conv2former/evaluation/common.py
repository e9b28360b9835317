"""What the evaluations of all tasks share."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from conv2former.data.loading import checked
from conv2former.engine.resuming import recorded_data
from conv2former.engine.run_dir import RunFolder
from conv2former.errors import UserError
from conv2former.tasks.classification.splits import AnySplits


@dataclass(frozen=True)
class EvaluateOptions:
    """What the user says of an evaluation.

    Attributes:
        data: Folder of images; None for what the run itself was validated on.
        out: Where the report goes; None for the run folder (``evaluations/NAME`` in it where ``data`` is given), or
            nowhere for a saved model.
        batch_size: Images per forward pass of a classifier (64); the counts do not depend on it.
        workers: Processes that read images.
        device: 'auto', 'cpu', 'cuda', ...
        source: How a classifier's ``data`` lies there: 'folder' (the default), 'tar', 'wds' or 'hfds'.
        on_bad_image: 'error', or 'skip' to leave out what cannot be read.
        multi_scale: Whether a segmenter sees every image at six scales and mirrored.
        settings: Changes ``data.key=value`` to the recipe of a detector or segmenter.
    """

    data: Path | None = None
    out: Path | None = None
    batch_size: int | None = None
    workers: int = 2
    device: str = "auto"
    source: str | None = None
    on_bad_image: Literal["error", "skip"] = "error"
    multi_scale: bool = False
    settings: tuple[str, ...] = ()

    def check(self, task: str) -> None:
        """Refuses what a model of that task would ignore; raises UserError."""
        given = [("--multi-scale", "segmentation", self.multi_scale)]
        given += [("--source", "classification", self.source is not None)]
        given += [("--batch-size", "classification", self.batch_size is not None)]
        for option, kind, used in given:
            if used and task != kind:
                raise UserError(f"{option} is for {kind}, this is a {task} model: leave it out")
        if self.settings and (task == "classification" or self.data is None):
            raise UserError("--set says how the --data of a detector or segmenter lies: leave it out")


def report_folder(run: RunFolder, options: EvaluateOptions) -> Path | None:
    """Where the report of an evaluation goes; see ``EvaluateOptions.out``."""
    if options.out or not run.exists():
        return options.out
    if options.data is None:
        return run.path / "evaluations" / "multi_scale" if options.multi_scale else run.path
    return run.path / "evaluations" / (options.data.resolve().name + ("_multi_scale" if options.multi_scale else ""))


def announced(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader; images that are left out are named.

    Raises:
        UserError: An image that cannot be read, where that is an error.
    """
    for batch in loader:
        batch = checked(batch)
        for error in batch.bad:
            print(f"skipping: {error}", file=sys.stderr, flush=True)
        yield batch


def validation_set(run: RunFolder) -> AnySplits:
    """What the run was validated on, in ``val``; refuses data that have changed since, whose split would be another.

    Raises:
        UserError: They have.
    """
    from conv2former.workflows import workflow  # which imports the evaluations

    recipe, facts = run.recipe(), run.facts()
    splits = workflow(recipe).open_splits(recorded_data(facts))
    if facts.get("images_hash") != splits.digest():
        raise UserError(f"the images in {facts['data']} are not those of the run: name a folder with --data")
    return splits
