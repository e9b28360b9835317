"""Learning curves of runs, one or several in one figure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from conv2former.engine.run_dir import RunDir
from conv2former.errors import UserError, attempt
from conv2former.viz.plots import draw_curves

FORMATS = (".png", ".svg", ".pdf")


def plot_runs(paths: Sequence[Path], *, out: Path | None = None, x: str = "epoch") -> Path:
    """Draws learning curves of one run, or of several in one figure with a colour each, and returns the file.

    A run may still go on or have stopped half-way. ``out`` is ``learning_curves.png`` in the one run by default,
    ``comparison.png`` here for several. ``x`` is a key of ``X_AXES``.

    Raises:
        UserError: Not a run folder, a run without rows, no times for "minutes", a file that cannot be written.
    """
    paths = list({os.path.abspath(path): path for path in paths}.values())
    if out is None:
        out = paths[0] / "learning_curves.png" if len(paths) == 1 else Path("comparison.png")
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"--out {out} must end in {', '.join(FORMATS)}")
    runs = {}
    for path, name in zip(paths, _distinct_names(paths), strict=True):
        run = RunDir.open(path)
        name = run.title() if len(paths) == 1 else name
        with attempt(f"read {run.metrics_jsonl}"):
            runs[name] = run.rows()
        if not runs[name]:
            raise UserError(f"nothing is logged in {path} yet: plot it once its first loss has been shown")
    with attempt(f"write {out}", "; name another file with --out"):
        draw_curves(runs, out, x)
    return out


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of the folders above them as tell them apart."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    names = []
    for own in parts:
        depth = next(n for n in range(1, len(own) + 1) if sum(other[-n:] == own[-n:] for other in parts) == 1)
        names.append("/".join(own[-depth:]))
    return names
