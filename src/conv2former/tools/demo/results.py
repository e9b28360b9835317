"""What models make of pictures, as HTML. Every text goes through ``escape``; pictures are in it as data."""

from __future__ import annotations

import base64
import io
from html import escape

from PIL import Image

from conv2former.tools.demo.models import Look, Panels

LARGE, SMALL = 1024, 320  # longest sides of pictures and of maps on the page
PIXELS = 96  # pictures up to this side are enlarged with their pixels visible
LINES = 12  # that are shown
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


def notice(sentence: str) -> str:
    """A sentence above the results."""
    return f'<p class="notice" role="alert">{escape(sentence)}</p>'


def hint(sentence: str) -> str:
    """A sentence in the place of results."""
    return f'<p class="hint">{escape(sentence)}</p>'


def picture_card(name: str, size: tuple[int, int] | None, answers: list[str]) -> str:
    """A picture with what was answered.

    Args:
        name: Of its file.
        size: Width and height in pixels; None where it cannot be read.
        answers: Of ``answer`` and ``failure``.
    """
    pixels = f" <small>{size[0]} &times; {size[1]}</small>" if size else ""
    return f'<article class="picture"><h3>{escape(name)}{pixels}</h3>{"".join(answers)}</article>'


def failure(sentence: str) -> str:
    """Why there is no answer."""
    return f'<p class="error" role="alert">{escape(sentence)}</p>'


def answer(name: str, note: str, look: Look) -> str:
    """A model's answer: what it found, the time, the picture, the maps.

    Args:
        name: Of the model.
        note: What to know of it.
        look: What it made of the picture.
    """
    title = f"<b>{escape(name)}</b>"
    title += f'<span class="time">{look.milliseconds:.1f} ms in the network</span>'
    title += f'<span class="note">{escape(note)}</span>' if note else ""
    tiny = max(look.picture.size) <= PIXELS
    drawn = _image(look.picture, LARGE, f"what {name} found", "tiny" if tiny else "large")
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
    if not look.maps:
        return f'<p class="note">{escape(look.no_maps)}</p>' if look.no_maps else ""
    key = f'<p class="key">{KEY}</p>'
    return f"<div><h4>Modulation weights A and product A * V</h4>{_grid(look.maps, name)}{key}</div>"


def _grid(maps: Panels, name: str) -> str:
    """Blocks as rows, the kinds of maps as columns; single channels have their numbers below."""
    titles = [title for title, _ in maps[0][1]]
    heads = [title.replace(", all channels", "") if "channel " not in title else "A, one channel" for title in titles]
    cells = ["<span></span>", *(f'<span class="head">{escape(head)}</span>' for head in heads)]
    for block, panels in maps:
        lines = block.replace(", ", "\n").split("\n")
        cells.append(f"<span>{'<br>'.join(escape(line).replace(' x ', ' &times; ') for line in lines)}</span>")
        for title, values in panels:
            alt = f"{name}, {lines[0]}: {title}"
            cells.append(_image(Image.fromarray(values), SMALL, alt, "tiny" if max(values.shape) <= PIXELS else ""))
    return f'<div class="maps" style="--columns:{len(heads)}">{"".join(cells)}</div>'


def _image(picture: Image.Image, side: int, alt: str, kind: str) -> str:
    shown = picture.copy()
    shown.thumbnail((side, side))
    return f'<img class="{kind}" alt="{escape(alt)}" title="{escape(alt)}" src="{_data(shown)}">'


def _data(picture: Image.Image) -> str:
    """A picture as a data URL: exact where it is small, else as JPEG."""
    stream = io.BytesIO()
    if max(picture.size) <= PIXELS:
        picture.save(stream, "PNG")
        kind = "png"
    else:
        picture.save(stream, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
