"""What models make of images, as HTML. Every text goes through ``escape``; images are in it as data."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from conv2former.errors import plural, printable
from conv2former.tools.demo.about import PIXELS, About, data_url, readable
from conv2former.tools.demo.agreement import Agreement
from conv2former.tools.demo.models import LARGE, Look

SMALL = 320  # longest side of maps on the page
LINES = 12  # that are shown of what was found
KEY = "From the lowest value, blue, to the highest, red; of one channel blue is below 0, red above."
RANDOM = "random weights: it has learned nothing, so its answers mean nothing."


def paragraph(kind: str, sentence: str) -> str:
    """A 'notice' above the results, a 'hint' in their place, an 'error' in place of an answer, or the 'limits'."""
    role = ' role="alert"' if kind in ("notice", "error") else ""
    return f'<p class="{kind}"{role}>{escape(sentence)}</p>'


def title(models: Sequence[tuple[str, About]], uses: Sequence[str]) -> str:
    """What the models are, below a warning where weights are random; ``uses`` are the controls that they have."""
    warnings = [
        f'<p class="banner" role="alert"><b>{escape(name)}</b> has {RANDOM}</p>' for name, a in models if a.random
    ]
    heads = [
        f'<div><h{1 + (number > 0)} class="name">{escape(name)}</h{1 + (number > 0)}>'
        f'<ul class="facts">{"".join(f"<li>{escape(printable(fact))}</li>" for fact in about.facts)}</ul></div>'
        for number, (name, about) in enumerate(models)
    ]
    shown = " ".join(f"has-{use}" for use in uses)
    return f'{"".join(warnings)}<div class="models {shown}">{"".join(heads)}</div>'


def examples(models: Sequence[About]) -> str:
    """Buttons with images that the models' runs keep; empty where they keep none."""
    found = dict.fromkeys(example for about in models for example in about.examples)
    buttons = [
        f'<button type="button" data-name="{escape(name)}"><img alt="{escape(name)}" src="{data}"></button>'
        for name, data in found
    ]
    return f'<h2>Or take an example</h2><div class="examples">{"".join(buttons)}</div>' if buttons else ""


def code(snippets: Sequence[str]) -> str:
    """Lines of Python, which the keyboard can scroll."""
    return "".join(f'<pre tabindex="0" aria-label="Python">{escape(snippet)}</pre>' for snippet in snippets)


def status(count: int, agreed: Agreement | None) -> str:
    """A sentence on all images, which a screen reader reads out."""
    if agreed and count > 1:
        return f"<p>{count} images. {escape(str(agreed))}</p>"
    return f'<p class="unseen">{plural(count, "image")}.</p>'


def card(name: str, size: tuple[int, int] | None, answers: list[str], agreement: str = "") -> str:
    """An image with the name of its file, its (width, height) where it can be read, and what was answered."""
    pixels = f" <small>{size[0]} &times; {size[1]}</small>" if size else ""
    agreed = f'<p class="agreement">{escape(agreement)}</p>' if agreement else ""
    return (
        f'<article class="card"><h2>{escape(name)}{pixels}</h2>{agreed}'
        f'<div class="answers">{"".join(answers)}</div></article>'
    )


def answer(name: str, about: About, look: Look, file: str) -> str:
    """A model's answer: its name, what it found, the image, the time, the files, the maps."""
    random = '<span class="badge">random weights</span>' if about.random else ""
    drawn = _image(look.image, LARGE, f"what {name} found", "tiny" if max(look.image.size) <= PIXELS else "large")
    found = f"<div><h4>{look.words.heading}</h4>{_lines(look)}{_files(name, look, file)}</div>"
    maps = f"{_cam(look, name)}{_maps(look, name)}"
    return (
        f'<section class="answer"><h3>{escape(name)}{random}</h3><div class="found"><div>{drawn}</div>{found}</div>'
        f"{maps}</section>"
    )


def _lines(look: Look) -> str:
    if not look.lines:
        return f'<p class="note">{escape(look.words.nothing)}</p>'
    rows = []
    for line in look.lines[:LINES]:
        fill = "#" + bytes(line.colour).hex() if line.colour else ""
        swatch = f'<span class="swatch" style="background:{fill}"></span>' if fill else ""
        bar = f'<div class="bar"><i style="width:{line.value:.1%}{f";background:{fill}" if fill else ""}"></i></div>'
        words = f'<span class="label">{swatch}{escape(readable(line.label))}</span>'
        rows.append(f'<li><div class="row">{words}<span class="share">{line.value:.1%}</span></div>{bar}</li>')
    more = len(look.lines) - LINES
    rest = f'<p class="note">and {more} more</p>' if more > 0 else ""
    return f'<ul class="lines">{"".join(rows)}</ul>{rest}'


def _files(name: str, look: Look, file: str) -> str:
    """The time, and links to the image as it is shown and to what was found in the words of ``predict``."""
    stem = re.sub(r"[^\w.-]+", "_", f"{Path(file).stem}.{name}")
    row = json.dumps(dict(file=file, model=name, ok=True) | look.fields, indent=1)
    data = f"data:application/json;base64,{base64.b64encode(row.encode()).decode()}"
    kind = "png" if max(look.image.size) <= PIXELS else "jpg"
    # the script of the page gives the first one the data of the image, which would be here twice
    return (
        f'<p class="files"><span class="time">{look.milliseconds:.1f} ms in the network</span>'
        f'<a href="#" data-image download="{escape(stem)}.{kind}">Download image</a>'
        f'<a href="{data}" download="{escape(stem)}.json">Download JSON</a></p>'
    )


def _cam(look: Look, name: str) -> str:
    if look.cam is None:
        return f'<p class="note">{escape(look.no_cam)}</p>' if look.no_cam else ""
    words, values = look.cam
    kind = "tiny" if max(values.shape) <= PIXELS else "large"
    drawn = _image(Image.fromarray(values), LARGE // 2, f"{name}: class activation", kind)
    return f'<div class="cam"><h4>Class activation</h4>{drawn}<p class="key">{escape(words)}</p></div>'


def _maps(look: Look, name: str) -> str:
    """Blocks as rows, the kinds of maps as columns; single channels have their numbers below."""
    if not look.maps:
        return f'<p class="note">{escape(look.no_maps)}</p>' if look.no_maps else ""
    titles = [title for title, _ in look.maps[0][1]]
    heads = [title.replace(", all channels", "") if "channel " not in title else "A, one channel" for title in titles]
    cells = ["<span></span>", *(f'<span class="head">{escape(head)}</span>' for head in heads)]
    for block, panels in look.maps:
        lines = block.replace(", ", "\n").split("\n")
        cells.append(f"<span>{'<br>'.join(escape(line).replace(' x ', ' &times; ') for line in lines)}</span>")
        for title, values in panels:
            alt = f"{name}, {lines[0]}: {title}"
            cells.append(_image(Image.fromarray(values), SMALL, alt, "tiny" if max(values.shape) <= PIXELS else ""))
    grid = f'<div class="maps" style="--columns:{len(heads)}">{"".join(cells)}</div>'
    return f'<div><h4>Modulation weights A and product A * V</h4>{grid}<p class="key">{KEY}</p></div>'


def _image(image: Image.Image, side: int, alt: str, kind: str) -> str:
    return f'<img class="{kind}" alt="{escape(alt)}" title="{escape(alt)}" src="{data_url(image, side)}">'
