"""A short form of ``make soak``: one run with three faults, equal to the undisturbed one to the last bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import soak


@pytest.mark.slow  # minutes; tests/test_resume.py and tests/test_watch.py meet each fault alone
def test_a_run_with_faults_ends_as_one_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, settings, write = soak.TASKS["classification"]
    short = [setting for setting in settings if not setting.startswith("schedule.epochs")]
    monkeypatch.setitem(soak.TASKS, "classification", (recipe, [*short, "schedule.epochs=24"], write))
    campaign = soak.Campaign(tmp_path / "one", "classification", changing=False, chance=random.Random(0))
    campaign.processes, campaign.readers = 1, 1
    rows = [campaign.meet(kind) for kind in ("kill_all", "hang_reading", "damage")]
    assert [row["status"] for row in rows] == [-9, 1, -9]
    campaign.finish()
