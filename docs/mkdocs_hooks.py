"""What the site needs beyond ``docs/``: files from the project's root, and links that lead to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
FROM_ROOT = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "examples/onnx_classify.py",
    "examples/onnx_detect.py",
    "examples/server/server.py",
)


def on_files(files: Files, config: Any) -> Files:
    """Adds the files; mkdocs calls it."""
    for name in FROM_ROOT:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **others: Any) -> str:
    """Lets links to them lead to their places in the site; mkdocs calls it."""
    for name in FROM_ROOT:
        markdown = markdown.replace(f"](../{name})", f"]({name})")
    if page.file.src_uri in FROM_ROOT:
        markdown = markdown.replace("](docs/", "](")
    return markdown
