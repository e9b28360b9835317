"""A run folder of somebody else's: any value in its files is used or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from conv2former.engine.faults import Faults
from conv2former.engine.model_card import card
from conv2former.engine.run_dir import RunDir
from conv2former.tasks import task_class
from conv2former.viz.plots import draw_curves
from digits import tiny_recipe
from test_untrusted import DEEP, RED, one_line_or_fine


@pytest.mark.parametrize("name", ["run.json", "evaluation.json", "recipe.yaml", "metrics.jsonl", "bad_images.jsonl"])
def test_any_value_in_a_run_folder_is_used_or_refused(name: str, finished: Path, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(finished, tmp_path / "run")))
    file = run.path / name
    lines = file.read_text().splitlines() if file.exists() else ['{"file": "a.png", "reason": "none"}']
    whole = name.endswith(".json")
    good = json.loads("\n".join(lines)) if whole else yaml.safe_load("\n".join(lines)) if name == "recipe.yaml" else {}
    rows = [] if good else [json.loads(line) for line in lines[:3]]
    task = task_class("classification")

    nothing: Any = None

    def everything() -> None:
        for use in (
            lambda: card(config, run),
            lambda: (Faults(run, tiny_recipe(), nothing, nothing, print), run.drop_rows_after(1, evaluated=1)),
            lambda: draw_curves({"run": run.rows()}, tmp_path / "a.png", "epoch") if run.rows("epoch") else None,
            lambda: run.recorded(task.reported),
        ):
            one_line_or_fine(use)

    config = json.loads((run.best / "config.json").read_text())
    few = [RED, DEEP, None, 10**30, float("nan"), [1], {"a": 1}, -1]
    for value in few:
        for key in good:
            content = good | {key: value}
            file.write_text(yaml.dump(content) if name == "recipe.yaml" else json.dumps(content))
            everything()
        for row in rows:
            for key in row:
                file.write_text(json.dumps(row | {key: value}) + "\n" + json.dumps(value) + "\n" + "[" * 10_000)
                everything()
