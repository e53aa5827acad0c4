"""The page of an evaluation, or of several side by side: one file, pictures inside. Each number is drawn as a point in its interval."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmllm.evaluate.report import STYLE, TITLES

MORE_STYLE = """
td.n{white-space:nowrap}td small{color:#777}svg{vertical-align:middle}
figure.example{width:auto;max-width:270px}figure.example img{max-width:128px;height:auto;width:128px}
"""
COLOURS = ("#1f6fb4", "#c4631a", "#187a2f", "#8a3ab9", "#b3261e", "#777777")
WIDTH, ROW = 190, 9
"""px of a strip of intervals, and of each run in it."""
WHAT = {
    "captions": "Its descriptions beside all texts of each picture.",
    "questions": "Answers, right or wrong, by the kind of answer and by what is asked. All questions of a picture are one unit.",
    "retrieval": "The right text of a picture, or picture of a text, among others, by likelihood.",
    "perplexity": "How well documents are foreseen. Less is better.",
    "scenes": "Pictures drawn from prompts and read back by a detector: right is all that was asked and nothing besides.",
    "pictures": "Pictures drawn from captions, beside the real ones. Of distances less is better.",
    "geneval": "GenEval's prompts, judged by its own scorer.",
    "text": "lm-evaluation-harness on the exported folder.",
    "served": "The same questions asked through a server.",
}
Record = Mapping[str, Any]
Differences = Mapping[str, Mapping[str, Sequence[Mapping[str, Any] | None]]]
"""By task and number: of each run but the first, how it differs from the first."""


def page(records: Sequence[Record], differences: Differences) -> Iterable[str]:
    title = "mmllm evaluation" if len(records) == 1 else f"mmllm: {len(records)} evaluations"
    yield f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}{MORE_STYLE}</style><h1>{title}</h1><table>"
    yield "<tr><th>run<th>model<th>shards<th>commit"
    for number, record in enumerate(records):
        yield (f"<tr><td>{_dot(number)} {name_of(number)}<td><code>{html.escape(record['model'])}</code> ({record['fingerprint']})"
               f"<td><code>{html.escape(str(record['shards']))}</code><td>{record['commit'][:10]}")
    yield ("</table><p>In brackets, and as a line around each point: the interval of 95 %, by bootstrap over units (pictures with their "
           "questions, prompts, examples). One without width means that all units agreed: of n that never failed, up to 3/n may fail.</p>")
    if len(records) > 1:
        yield _cautions(records, differences)
    for task in dict.fromkeys(task for record in records for task in record["tasks"]):
        found = [record["tasks"].get(task, {}) for record in records]
        rows = list(dict.fromkeys(what for one in found for what in one.get("scores", {})))
        missing = dict.fromkeys(f"{what}: not measured, {why}" for one in found for what, why in one.get("missing", {}).items())
        yield f"<h2>{task}</h2><p>{WHAT.get(task, '')}</p>"
        yield from (f"<p class=dim>{html.escape(why)}</p>" for why in missing)
        if rows:
            yield from _table(rows, found, differences.get(task, {}))
        for note in dict.fromkeys(note for one in found for note in one.get("notes", ())):
            yield f"<p class=dim>{html.escape(note)}</p>"
        for number, one in enumerate(found):
            if one.get("examples"):
                yield from _examples(one["examples"], "" if len(records) == 1 else f" of run {name_of(number)}")


def titled(split: str) -> str:
    return str(TITLES.get(split, split))


def name_of(number: int) -> str:
    """A, B, …"""
    return chr(ord("A") + number)


def _cautions(records: Sequence[Record], differences: Differences) -> str:
    count = sum(one is not None for rows in differences.values() for some in rows.values() for one in some)
    sets = {str(record["shards"]) for record in records}
    apart = "" if len(sets) == 1 else " <b class=bad>The runs are on different shards.</b>"
    return (f"<p>B − A is paired where both did the same units, else (≠) as of two samples. Marked is a difference whose interval leaves "
            f"out 0: <b class=good>better</b>, <b class=bad>worse</b>. Of {count} differences about {math.ceil(count / 20)} would be "
            f"marked were all models alike.{apart}</p>")


def _table(rows: Sequence[str], found: Sequence[Record], differences: Mapping[str, Sequence[Mapping[str, Any] | None]]) -> Iterable[str]:
    splits = list(dict.fromkeys(what.split("/")[0] for what in rows))
    for split in splits:
        yield f"<table><tr><th>{html.escape(titled(split))}<th>" + "".join(
            f"<th>{name_of(number) if len(found) > 1 else 'value'}" + (f"<th>{name_of(number)} − A" if number else "")
            for number in range(len(found))) + "<th>units"
        for what in rows:
            if what.split("/")[0] != split:
                continue
            scores = [one.get("scores", {}).get(what) for one in found]
            cells = ""
            for number, score in enumerate(scores):
                cells += f"<td class=n>{_value(score)}"
                if number:
                    some = differences.get(what, ())
                    cells += f"<td class=n>{_difference(some[number - 1] if some else None, (score or {}).get('better', 1))}"
            units = next((score["units"] for score in scores if score), 0)
            yield f"<tr><td>{html.escape(what[len(split) + 1:].replace('_', ' '))}<td>{_strip(scores)}{cells}<td>{units:,}"
        yield "</table>"


def _short(value: float) -> str:
    return "–" if not math.isfinite(value) else f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"


def _value(score: Mapping[str, Any] | None) -> str:
    return "–" if score is None else f"{_short(score['value'])} <small>[{_short(score['low'])}, {_short(score['high'])}]</small>"


def _difference(one: Mapping[str, Any] | None, better: int) -> str:
    if one is None:
        return "–"
    sure = one["low"] > 0 or one["high"] < 0
    kind = ("good" if (one["value"] > 0) == (better > 0) else "bad") if sure else "dim"
    sign = "" if one["paired"] else " ≠"
    return f"<span class={kind}>{'+' if one['value'] >= 0 else ''}{_short(one['value'])}</span> " \
           f"<small>[{_short(one['low'])}, {_short(one['high'])}]{sign}</small>"


def _strip(scores: Sequence[Mapping[str, Any] | None]) -> str:
    """Points in their intervals, one under the other; shares on [0, 1], other numbers on what the intervals span."""
    known = [(number, score) for number, score in enumerate(scores)
             if score and all(math.isfinite(score[key]) for key in ("value", "low", "high"))]
    if not known:
        return ""
    low, high = min(s["low"] for _, s in known), max(s["high"] for _, s in known)
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    else:
        low, high = min(0.0, low), max(high, low + 1e-9)

    def x(value: float) -> float:
        return 4 + (WIDTH - 8) * (value - low) / (high - low)

    marks = "".join(
        f"<g stroke='{colour}' fill='{colour}'><line x1={x(s['low']):.1f} x2={x(s['high']):.1f} y1={y} y2={y} stroke-width=2 />"
        f"<circle cx={x(s['value']):.1f} cy={y} r=3><title>{name_of(n)}: {_short(s['value'])}</title></circle></g>"
        for n, s in known for y, colour in [(ROW // 2 + 1 + ROW * n, COLOURS[n % len(COLOURS)])])
    height = ROW * len(scores) + 2
    return (f"<svg width={WIDTH} height={height}><line x1=4 x2={WIDTH - 4} y1={height - 1} y2={height - 1} stroke='#ddd' />"
            f"{marks}</svg>")


def _dot(number: int) -> str:
    return f"<svg width=10 height=10><circle cx=5 cy=5 r=4 fill='{COLOURS[number % len(COLOURS)]}' /></svg>"


def _examples(examples: Sequence[Mapping[str, Any]], of: str) -> Iterable[str]:
    for split in dict.fromkeys(one["split"] for one in examples):
        yield f"<details><summary>Examples{of}: {html.escape(titled(split))}</summary><div class=grid>"
        for one in examples:
            if one["split"] == split:
                pictures = "".join(f"<img class=p src='data:image/png;base64,{png}'>" for png in one["pictures"])
                lines = "<br>".join(f"{_mark(right)}{html.escape(words)}" for words, right in one["lines"])
                yield f"<figure class=example>{pictures}<figcaption>{lines}</figcaption></figure>"
        yield "</div></details>"


def _mark(right: bool | None) -> str:
    return "" if right is None else "<b class=good>✓</b> " if right else "<b class=bad>✗</b> "
