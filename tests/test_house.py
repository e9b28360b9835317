"""Sizes that keep the code readable: entries of the package, lines of files and functions."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "conv2former"
FILES = sorted(PACKAGE.parent.rglob("*.py"))


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_package_has_few_entries() -> None:
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 15, sorted(entries)


def test_files_fit() -> None:
    long = {str(path.relative_to(PACKAGE.parent)): lines(path) for path in FILES if lines(path) > 500}
    assert not long


def test_functions_fit_a_screen() -> None:
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or 0) - node.body[0].lineno + 1
                if ast.get_docstring(node):
                    size = (node.end_lineno or 0) - (node.body[0].end_lineno or 0)
                if size > 60:
                    long.append(f"{path.relative_to(PACKAGE.parent)}:{node.lineno} {node.name} ({size})")
    assert not long


def test_the_way_through_the_code_is_short() -> None:
    """The network, one task and the trainer."""
    way = ["models/conv2former.py", "tasks/base.py", "tasks/classification/task.py", "engine/trainer.py"]
    assert sum(lines(PACKAGE / path) for path in way) <= 1500
