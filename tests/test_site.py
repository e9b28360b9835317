"""The documentation's site: builds without a warning, every link leads somewhere, nothing comes from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]


class Page(HTMLParser):
    """Links, loaded files and anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.anchors |= {given[key] for key in ("id", "name") if key in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and "href" in given and given.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(given["href"])
        if "src" in given:
            self.loaded.append(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={folder}"]
    answer = subprocess.run(
        build, cwd=ROOT, env=os.environ | dict(NO_MKDOCS_2_WARNING="1"), capture_output=True, text=True
    )
    assert answer.returncode == 0 and "WARNING" not in answer.stderr, answer.stderr
    return {path.resolve(): Page(path) for path in folder.rglob("*.html")}


def test_every_link_leads_somewhere(site: dict[Path, Page]) -> None:
    assert len(site) > 15
    broken = []
    for path, page in site.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or path.name == "404.html":  # which is made for the root of a server
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists() or (target in site and unquote(parts.fragment) not in site[target].anchors):
                broken.append(f"{path.name}: {link}")
    assert not broken


def test_nothing_is_loaded_from_elsewhere(site: dict[Path, Page]) -> None:
    for path, page in site.items():
        for source in page.loaded:
            assert not urlsplit(source).netloc, f"{path.name} loads {source}"
    (folder,) = {path.parent for path in site if path.name == "404.html"}
    for sheet in folder.rglob("*.css"):
        urls = re.findall(r"url\((.{0,60})", sheet.read_text(encoding="utf-8"))
        assert not [url for url in urls if re.match(r"['\"]?(https?:)?//", url)], sheet


def test_the_reference_shows_what_it_names(site: dict[Path, Page]) -> None:
    (page,) = [page for path, page in site.items() if path.name == "api.html"]
    named = re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert len(named) > 20 and not [name for name in named if name not in page.anchors]
