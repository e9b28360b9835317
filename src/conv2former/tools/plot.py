"""Learning curves of runs, one or several in one picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conv2former.engine.run_dir import RunDir
from conv2former.errors import UserError, one_line
from conv2former.viz.plots import draw_curves

PICTURE_FORMATS = (".png", ".svg", ".pdf")


def plot_runs(paths: Sequence[Path], *, out: Path | None = None, x: str = "epoch") -> Path:
    """Learning curves of one run, or of several in one picture with a colour each.

    Args:
        paths: Run folders, also of runs that still go on or have stopped half-way.
        out: Picture to write; by default ``learning_curves.png`` in the one run, ``comparison.png`` here for several.
        x: A key of ``X_AXES``.

    Returns:
        The picture.

    Raises:
        UserError: Not a run folder, a run without rows, no times for "minutes", a picture that cannot be written.
    """
    paths = list({os.path.abspath(path): path for path in paths}.values())
    if out is None:
        out = paths[0] / "learning_curves.png" if len(paths) == 1 else Path("comparison.png")
    if out.suffix.lower() not in PICTURE_FORMATS:
        raise UserError(f"--out {out} must end in {', '.join(PICTURE_FORMATS)}")
    runs = {name: _rows(path) for name, path in zip(_distinct_names(paths), paths, strict=True)}
    try:
        draw_curves(runs, out, x)
    except OSError as error:
        raise UserError(
            f"cannot write {out} ({error.strerror or one_line(error)}): name another file with --out"
        ) from None
    return out


def _rows(path: Path) -> list[dict[str, Any]]:
    run = RunDir.open(path)
    try:
        rows = run.rows()
    except OSError as error:
        raise UserError(f"cannot read {run.metrics_jsonl}: {one_line(error)}") from None
    if not rows:
        raise UserError(f"nothing is logged in {path} yet: plot it once its first loss has been shown")
    return rows


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of the folders above them as tell them apart."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    names = []
    for own in parts:
        depth = next(n for n in range(1, len(own) + 1) if sum(other[-n:] == own[-n:] for other in parts) == 1)
        names.append("/".join(own[-depth:]))
    return names
