"""The demo in a real headless Chromium: pictures go in, the answers are read off the page."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from browser import Visit, chromium, demo, visit
from conv2former.engine.predict import predict
from conv2former.engine.train import train
from digits import one_picture
from scenes import scene, small_detector, small_segmenter, write_coco, write_pairs

pytest.importorskip("gradio", reason="needs gradio: pip install 'conv2former[demo]'")
pytest.importorskip("playwright", reason="needs playwright: pip install 'conv2former[dev]'")
pytestmark = pytest.mark.skipif(not chromium(), reason="needs chromium: apt-get install chromium")

FILE_MB = 0.5


@pytest.fixture(scope="module")
def page(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    """A demo of a classifier, a segmenter and a detector, with a browser before it. It ends while the page is open."""
    root = tmp_path_factory.mktemp("dense")
    train(small_segmenter("schedule.epochs=1"), data=write_pairs(root / "pairs"), out=root / "segmenter")
    train(small_detector("schedule.epochs=1"), data=write_coco(root / "coco"), out=root / "detector")
    models = (finished, root / "segmenter", root / "detector")
    with demo(*models, f"--max-upload-mb={FILE_MB}", "--max-pixels=4000000") as running, visit(running.url) as seen:
        yield seen
        assert running.stop() == 0 and running.errors.read_text() == ""


@pytest.fixture(autouse=True)
def fresh(page: Visit) -> Iterator[None]:
    """Every test has a page of its own; afterwards nothing was asked for elsewhere, and no script has complained."""
    page.open()
    yield
    assert page.foreign() == [] and page.complaints == []
    assert "Traceback" not in page.page.content() and len(page.requests) > 10


def test_a_classifier_names_what_is_on_several_pictures(page: Visit, finished: Path, tmp_path: Path) -> None:
    files = [one_picture(tmp_path / f"digit-{index}.png", index) for index in (0, 1, 7)]
    page.upload(*files)
    cards = page.cards()
    assert [card["name"].split()[0] for card in cards] == [file.name for file in files]
    for card, row in zip(cards, predict(finished, files, device="cpu"), strict=True):
        (answer,) = card["answers"]
        assert answer["lines"] == [[entry["label"], f"{entry['probability']:.1%}"] for entry in row["top"]]
        assert answer["model"] == "finished" and answer["heading"] == "Top classes" and card["errors"] == []
        assert re.fullmatch(r"\d+\.\d ms in the network", answer["time"]) and answer["time"] != "0.0 ms in the network"
        assert answer["maps"] >= 3 and len(answer["pictures"]) == answer["maps"] + 1 and all(answer["pictures"])
    with page.answered():
        page.page.click("#maps input")
    assert [card["answers"][0]["maps"] for card in page.cards()] == [0, 0, 0]


def test_two_models_on_the_same_picture(page: Visit, tmp_path: Path) -> None:
    photograph = tmp_path / "scene.png"
    scene(5)[0].save(photograph)
    page.upload(photograph)
    with page.answered():
        page.choose("first", "segmenter")
    with page.answered():
        page.choose("second", "detector")
    (card,) = page.cards()
    regions, objects = card["answers"]
    assert (regions["model"], regions["heading"]) == ("segmenter", "Fraction of the pixels")
    assert (objects["model"], objects["heading"]) == ("detector", "Objects")
    assert {label for label, _ in regions["lines"]} <= {"ground", "block", "disc"} and regions["maps"] == 12
    assert sum(float(share.strip("%")) for _, share in regions["lines"]) == pytest.approx(100, abs=0.3)
    assert {label for label, _ in objects["lines"]} <= {"block", "disc"} and objects["lines"] and objects["maps"] == 12
    assert regions["pictures"][0] == objects["pictures"][0] == 128


def test_the_camera(page: Visit) -> None:
    page.page.click("#camera button:has-text('Click to Access Webcam')")
    page.page.wait_for_function("() => document.querySelector('#camera video')?.videoWidth > 0")
    with page.answered():
        page.page.click("#camera [aria-label='capture photo']")
    (card,) = page.cards()
    assert card["name"].startswith("camera ") and card["answers"][0]["lines"] and card["errors"] == []


def bomb() -> bytes:
    """A PNG of some bytes that says it has 3.6 thousand million pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_damaged_and_hostile_files(page: Visit, tmp_path: Path) -> None:
    good = one_picture(tmp_path / "good.png")
    attack = b"<script>alert(1)</script><img src=x onerror=alert(2)>"
    contents = {
        "cut.png": good.read_bytes()[:80],
        "bomb.png": bomb(),
        "text.png": attack,
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(3)'><script>alert(4)</script></svg>",
        "empty.jpg": b"",
        "large.png": good.read_bytes() + bytes(round(FILE_MB * 1e6)),
        "polyglot.png": good.read_bytes() + attack,
        "<img src=x onerror=alert(5)>.png": good.read_bytes(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    frames = [Image.open(one_picture(tmp_path / f"{index}.png", index)).convert("P") for index in (1, 2)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    page.upload(*(tmp_path / name for name in contents), tmp_path / "moving.gif", good)
    cards = page.cards()
    assert len(cards) == len(contents) + 2
    found = {card["name"].split("\n")[0]: card for card in cards}
    for name, words in {
        "cut.png": "It is a damaged or unusual PNG file",
        "bomb.png": "60000 x 60000 pixels are more than the limit of 4,000,000.",
        "text.png": "It is no image but text",
        "drawing.svg": "It is no image but text, SVG or other XML",
        "empty.jpg": "It is empty.",
        "large.png": "Its 0.5 MB are more than the limit of 0.5 MB.",
    }.items():
        (sentence,) = found[name]["errors"]
        assert words in sentence and sentence.endswith(".") and "\n" not in sentence and not found[name]["answers"]
    answered = [card for card in cards if not card["errors"]]
    assert len(answered) == 4 and all(card["answers"][0]["lines"] for card in answered)
    assert answered[1]["name"].startswith("<img src=x onerror=alert(5)>.png"), "shown as it is, run as nothing"
    assert page.page.locator("#files img, #answers img[src=x]").count() == 0


def test_an_upload_that_is_too_large_in_all(page: Visit, tmp_path: Path) -> None:
    (tmp_path / "huge.png").write_bytes(bytes(round(17 * FILE_MB * 1e6)))
    page.page.set_input_files("#files input[type=file]", str(tmp_path / "huge.png"))
    page.page.get_by_text("This is more than the 8 MB that are taken at once: choose fewer or smaller.").wait_for()
    assert page.cards() == []
    assert [line for line in page.complaints if "413" not in line and "taken at once" not in line] == []
    page.complaints.clear()
    page.page.reload()


def test_the_browser_itself_loads_nothing_from_elsewhere(page: Visit) -> None:
    refused = page.page.evaluate("() => fetch('https://example.org/').then(() => '', error => error.name)")
    assert refused == "TypeError" and any("Content Security Policy" in line for line in page.complaints)
    page.complaints.clear()
    page.requests.remove("https://example.org/") if "https://example.org/" in page.requests else None
    assert page.page.evaluate("() => fetch('/gradio_api/file=/etc/passwd').then(answer => answer.status)") == 404
    page.complaints.clear()  # Chromium reports the 404
