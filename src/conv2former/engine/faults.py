"""What a run passes over and lists: images that cannot be read, steps whose loss is not finite."""

from __future__ import annotations

from collections.abc import Callable

from conv2former.config import Recipe
from conv2former.data.images import BadImage
from conv2former.data.loading import AnyBatch
from conv2former.data.sources import Source
from conv2former.engine.distributed import Processes, agreed
from conv2former.engine.run_dir import RunDir
from conv2former.engine.state import TrainState
from conv2former.errors import UserError, resume_command, some
from conv2former.files import append_line, read_lines


def calmer(run: RunDir, recipe: Recipe) -> str:
    """What to do where losses or weights are not finite."""
    return (
        "continue from the last checkpoint, which is sound, with a lower learning rate: "
        f"{resume_command(run.path)} --force --set optim.base_lr={recipe.optim.base_lr / 10:g}"
        " (--set optim.clip_grad=1 or --set engine.precision=32 may be enough)"
    )


class Faults:
    """The lists of a run and their limits, the same on all processes; the first one writes them.

    Args:
        run: The run folder.
        recipe: Gives the limits.
        images: The training images.
        processes: Of this run.
        say: Shows a line to the user.
    """

    def __init__(
        self, run: RunDir, recipe: Recipe, images: Source, processes: Processes, say: Callable[[str], None]
    ) -> None:
        self.run, self.recipe, self.images, self.processes, self.say = run, recipe, images, processes, say
        rows = read_lines(run.bad_images_jsonl)
        self.bad_images = {row["file"] for row in rows if isinstance(row.get("file"), str)}

    def new_bad_images(self, parts: list[AnyBatch]) -> list[BadImage]:
        """Those of this process's batches that are not listed yet."""
        return [image for part in parts for image in part.bad if image.file not in self.bad_images]

    def note_bad_images(self, bad: list[BadImage]) -> None:
        """Lists what any process has found; to be called on all of them."""
        for rows in self.processes.all_gather([(image.file, image.reason) for image in bad]):
            for file, reason in rows:
                if file not in self.bad_images:
                    self.bad_images.add(file)
                    self.say(f"skipping {file}: {reason}")
                    if self.processes.rank == 0:
                        append_line(self.run.bad_images_jsonl, dict(file=file, reason=reason))

    def too_many_bad_images(self) -> Exception | None:
        """The error where the limit is passed."""
        if len(self.bad_images) <= self.recipe.data.max_bad_images:
            return None
        return agreed(
            UserError(
                f"{len(self.bad_images)} images cannot be read, more than data.max_bad_images: see "
                f"{self.run.bad_images_jsonl}, raise it with --set data.max_bad_images=1000 and continue with --resume"
            )
        )

    def note_skipped_step(self, parts: list[AnyBatch], state: TrainState, *, lr: float) -> None:
        """Lists a step whose loss was not finite, with the images of all processes; to be called on all of them.

        Raises:
            UserError: It is the last of as many in a row as the recipe allows.
        """
        step, in_row = state.step, state.skipped_in_row
        indices = [index for part in parts for index in part.indices.tolist()]
        files = [self.images.name(i) for own in self.processes.all_gather(indices) for i in own]
        if self.processes.rank == 0:
            append_line(self.run.skipped_steps_jsonl, dict(step=step, lr=lr, files=files))
        self.say(f"step {step} skipped: its loss is not finite")
        if in_row >= self.recipe.engine.max_skipped_steps:
            raise agreed(
                UserError(
                    f"the loss was not finite in {in_row} steps in a row, up to step {step} (learning rate {lr:.3g}; "
                    f"{some(files, 3)}; all in {self.run.skipped_steps_jsonl}): {calmer(self.run, self.recipe)}"
                )
            )
