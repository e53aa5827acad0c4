"""The page of a tokenizer's evaluation: one file, pictures inside. Numbers first, then what they mean to the eye, then what each is."""

import base64
import html
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data.images import to_png
from mmllm.evaluate.report import STYLE
from mmllm.evaluate.visual_tally import SHOWN, Pictures, Shown, Tally
from tokenizer import features, legibility, metrics
from tokenizer.legibility import Read
from tokenizer.perceptual import Perceptual

MORE_STYLE = """
img.q{width:172px;image-rendering:auto;border:1px solid #ccc;display:block}img.small{image-rendering:pixelated}
img.line{height:32px;max-width:230px;border:1px solid #ccc}
figure.row{display:flex;gap:4px;width:auto;flex-wrap:wrap}figure.row div{width:174px;overflow-wrap:anywhere}
dt{font-weight:600;margin-top:.8em}dd{margin:0;max-width:90ch;white-space:pre-line}
"""
HEADLINE = (("psnr", "PSNR", "{:.2f} dB"), ("ssim", "SSIM", "{:.3f}"), ("ms_ssim", "MS-SSIM", "{:.3f}"), ("rfid", "rFID", "{:.2f}"),
            ("fd_teacher", "FD, own tower", "{:.3g}"), ("pfid", "pFID", "{:.2f}"), ("pfd_teacher", "perturbed FD, own tower", "{:.3g}"),
            ("usage", "codes used", "{:.0%}"), ("perplexity", "perplexity", "{:.0f}"), ("reencode", "kept when coded again", "{:.1%}"))
DEFINITIONS: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("psnr, psnr_mean", metrics.psnr), ("ssim", metrics.ssim), ("ms_ssim", metrics.ms_ssim),
    ("lpips_NAME", Perceptual), ("Fréchet distance", metrics.frechet_distance), ("rfid", features.inception),
    ("fid_clip:NAME", features.clip), ("fd_teacher", features.teacher), ("codes", features.codes),
    ("pfid, pfid_clip:NAME, pfd_teacher", Tally.perturb),
    ("usage, perplexity", metrics.code_use), ("reencode, as_finest", metrics.agreement), ("zero_shot", metrics.zero_shot),
    ("linear_probe", metrics.linear_probe), ("legibility", legibility.legibility))


def page(record: Mapping[str, Any], tally: Tally, reads: Sequence[Read]) -> Iterable[str]:
    scores, model, source = record["scores"], record["model"], record["source"]
    title = "mmllm visual tokenizer"
    yield f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}{MORE_STYLE}</style><h1>{title}</h1>"
    yield (f"<p><code>{html.escape(model['folder'])}</code> ({model['fingerprint']}) on {source['pictures']:,} pictures of "
           f"<code>{html.escape(source['path'])}</code>, {model['image_size']} px: {scores['codes_a_picture']:.0f} codes a picture from "
           f"{model['num_books']} × {model['codebook_size']:,} entries, {scores['bits_a_picture']:.0f} bits. "
           f"Commit {record['commit'][:10]}, {record['seconds']:.0f} s.</p>")
    yield "<div class=cards>" + "".join(f"<div><b class=big>{form.format(scores[key])}</b><span>{name}</span></div>"
                                        for key, name, form in HEADLINE if key in scores) + "</div>"
    yield "<h2>Numbers</h2>" + _numbers(scores)
    missing: Mapping[str, str] = record["not_measured"]
    for why in dict.fromkeys(missing.values()):
        what = ", ".join(name for name, reason in missing.items() if reason == why)
        yield f"<p class=dim>{html.escape(what)}: not measured, {html.escape(why)}</p>"
    for note in record["notes"]:
        yield f"<p class=dim>{html.escape(note)}</p>"
    if source["skipped"]:
        yield f"<details><summary>Pictures refused: {len(source['skipped']):,}</summary><ul>" + "".join(
            f"<li>{html.escape(one['name'])}: {html.escape(one['reason'])}" for one in source["skipped"][:50]) + "</ul></details>"
    half = min(SHOWN, (len(tally.shown) + 1) // 2)
    yield "<h2>Worst</h2><p>Original, reconstruction, and their difference × 4.</p>" + _compared(tally.shown[:half])
    yield "<h2>Best</h2>" + _compared(tally.shown[half:][::-1])
    yield ("<h2>Perturbed</h2><p>As when a language model draws and errs: a share α of the codes is replaced by one of the δ nearest "
           "entries.</p>")
    for row in tally.perturbed:
        yield _row([(picture, html.escape(name)) for name, picture in row.items()])
    if reads:
        yield "<h2>Text</h2><p>Characters (and whole words) that a program reads of words drawn at several heights, before and after.</p>"
        yield _legibility(scores["legibility"]) + _lines(reads)
    yield "<h2>Codebooks</h2><table><tr><th>book<th>used<th>perplexity<th>kept when coded again" + "".join(
        f"<tr><td>{at}<td>{book['usage']:.1%}<td>{book['perplexity']:.1f}<td>{kept:.1%}"
        for at, (book, kept) in enumerate(zip(scores["books"], scores["reencode_books"], strict=True))) + "</table>"
    yield "<h2>What each number is</h2><dl><dt>all<dd>" + _words(metrics)
    yield "".join(f"<dt>{name}<dd>{_words(function)}" for name, function in DEFINITIONS) + "</dl>"
    text = html.escape(json.dumps(record, indent=1, default=str))
    yield f"<details><summary>eval.json</summary><pre>{text}</pre></details>"


def _words(definition: Any) -> str:
    return html.escape(inspect.getdoc(definition) or "").replace("\n\n", "\0").replace("\n", " ").replace("\0", "\n")


def _numbers(scores: Mapping[str, Any]) -> str:
    """A row a measure, a column a scale; what has an original and a reconstruction, and what has a grid, in tables of their own."""
    columns: Mapping[str, Mapping[str, Any]] = scores.get("scales", {"": {}})
    names = dict.fromkeys(name for column in (scores, *columns.values()) for name, value in column.items() if isinstance(value, float))
    finest = next(iter(columns))
    out = _table(["", *(f"scale {scale}" if scale else "" for scale in columns)],
                 [[name, *(column.get(name, scores.get(name) if scale == finest else None) for scale, column in columns.items())]
                  for name in names])
    for kind in ("zero_shot", "linear_probe"):
        if kind in scores:
            out += _table([f"{kind}, {scores['classes']} classes", "original", "reconstruction"],
                          [[name, sides["original"], sides["reconstruction"]] for name, sides in scores[kind].items()])
    grids: Mapping[str, Mapping[str, float]] = scores["perturbed"]
    return out + _table(["perturbed", *next(iter(grids.values()))], [[name, *grid.values()] for name, grid in grids.items()])


def _table(head: Sequence[str], rows: Iterable[Sequence[str | float | None]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell) if isinstance(cell, str) else _number(cell)}" for cell in row) for row in rows)
    return "<table><tr>" + "".join(f"<th>{html.escape(cell)}" for cell in head) + body + "</table>"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _png(picture: Pictures) -> str:
    return f"data:image/png;base64,{base64.b64encode(to_png(picture)).decode()}"


def _image(picture: Pictures) -> str:
    return f"<img class='q{' small' if picture.shape[1] < 172 else ''}' src='{_png(picture)}'>"


def _row(pictures: Sequence[tuple[Pictures, str]]) -> str:
    return "<figure class=row>" + "".join(f"<div>{_image(picture)}{words}</div>" for picture, words in pictures) + "</figure>"


def _compared(shown: Sequence[Shown]) -> str:
    def difference(one: Shown) -> Pictures:
        return (np.abs(one.original.astype(int) - one.rebuilt) * 4).clip(0, 255).astype(np.uint8)

    return "<div class=grid>" + "".join(_row([(one.original, html.escape(one.name)), (one.rebuilt, f"{one.psnr:.1f} dB"),
                                              (difference(one), "× 4")]) for one in shown) + "</div>"


def _legibility(rows: Sequence[Mapping[str, Any]]) -> str:
    def cell(side: Mapping[str, float]) -> str:
        return f"<td>{side['characters']:.0%} <span class=dim>({side['words']:.0%})</span>"

    return "<table><tr><th>ground<th>height<th>words<th>original<th>reconstruction" + "".join(
        f"<tr><td>{row['ground']}<td>{row['height']} px<td>{row['count']}{cell(row['original'])}{cell(row['rebuilt'])}"
        for row in rows) + "</table>"


def _lines(reads: Sequence[Read]) -> str:
    """The first two words of each ground and height, with what was read."""
    groups: dict[tuple[str, int], list[Read]] = {}
    for one in reads:
        groups.setdefault((one.case.ground, one.case.height), []).append(one)
    cells = [one for group in groups.values() for one in group[:2]]
    return "<table><tr><th>drawn<th>height<th>original<th>read<th>reconstruction<th>read" + "".join(
        f"<tr><td>{one.case.word}<td>{one.case.height} px" + "".join(
            f"<td><img class=line src='{_png(line)}'><td><span class={'good' if said == one.case.word else 'bad'}>"
            f"{html.escape(said) or '–'}</span>" for line, said in zip((one.original, one.rebuilt), one.said, strict=True))
        for one in cells) + "</table>"
