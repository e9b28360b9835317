"""The command line, run in this process."""

from __future__ import annotations

import sys

import pytest

import conv2former_cli


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit status of ``conv2former ARGUMENTS``."""
    monkeypatch.setattr(sys, "argv", ["conv2former", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        conv2former_cli.main()
    return stop.value.code or 0  # type: ignore[return-value]
