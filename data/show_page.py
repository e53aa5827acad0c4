"""HTML of documents and of packed rows: pictures inside, nothing from elsewhere, every text escaped.

A token is coloured by what it is, and filled by how much is learned from predicting it.
"""

import base64
import html
import io
import json
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.document import Document
from data.findings import printable
from data.images import header, load_image

SIDE = 320
"""Pixels; larger pictures are made smaller for the page."""
LONGEST = 4_000
"""Characters of a text that are shown."""

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1200px;padding:0 1em;color:#222}h1{margin-bottom:0}
h2{margin-top:2em;border-bottom:1px solid #ddd}p{max-width:85ch}table{border-collapse:collapse;margin:.5em 0}
td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #eee}td:first-child,th:first-child{text-align:left}
.dim{color:#777;font-size:13px}code{background:#f3f3f3;padding:.1em .3em}.cards{display:flex;flex-wrap:wrap;gap:26px;margin:1.2em 0}
.cards b{font-size:26px;font-weight:600}.cards span{display:block;color:#555;font-size:13px}
.grid{display:flex;flex-wrap:wrap;gap:14px;align-items:flex-start}
.doc{border:1px solid #ddd;border-radius:8px;padding:10px 12px;max-width:560px;overflow-wrap:anywhere;box-sizing:border-box}
.doc.bad{border-color:#b3261e;background:#fdf3f2}.doc h3{font:12px ui-monospace,monospace;color:#777;margin:0 0 6px}
.doc p{margin:.35em 0;white-space:pre-wrap}.doc img{display:block;max-width:100%;margin:.35em 0;border:1px solid #ccc}
img.small{image-rendering:pixelated}.doc dl{margin:.35em 0}dt{color:#555}dd{margin:0 0 .3em 1.2em}
.turn{border-radius:12px;padding:4px 12px;margin:.4em 0;width:fit-content;max-width:85%}.turn p,.turn img{margin:.2em 0}
.system{background:#f3f3f3;color:#555;margin-inline:auto}.user{background:#e3edfb;margin-left:auto}.assistant{background:#e8f4e5}
details summary{cursor:pointer;color:#777;font-size:13px}pre{white-space:pre-wrap;font-size:12px}
.key{display:inline-block;width:1.6em;border-radius:3px;text-align:center}svg text{font:11px system-ui,sans-serif;fill:#555}
"""
TOKEN_STYLE = """
.row{margin:.8em 0 1.6em}.fill{display:flex;height:14px;border-radius:3px;overflow:hidden;background:#eee;margin:.4em 0}
.fill i{border-right:1px solid #fff;background:#9aa7b8}
.seq{border-left:3px solid #222;padding:2px 0 4px 12px;margin:10px 0;display:flex;gap:16px}.seq>div:first-child{flex:1;min-width:0}
.seq h3{font:12px ui-monospace,monospace;color:#777;margin:0 0 4px}.seq aside{width:210px;flex:none;font-size:12px}
.seq aside .doc{padding:6px 8px}.seq.cut{border-left-style:dotted}
b.t,b.c,b.i{font:12px/1.75 ui-monospace,monospace;font-weight:400;
border:1px solid;border-radius:3px;padding:0 2px;margin:0 1px 2px 0;white-space:pre;
display:inline-block;min-width:.5em;min-height:1.4em;vertical-align:top;box-sizing:border-box}
b.t{border-color:#7fa3d9;background:rgb(127 163 217/calc(var(--w,1)*.5))}
b.c{border-color:#d9a04a;background:rgb(217 160 74/calc(var(--w,1)*.55))}
b.i{border-color:#74b36b;background:rgb(116 179 107/calc(var(--w,1)*.5))}b.o{--w:0;color:#777}
figure{display:inline-block;margin:2px 4px;vertical-align:top}figure img{display:block;min-width:96px;border:2px solid #74b36b}
figure details[open]{max-width:640px}
"""


class Token(NamedTuple):
    """One token of a row, as it is shown."""

    id: int
    kind: str
    """t text, c control, i image code"""
    words: str
    """What it stands for."""
    weight: float
    """Loss weight of predicting it."""


def opening(title: str, about: str, numbers: Iterable[tuple[str, str]]) -> str:
    """`about` is HTML; numbers are (value, what it is)."""
    cards = "".join(f"<div><b>{html.escape(value)}</b><span>{html.escape(what)}</span></div>" for value, what in numbers)
    return (f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
            f"<title>{title}</title><style>{STYLE}{TOKEN_STYLE}</style><h1>{title}</h1><p>{about}</p><div class=cards>{cards}</div>")


def words(text: str) -> str:
    """A text, escaped, without control characters; the beginning of a long one."""
    more = f"<span class=dim> … {len(text) - LONGEST:,} more characters</span>" if len(text) > LONGEST else ""
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text[:LONGEST])) + more


def picture(file: bytes) -> str:
    """A picture file, as it is where it is small, else made smaller."""
    try:
        kind, width, height = header(file)
        if kind not in ("PNG", "JPEG", "WEBP") or max(width, height) > SIDE:
            image = load_image(file)
            image.thumbnail((SIDE, SIDE))
            out = io.BytesIO()
            image.save(out, "webp", quality=85)
            file, shown = out.getvalue(), "webp"
        else:
            load_image(file)
            shown = kind.lower()
    except ValueError as error:
        return f"<p class=bad>✗ {words(str(error))}</p>"
    return f"{image_tag(file, shown, min(width, height))}<span class=dim>{width} × {height} {kind}</span>"


def image_tag(file: bytes, kind: str, side: int) -> str:
    """`side`: the shorter one in pixels; small pictures are enlarged."""
    small = f" class=small style='min-width:{min(128, 4 * side)}px'" if side < 96 else ""
    return f"<img{small} alt='' src='data:image/{kind};base64,{base64.b64encode(file).decode()}'>"


# Documents --------------------------------------------------------------------------------------------------------

def document(doc: Document, folded: bool = False) -> str:
    """A card: parts in reading order, a conversation as its turns; what else is known of it may be folded."""
    shown = [f"<p>{words(part) or '<span class=dim>(empty)</span>'}</p>" if isinstance(part, str) else picture(part) for part in doc.parts]
    if doc.roles:
        shown = [f"<div class='turn {role}'>{part}</div>" for role, part in zip(doc.roles, shown, strict=True)]
    more = "".join(f"<p class=dim>also: {words(caption)}</p>" for caption in doc.captions)
    if doc.questions:
        more += "<dl>" + "".join(f"<dt>{words(q)}<dd>{words(a)}" for q, a in doc.questions) + "</dl>"
    if doc.meta:
        more += f"<details><summary>meta</summary><pre>{words(json.dumps(doc.meta, ensure_ascii=False, default=str))}</pre></details>"
    if folded and more:
        more = f"<details><summary>captions, questions, meta</summary>{more}</details>"
    return f"<div class=doc><h3>{_name(doc.key)}</h3>{''.join(shown)}{more}</div>"


def refused(key: str, why: str) -> str:
    return f"<div class='doc bad'><h3>{_name(key)}</h3><p>✗ {words(why)}</p></div>"


def _name(key: str) -> str:
    return html.escape(printable(key))


# Rows -------------------------------------------------------------------------------------------------------------

LEGEND = ("<p><b class=t>text</b> <b class=c>control</b> <b class=i>image code</b> Filled: predicting it is learned from. "
          "<b class='t o'>Hollow</b>: it is only read. A bar at the left begins a document; documents do not see each other. "
          "Point at a token for its id.</p>")


def span(token: Token) -> str:
    weight = f" style=--w:{token.weight:.2f}" if token.weight not in (0, 1) else ""
    title = html.escape(f"{token.id} {printable(token.words)}", quote=True) + (f" · weight {token.weight:g}" if token.weight != 1 else "")
    return f"<b class='{token.kind}{'' if token.weight else ' o'}'{weight} title=\"{title}\">{_shown(token)}</b>"


def _shown(token: Token) -> str:
    if token.kind == "i":
        return token.words.rpartition("_")[2].strip(">").lstrip("0") or "0"
    return html.escape(token.words if token.words.isprintable() else repr(token.words)[1:-1])


def coded(tokens: Sequence[Token], shown: np.ndarray | None) -> str:
    """A picture in its place, uint8 [H, W, 3], with its codes folded."""
    image = ""
    if shown is not None:
        out = io.BytesIO()
        Image.fromarray(shown).save(out, format="webp", lossless=True)
        image = image_tag(out.getvalue(), "webp", min(shown.shape[:2]))
    learned = "" if any(token.weight for token in tokens) else ", only read"
    return f"<figure>{image}<details><summary>{len(tokens):,} codes{learned}</summary>{''.join(map(span, tokens))}</details></figure>"


def sequence(key: str, length: int, body: str, raw: str, cut: bool) -> str:
    """`raw`: HTML of the document it was; `cut`: it does not begin here."""
    head = f"{_name(key)} · {length:,} tokens{' · goes on from another row' if cut else ''}"
    return (f"<div class='seq{' cut' if cut else ''}'><div><h3>{head}</h3>{body}</div>"
            f"{f'<aside>{raw}</aside>' if raw else ''}</div>")


def filling(lengths: Sequence[int], row_len: int) -> str:
    """A bar: how documents fill a row."""
    return "<div class=fill>" + "".join(f"<i style='width:{100 * n / row_len:.3f}%' title='{n:,} tokens'></i>" for n in lengths) + "</div>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows)
    return "<table><tr>" + "".join(f"<th>{html.escape(cell)}" for cell in head) + body + "</table>"


def histogram(values: Sequence[int], what: str, bins: int = 48) -> str:
    """Bars of how often which length occurs, in steps that grow with it, as SVG."""
    if not values:
        return ""
    edges = np.unique(np.geomspace(min(values) + 1, max(values) + 2, bins).round().astype(int)) - 1  # one by one, then by a factor
    counts, _ = np.histogram(values, edges)
    width, height, high = 640, 150, max(int(counts.max()), 1)
    step = width / len(counts)
    bars = "".join(
        f"<rect x='{i * step:.1f}' y='{height - height * n / high:.1f}' width='{max(step - 1, 1):.1f}' height='{height * n / high:.1f}' "
        f"fill='#7fa3d9'><title>{edges[i]:,} to {edges[i + 1]:,}: {n:,}</title></rect>" for i, n in enumerate(counts) if n)
    marks = "".join(f"<text x='{i * step:.0f}' y='{height + 16}'>{edges[i]:,}</text>" for i in range(0, len(counts), -(-len(counts) // 8)))
    return (f"<svg viewBox='0 -14 {width} {height + 36}' width={width} role=img><text x='0' y='-3'>{html.escape(what)}, at most {high:,} a "
            f"bar</text><line x1='0' y1='{height}' x2='{width}' y2='{height}' stroke='#ccc'/>{bars}{marks}</svg>")
