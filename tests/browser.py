"""A demo and a real browser before it: for tests, and as a command that makes the screenshots of the documentation.

python tests/browser.py --out docs/images/demo.png --image photos/buses.jpg runs/camvid runs/detector
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60_000  # milliseconds that an answer may take on a busy machine
COLOURS = 200  # of a screenshot, to be small
PHONE = 390  # width of a phone's page, pixels


def chromium() -> str | None:
    """The browser's program, where there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Demo:
    """A demo in a process of its own.

    Attributes:
        url: Of its page, with a slash at the end.
        process: Its process.
        errors: File of what it writes to standard error.
    """

    url: str
    process: subprocess.Popen[str]
    errors: Path

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Asks it to end; returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(30)


@contextlib.contextmanager
def demo(*arguments: object) -> Iterator[Demo]:
    """``conv2former demo ARGUMENTS`` at a free port, once it answers."""
    command = [sys.executable, "-m", "conv2former_cli", "demo", "--port=0", "--device=cpu", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder) / "stderr"
        with errors.open("w") as stream:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True)
        try:
            assert process.stdout
            line = process.stdout.readline()
            found = re.search(r"http://\S+", line)
            if not found:
                raise RuntimeError(f"the demo did not start: {errors.read_text()}")
            yield Demo(found[0], process, errors)
        finally:
            if process.poll() is None:
                process.terminate()  # it takes its uploads with it
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            if process.stdout:
                process.stdout.close()


@dataclass
class Visit:
    """The page in the browser.

    Attributes:
        page: Playwright's.
        requests: Addresses that it asked for.
        complaints: Of the page's scripts, and dialogs that were opened.
    """

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def open(self, url: str | None = None) -> None:
        """Goes to a page, or takes the same one anew, and forgets what was seen before."""
        self.requests.clear()
        self.complaints.clear()
        self.page.goto(url or self.page.url)
        self.page.wait_for_selector("#files input[type=file]", state="attached")
        self.page.wait_for_selector("#answers .hint")

    def upload(self, *files: Path) -> None:
        """Gives files to the page as the file dialog would, and waits for the answers."""
        with self.answered():
            self.page.set_input_files("#files input[type=file]", [str(file) for file in files])

    def choose(self, chooser: str, name: str) -> None:
        """Takes an entry of the first or the second list of models."""
        self.page.wait_for_function("() => !document.querySelector('[role=option]')")  # the other list has closed
        self.page.click(f"#{chooser} input")
        self.page.get_by_role("option", name=name, exact=True).click()

    @contextlib.contextmanager
    def answered(self) -> Iterator[None]:
        """Waits until what is done inside has changed the answers."""
        shown = "[...document.querySelectorAll('#about .prose, #answers .prose')].map(e => e.innerHTML).join()"
        before = self.page.evaluate(shown)
        yield
        self.page.wait_for_function(f"before => {shown} !== before", arg=before, timeout=PATIENCE)
        # what is being replaced is pale, and what replaces it at first as well
        self.page.wait_for_function(
            "() => { for (let e = document.querySelector('#answers .prose'); e; e = e.parentElement)"
            " if (getComputedStyle(e).opacity !== '1') return false; return true }"
        )

    def shown(self) -> bytes:
        """The data of the first answer's image."""
        source = self.page.get_attribute(".answer img", "src")
        return base64.b64decode(source.partition("base64,")[2])

    def set_slider(self, name: str, value: object) -> None:
        """Types a value."""
        with self.answered():
            self.page.fill(f"#{name} input[type=number]", str(value))

    def take_example(self, name: str) -> None:
        """Clicks an example, and waits for the answer to it; meanwhile there is none."""
        self.page.click(f"#examples button[data-name='{name}']")
        self.page.wait_for_selector(f".card h2:has-text('{name}')")

    def download(self, words: str) -> tuple[str, bytes]:
        """Name and content of the file behind the first link with these words."""
        with self.page.expect_download() as waiting:
            self.page.get_by_text(words, exact=True).first.click()
        return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()

    def too_wide(self) -> list[str]:
        """What makes the page scroll sideways."""
        return self.page.evaluate(
            """() => document.documentElement.scrollWidth <= innerWidth ? [] :
            [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)
            .map(e => `${e.tagName}#${e.id}.${e.className}`)"""
        )

    def cards(self) -> list[dict[str, Any]]:
        """What is to be read on the page: a dictionary for each image."""
        return self.page.evaluate(
            """() => [...document.querySelectorAll('.card')].map(card => ({
                name: card.querySelector('h2').innerText,
                agreement: card.querySelector('.agreement')?.innerText ?? '',
                errors: [...card.querySelectorAll('.error')].map(e => e.innerText),
                answers: [...card.querySelectorAll('.answer')].map(answer => ({
                    model: answer.querySelector('h3').firstChild.textContent,
                    time: answer.querySelector('.time').innerText,
                    notes: [...answer.querySelectorAll('.note')].map(e => e.innerText),
                    heading: answer.querySelector('h4').innerText,
                    lines: [...answer.querySelectorAll('li')].map(li => [
                        li.querySelector('.label').innerText, li.querySelector('.share').innerText]),
                    images: [...answer.querySelectorAll('img')].map(img => img.naturalWidth),
                    maps: answer.querySelectorAll('.maps img').length,
                    cam: answer.querySelector('.cam .key')?.innerText ?? '',
                })),
            }))"""
        )

    def foreign(self) -> list[str]:
        """Requests to anywhere but the page's own address."""
        own = urlsplit(self.page.url).netloc
        return [url for url in self.requests if not url.startswith(("data:", "blob:")) and urlsplit(url).netloc != own]


@contextlib.contextmanager
def visit(url: str, *, width: int = 1360, height: int = 900, dark: bool = False) -> Iterator[Visit]:
    """The page in a headless Chromium with a camera that shows a test image."""
    from playwright.sync_api import sync_playwright

    options = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    options += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's does not work for root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=options)
        page = browser.new_page(viewport=dict(width=width, height=height), color_scheme="dark" if dark else "light")
        page.set_default_timeout(PATIENCE)
        seen = Visit(page)
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.on("console", lambda line: seen.complaints.append(line.text) if line.type == "error" else None)
        page.on("dialog", lambda dialog: (seen.complaints.append(dialog.message), dialog.dismiss()))
        try:
            seen.open(url)
            yield seen
        finally:
            browser.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes a screenshot: the first two models on the images, or on the first example."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("models", nargs="+", help="as for conv2former demo; the second is compared")
    parser.add_argument("--image", type=Path, action="append", help="an example of the run unless given")
    parser.add_argument("--tick", action="append", default=[], help="a box of the page: cam, maps")
    parser.add_argument("--set", action="append", default=[], metavar="SLIDER=VALUE", help="top_k, threshold, opacity")
    parser.add_argument("--width", type=int, default=1360)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    with demo(*given.models) as running, visit(running.url, width=given.width, dark=given.dark) as seen:
        if len(given.models) > 1:
            seen.page.click("#second input")
            seen.page.get_by_role("option").nth(2).click()  # after "none" and the first
        if given.image:
            seen.upload(*given.image)
        else:
            seen.take_example(seen.page.get_attribute("#examples button", "data-name"))
        for box in given.tick:
            with seen.answered():
                seen.page.click(f"#{box} input")
        for slider, _, value in (setting.partition("=") for setting in given.set):
            seen.set_slider(slider, value)
        seen.page.mouse.move(0, 0)
        shot = Image.open(io.BytesIO(seen.page.screenshot(full_page=True)))
    shot.convert("RGB").quantize(COLOURS).save(given.out, optimize=True)
    print(f"{given.out}: {shot.width} x {shot.height}, {given.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
