"""What models make of images, as HTML. Every text goes through ``escape``; images are in it as data."""

from __future__ import annotations

import base64
import io
from html import escape

from PIL import Image

from conv2former.tools.demo.models import Look

LARGE, SMALL = 1024, 320  # longest sides of images and of maps on the page
PIXELS = 96  # images up to this side are enlarged with their pixels visible
LINES = 12  # that are shown of what was found
KEY = "From the lowest value, blue, to the highest, red; of one channel blue is below 0, red above."

STYLE = """
#heading .html-container, #answers .html-container { padding: 0; }
#answers { --quiet: color-mix(in srgb, var(--body-text-color) 72%, transparent); }
.picture { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 14px 18px; margin-bottom: 16px;
  background: var(--block-background-fill); }
.picture h3 { margin: 0 0 4px; font-size: 1.05rem; overflow-wrap: anywhere; }
.picture h3 small, .picture .note { font-weight: normal; color: var(--quiet); }
.picture .answer { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 3fr) minmax(0, 5fr); gap: 8px 24px;
  padding: 12px 0; align-items: start; }
.picture .answer + .answer { border-top: 1px solid var(--border-color-primary); }
.picture .title { grid-column: 1 / -1; display: flex; gap: 14px; align-items: baseline; flex-wrap: wrap; }
.picture .title b { font-size: 1rem; overflow-wrap: anywhere; }
.picture .time { font-variant-numeric: tabular-nums; }
.picture h4 { margin: 0 0 6px; font-size: .85rem; color: var(--quiet); font-weight: 600; }
.picture img { display: block; max-width: 100%; margin: 0; border-radius: 3px; }
.picture img.large { max-height: 460px; }
.picture img.tiny { width: 100%; max-width: 320px; image-rendering: pixelated; }
.picture .lines { list-style: none; margin: 0; padding: 0; }
.picture .lines li { margin: 0 0 7px; padding: 0; }
.picture .lines .row { display: flex; justify-content: space-between; gap: 10px; }
.picture .lines .share { font-variant-numeric: tabular-nums; }
.picture .swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .5em; }
.picture .bar { height: 5px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden; }
.picture .bar i { display: block; height: 100%; background: #3b82c4; }
.picture .maps { display: grid; gap: 6px; grid-template-columns: 5.4em repeat(var(--columns), minmax(0, 1fr));
  font-size: .78rem; align-items: center; }
.picture .maps img { width: 100%; }
.picture .maps .head { text-align: center; color: var(--quiet); }
.picture .key { margin: 8px 0 0; font-size: .78rem; color: var(--quiet); }
.picture .error, .notice { color: var(--error-text-color, #b91c1c); margin: 4px 0; overflow-wrap: anywhere; }
.hint { color: var(--quiet); padding: 16px 0; }
@media (max-width: 900px) { .picture .answer { grid-template-columns: minmax(0, 1fr); } }
"""


def paragraph(kind: str, sentence: str) -> str:
    """A 'notice' above the results, a 'hint' instead of results, or an 'error', which says why there is no answer."""
    role = "" if kind == "hint" else ' role="alert"'
    return f'<p class="{kind}"{role}>{escape(sentence)}</p>'


def card(name: str, size: tuple[int, int] | None, answers: list[str]) -> str:
    """An image with the name of its file, its (width, height) where it can be read, and what was answered."""
    pixels = f" <small>{size[0]} &times; {size[1]}</small>" if size else ""
    return f'<article class="picture"><h3>{escape(name)}{pixels}</h3>{"".join(answers)}</article>'


def answer(name: str, note: str, look: Look) -> str:
    """A model's answer, under its name and a note on it: what it found, the time, the image, the maps."""
    title = f"<b>{escape(name)}</b>"
    title += f'<span class="time">{look.milliseconds:.1f} ms in the network</span>'
    title += f'<span class="note">{escape(note)}</span>' if note else ""
    drawn = _image(look.image, LARGE, f"what {name} found", "tiny" if max(look.image.size) <= PIXELS else "large")
    found = f"<div><h4>{look.words.heading}</h4>{_lines(look)}</div>"
    return f'<div class="answer"><div class="title">{title}</div><div>{drawn}</div>{found}{_maps(look, name)}</div>'


def _lines(look: Look) -> str:
    if not look.lines:
        return f'<p class="note">{escape(look.words.nothing)}</p>'
    rows = []
    for line in look.lines[:LINES]:
        fill = "#" + bytes(line.colour).hex() if line.colour else ""
        swatch = f'<span class="swatch" style="background:{fill}"></span>' if fill else ""
        bar = f'<div class="bar"><i style="width:{line.value:.1%}{f";background:{fill}" if fill else ""}"></i></div>'
        words = f'<span class="label">{swatch}{escape(line.label)}</span><span class="share">{line.value:.1%}</span>'
        rows.append(f'<li><div class="row">{words}</div>{bar}</li>')
    more = len(look.lines) - LINES
    rest = f'<p class="note">and {more} more</p>' if more > 0 else ""
    return f'<ul class="lines">{"".join(rows)}</ul>{rest}'


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
    """An image as a data URL: exact where it is small, else as JPEG."""
    shown, stream = image.copy(), io.BytesIO()
    shown.thumbnail((side, side))
    coding = "png" if max(shown.size) <= PIXELS else "jpeg"
    shown.save(stream, coding, quality=88)
    data = f"data:image/{coding};base64,{base64.b64encode(stream.getvalue()).decode()}"
    return f'<img class="{kind}" alt="{escape(alt)}" title="{escape(alt)}" src="{data}">'
