"""What the site needs beyond ``docs/``: files from the project's root, links that lead to them, and the notebooks."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from conv2former_runtime import __version__

ROOT = Path(__file__).parents[1]
FROM_ROOT = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "examples/onnx_classify.py",
    "examples/onnx_detect.py",
    "examples/server/server.py",
)
NOTEBOOKS = runpy.run_path(str(ROOT / "docs/notebooks.py"))


def on_config(config: Any) -> Any:
    """Shows the version; mkdocs calls it."""
    config.copyright = f"conv2former {__version__}, {config.copyright}"
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the files; mkdocs calls it."""
    for name in FROM_ROOT:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for page in NOTEBOOKS["TUTORIALS"]:
        files.append(File.generated(config, f"{page.stem}.ipynb", content=NOTEBOOKS["notebook"](page)))
    return files


def on_page_markdown(markdown: str, page: Any, **others: Any) -> str:
    """Lets links to them lead to their places in the site; mkdocs calls it."""
    for name in FROM_ROOT:
        markdown = markdown.replace(f"](../{name})", f"]({name})")
    if page.file.src_uri in FROM_ROOT:
        markdown = markdown.replace("](docs/", "](")
    if page.file.src_uri.startswith("tutorial_"):
        title, _, rest = markdown.partition("\n")
        notebook = page.file.src_uri.replace(".md", ".ipynb")
        markdown = f"{title}\n\n[:material-notebook: This page as a notebook]({notebook}){{ download }}\n{rest}"
    return markdown
