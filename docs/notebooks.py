"""Tutorials as Jupyter notebooks: ``python docs/notebooks.py FOLDER``; the site has them, too."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
TUTORIALS = sorted(DOCS.glob("tutorial_*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```\n", re.M | re.S)


def notebook(page: Path) -> str:
    """A page as a notebook: commands and Python are cells; what needs more than an ordinary machine stays text."""
    text, cells, start = page.read_text(encoding="utf-8"), [], 0
    for block in BLOCK.finditer(text):
        language, code = block.groups()
        runs = language in ("sh", "py") and "needs:" not in code
        if runs:
            cells += [_text(text[start : block.start()]), _code(code if language == "py" else f"%%bash -e\n{code}")]
            start = block.end()
    cells.append(_text(text[start:]))
    metadata = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    return json.dumps(dict(nbformat=4, nbformat_minor=5, metadata=metadata, cells=_numbered(cells)), indent=1)


def _text(source: str) -> dict[str, Any]:
    return dict(cell_type="markdown", metadata={}, source=source.strip())


def _code(source: str) -> dict[str, Any]:
    return dict(cell_type="code", metadata={}, source=source.strip(), execution_count=None, outputs=[])


def _numbered(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [dict(cell, id=f"cell-{number}") for number, cell in enumerate(cells) if cell["source"]]


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for page in TUTORIALS:
        (folder / f"{page.stem}.ipynb").write_text(notebook(page), encoding="utf-8")


if __name__ == "__main__":
    main()
