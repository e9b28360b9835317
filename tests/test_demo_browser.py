"""The demo in a real headless Chromium: images go in, the answers are read off the page."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from browser import PHONE, Visit, chromium, demo, visit
from conv2former.engine.predict import predict
from digits import one_picture
from scenes import scene

pytest.importorskip("gradio", reason="needs gradio: pip install 'conv2former[demo]'")
pytest.importorskip("playwright", reason="needs playwright: pip install 'conv2former[dev]'")
pytestmark = pytest.mark.skipif(not chromium(), reason="needs chromium: apt-get install chromium")

FILE_MB = 0.5


@pytest.fixture(scope="module")
def page(finished: Path, segmenter: Path, detector: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    """A demo of a classifier, a segmentation model, a detector and a network with random weights, in a browser.

    The classifier's run keeps two examples. The demo ends while the page is open.
    """
    root = tmp_path_factory.mktemp("dense")
    shutil.copytree(segmenter, root / "segmenter")
    shutil.copytree(detector, root / "detector")
    shutil.copytree(finished, root / "digits")
    (root / "digits" / "samples").mkdir()
    for index in (3, 4):
        one_picture(root / "digits" / "samples" / f"example-{index}.png", index)
    models = (root / "digits", root / "segmenter", root / "detector", "conv2former_test")
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


def test_a_classifier_names_what_is_on_several_images(page: Visit, finished: Path, tmp_path: Path) -> None:
    files = [one_picture(tmp_path / f"digit-{index}.png", index) for index in (0, 1, 7)]
    page.upload(*files)
    cards = page.cards()
    assert [card["name"].split()[0] for card in cards] == [file.name for file in files]
    for card, row in zip(cards, predict(finished, files, device="cpu"), strict=True):
        (answer,) = card["answers"]
        assert answer["lines"] == [[entry["label"], f"{entry['probability']:.1%}"] for entry in row["top"]]
        assert answer["model"] == "digits" and answer["heading"] == "Top classes" and card["errors"] == []
        assert re.fullmatch(r"\d+\.\d ms in the network", answer["time"]) and answer["time"] != "0.0 ms in the network"
        assert answer["maps"] == 0 and len(answer["images"]) == 1 and all(answer["images"])
    with page.answered():
        page.page.click("#maps input")
    assert all(card["answers"][0]["maps"] >= 3 and all(card["answers"][0]["images"]) for card in page.cards())
    with page.answered():
        page.page.click("#maps input")
    assert [card["answers"][0]["maps"] for card in page.cards()] == [0, 0, 0]


def test_the_title_says_what_the_model_is_and_examples_are_uploads(page: Visit) -> None:
    title = page.page.inner_text("#about")
    assert "digits" in title and "4 classes: digit-0, digit-1" in title and "top-1 " in title
    assert page.page.locator(".banner").count() == 0
    for name in ("example-3.png", "example-4.png"):
        page.take_example(name)
        (card,) = page.cards()
        assert card["name"].startswith(name) and card["answers"][0]["lines"] and card["errors"] == []
    with page.answered():
        page.choose("first", "conv2former_test")
    assert "has random weights: it has learned nothing" in page.page.inner_text(".banner")
    assert page.page.is_visible(".badge") and not page.page.is_visible("#examples button")


def test_two_models_on_the_same_image(page: Visit, tmp_path: Path) -> None:
    photograph = tmp_path / "scene.png"
    scene(5)[0].save(photograph)
    page.upload(photograph)
    with page.answered():
        page.choose("first", "segmenter")
    with page.answered():
        page.choose("second", "detector")
    (card,) = page.cards()
    classes, objects = card["answers"]
    assert (classes["model"], classes["heading"]) == ("segmenter", "Fraction of the pixels")
    assert (objects["model"], objects["heading"]) == ("detector", "Objects")
    assert {label for label, _ in classes["lines"]} <= {"ground", "block", "disc"} and card["agreement"] == ""
    assert sum(float(share.strip("%")) for _, share in classes["lines"]) == pytest.approx(100, abs=0.3)
    assert {label for label, _ in objects["lines"]} <= {"block", "disc"} and objects["lines"]
    assert classes["images"] == objects["images"] == [128]


def test_controls_change_what_is_shown(page: Visit, tmp_path: Path) -> None:
    assert [page.page.is_visible(f"#{name}") for name in ("top_k", "threshold", "opacity", "layers")] == [1, 0, 0, 0]
    scene(5)[0].save(tmp_path / "scene.png")
    page.upload(tmp_path / "scene.png")
    page.set_slider("top_k", 2)
    assert len(page.cards()[0]["answers"][0]["lines"]) == 2
    with page.answered():
        page.choose("first", "detector")
    assert [page.page.is_visible(f"#{name}") for name in ("top_k", "threshold", "opacity", "layers")] == [0, 1, 1, 1]
    page.set_slider("threshold", 0.9)
    (before,) = (card["answers"][0] for card in page.cards())
    page.set_slider("threshold", 0.05)
    (after,) = (card["answers"][0] for card in page.cards())
    assert before["lines"] == [] and before["notes"] == ["Nothing has a score as high as the threshold."]
    assert after["lines"] and all(float(share[:-1]) >= 5 for _, share in after["lines"])
    seen = {page.shown()}
    for layer in ("Labels", "Boxes"):
        with page.answered():
            page.page.click(f"#layers label:has-text('{layer}')")
        seen.add(page.shown())
    page.set_slider("opacity", 0.1)
    seen.add(page.shown())
    with page.answered():
        page.page.click("#layers label:has-text('Masks')")
    assert page.cards()[0]["answers"][0]["time"] == after["time"], "the network need not run for a drawing"
    bare = Image.open(io.BytesIO(page.shown())).convert("RGB")
    assert len(seen) == 4 and np.abs(np.asarray(bare, int) - np.asarray(scene(5)[0], int)).mean() < 10


@pytest.mark.slow  # tests/test_demo.py counts agreement, tests/test_explain.py computes the maps
def test_class_activation_and_agreement(page: Visit, tmp_path: Path) -> None:
    page.upload(one_picture(tmp_path / "one.png", 1), one_picture(tmp_path / "two.png", 2))
    with page.answered():
        page.page.click("#cam input")
    (first, _) = page.cards()
    assert first["answers"][0]["cam"] == (
        f"Red is where the image speaks most for the class {first['answers'][0]['lines'][0][0]}."
    )
    with page.answered():
        page.choose("second", "conv2former_test")
    assert {card["agreement"] for card in page.cards()} == {"The two top classes differ."}
    assert page.page.inner_text("#status") == "2 images. Same top class: 0 of 2 images."
    assert page.page.get_attribute("#status [role=status], #status[role=status]", "role") == "status"


def test_downloads_and_the_lines_of_python(
    page: Visit, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = one_picture(tmp_path / "photo.jpg", 1)
    page.upload(file)
    name, image = page.download("Download image")
    assert name == "photo.digits.png" and Image.open(io.BytesIO(image)).size == Image.open(file).size
    name, row = page.download("Download JSON")
    (expected,) = predict(finished, [file], device="cpu")
    assert name == "photo.digits.json" and json.loads(row)["top"] == [
        entry | dict(probability=pytest.approx(entry["probability"], rel=1e-4)) for entry in expected["top"]
    ]
    page.page.click("#code-part button")
    code = page.page.inner_text("#code pre")
    assert "top_k=5" in code and str(finished.parent) not in code
    shutil.copytree(finished, tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert f"'label': '{expected['top'][0]['label']}'" in capsys.readouterr().out


def test_a_phone_needs_no_sideways_scrolling(page: Visit, tmp_path: Path) -> None:
    scene(5)[0].save(tmp_path / f"{'long name ' * 20}.jpg")
    page.page.set_viewport_size(dict(width=PHONE, height=844))
    try:
        assert page.too_wide() == []
        with page.answered():
            page.choose("first", "segmenter")
        with page.answered():
            page.choose("second", "detector")
        page.upload(tmp_path / f"{'long name ' * 20}.jpg")
        for box in ("cam", "maps"):
            with page.answered():
                page.page.click(f"#{box} input")
        for part in ("camera-part", "code-part"):
            page.page.click(f"#{part} button")
        assert page.too_wide() == []
        tops = [page.page.locator(part).bounding_box()["y"] for part in ("#about", "#files", "#answers", "#options")]
        assert tops == sorted(tops), "the answers stand above the options"
    finally:
        page.page.set_viewport_size(dict(width=1360, height=900))


def test_the_keyboard_reaches_everything_in_order(page: Visit) -> None:
    unnamed = page.page.evaluate(
        """() => [...document.querySelectorAll('input, button, select, a')].filter(e => e.checkVisibility()).filter(e =>
            !(e.labels?.length || e.ariaLabel || e.title || e.innerText?.trim() || e.querySelector('img[alt]')))
            .map(e => e.outerHTML.slice(0, 200))"""
    )
    assert unnamed == []
    wanted = ["first", "files", "examples", "code-part", "second", "top_k", "cam", "maps", "camera-part"]
    reached = []
    for _ in range(40):
        page.page.keyboard.press("Tab")
        parts = ", ".join(f"#{part}" for part in wanted)
        reached.append(page.page.evaluate("parts => document.activeElement.closest(parts)?.id ?? ''", parts))
    assert [*filter(None, dict.fromkeys(reached))] == wanted
    page.page.focus("#top_k input[type=range]")
    page.page.keyboard.press("ArrowRight")
    assert page.page.input_value("#top_k input[type=number]") == "6"
    page.page.focus("#examples button")
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector(".card h2")
    assert page.page.text_content("#status p") == "1 image."


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_serious(page: Visit, dark: bool, tmp_path: Path) -> None:
    script = axe_core()
    scene(5)[0].save(tmp_path / "scene.png")
    page.page.emulate_media(color_scheme="dark" if dark else "light")
    try:
        page.open()
        page.upload(tmp_path / "scene.png")
        for chooser, name in (("first", "detector"), ("second", "conv2former_test")):
            with page.answered():
                page.choose(chooser, name)
        with page.answered():
            page.page.click("#maps input")
        page.page.click("#code-part button")
        page.page.evaluate(script)
        found = page.page.evaluate(
            """() => axe.run(document).then(result => result.violations
                .filter(one => ['serious', 'critical'].includes(one.impact))
                .map(one => [one.id, ...one.nodes.map(node => node.html.slice(0, 200))]))"""
        )
        assert found == []
    finally:
        page.page.emulate_media(color_scheme="light")


def axe_core() -> str:
    """The accessibility checker's script, which is no part of this project: AXE_CORE names it."""
    path = os.environ.get("AXE_CORE", "")
    if not path:
        pytest.skip("needs axe-core: npm pack axe-core, then AXE_CORE=package/axe.min.js")
    return Path(path).read_text(encoding="utf-8")


def test_the_camera(page: Visit) -> None:
    page.page.click("#camera-part button")
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
        "{{value}} ${alert(6)} {{#if.png": good.read_bytes(),  # Gradio's HTML is made by templates
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
    assert len(answered) == 5 and all(card["answers"][0]["lines"] for card in answered)
    assert answered[1]["name"].startswith("<img src=x onerror=alert(5)>.png"), "shown as it is, run as nothing"
    assert answered[2]["name"].startswith("{{value}} ${alert(6)} {{#if.png")
    assert page.page.locator("#files img, #answers img[src=x]").count() == 0


@pytest.mark.slow  # tests/test_demo_server.py refuses such bodies
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
