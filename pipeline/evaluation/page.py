"""The report's HTML: one file that carries everything it shows.

In: text, tables, SVG and pixels. Out: HTML. No script, no outside reference; light or dark as the reader's system is.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

CSS = """
:root { color-scheme: light dark; --ink: #1d2127; --soft: #5d6672; --line: #d9dde3; --paper: #fbfbfc; --card: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e6ea; --soft: #9aa4b1; --line: #363c45; --paper: #16191d; --card: #1d2126; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 20px 16px 60px; }
h1 { font-size: 24px; margin: 8px 0 4px; } h2 { font-size: 19px; margin: 40px 0 8px; }
h3 { font-size: 16px; margin: 24px 0 6px; }
p { margin: 4px 0 10px; max-width: 75ch; } .soft { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 14px; }
.cards:has(> .card) { grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; margin: 0;
  min-width: 0; }
.card h3 { margin: 0 0 6px; overflow-wrap: anywhere; } .swatch { display: inline-block; width: 11px; height: 11px;
  border-radius: 3px; margin-right: 7px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 12px; margin: 0; } dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
figure > svg, figure > img { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: 13px; margin-top: 6px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: baseline; }
th { font-weight: 600; } td.value { text-align: right; font-weight: 600; white-space: nowrap; }
td.soft, .under { font-size: 13px; }
th.value { text-align: right; }
.stacks { display: grid; grid-template-columns: repeat(auto-fill, minmax(max(100px, 14%), 1fr)); gap: 10px; }
.stack img { display: block; width: 100%; height: auto; margin-bottom: 3px; border-radius: 3px; }
.under { display: none; }
@media (max-width: 700px) { td.soft, th:last-child { display: none; } .under { display: block; }
  td { padding-right: 8px; } }
.pixels { image-rendering: pixelated; } .wide { overflow-x: auto; } .wide > svg { min-width: 640px; }
main > figure + figure { margin-top: 14px; }
details { margin: 14px 0; } summary { cursor: pointer; color: var(--soft); margin-bottom: 10px; }
.note { border-left: 3px solid #d9772e; padding: 4px 12px; margin: 10px 0; }
"""


def document(title: str, body: Iterable[str]) -> str:
    """The whole file."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, css: str = "soft") -> str:
    return f'<p class="{css}">{escape(text)}</p>'


def note(text: str) -> str:
    """Something that could not be shown, and why."""
    return f'<p class="note">{escape(text)}</p>'


def figure(content: str, caption: str = "", css: str = "") -> str:
    """SVG or an image with its caption."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="{css}">{content}{below}</figure>'


def cards(items: Iterable[str]) -> str:
    """Figures or cards side by side where there is room, one below the other where there is not."""
    return f'<div class="cards">{"".join(items)}</div>'


def card(title: str, colour: str, facts: Sequence[tuple[str, str]]) -> str:
    """Names and values of one run."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    swatch = f'<span class="swatch" style="background:{colour}"></span>'
    return f'<div class="card"><h3>{swatch}{escape(title)}</h3><dl>{rows}</dl></div>'


def table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str], str]]) -> str:
    """A row is (name, one value a column, meaning)."""
    head = "<th></th>" + "".join(f'<th class="value">{escape(column)}</th>' for column in columns) + "<th></th>"
    body = "".join(
        f'<tr><td>{escape(name)}<div class="under soft">{escape(meaning)}</div></td>'
        + "".join(f'<td class="value">{escape(value)}</td>' for value in values)
        + f'<td class="soft">{escape(meaning)}</td></tr>'
        for name, values, meaning in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def details(summary: str, content: str) -> str:
    """Folded away until asked for."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def stacks(columns: Iterable[Sequence[str]]) -> str:
    """Images in stacks, as many stacks a row as fit."""
    return (
        '<div class="stacks">' + "".join(f'<div class="stack">{"".join(images)}</div>' for images in columns) + "</div>"
    )


def image(pixels: Any, alternative: str, css: str = "") -> str:
    """An image that the page itself carries: uint8 ``(height, width, 3)``."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(buffer, "PNG", optimize=True)
    source = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="{css}" alt="{escape(alternative, quote=True)}" src="data:image/png;base64,{source}">'
