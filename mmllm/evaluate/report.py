"""The report of a quick start: report.json for programs, report.html (one file, pictures inside) for people."""

import base64
import html
import io
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmllm.run import read_metrics, write_json

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1100px;padding:0 1em;color:#222}
h1{margin-bottom:0}h2{margin-top:2em;border-bottom:1px solid #ddd}p{max-width:75ch}
table{border-collapse:collapse;margin:.5em 0}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #eee}
td:first-child,th:first-child{text-align:left}.grid{display:flex;flex-wrap:wrap;gap:14px}
figure{margin:0;width:130px;font-size:12px;line-height:1.3}figure.wide{width:270px}
img.p{width:128px;height:128px;image-rendering:pixelated;border:1px solid #ccc}
.good{color:#187a2f}.bad{color:#b3261e}.dim{color:#777}.big{font-size:26px;font-weight:600}
.cards{display:flex;flex-wrap:wrap;gap:26px;margin:1.2em 0}.cards div span{display:block;font-size:13px;color:#555}
details{margin:.4em 0}code{background:#f3f3f3;padding:.1em .3em}
"""
TITLES = {"seen": "seen compositions", "held_out_combinations": "held-out combinations",
          "held_out_pairs": "held-out shape–colour pairs", "held out": "held-out pictures"}


def machine() -> dict[str, Any]:
    import psutil
    import torch
    name = platform.processor() or platform.machine()
    path = Path("/proc/cpuinfo")
    if path.exists():
        name = next((line.split(":")[1].strip() for line in path.read_text().splitlines() if line.startswith("model name")), name)
    return {"cpu": name, "cores": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "python": platform.python_version(), "torch": torch.__version__}


def commit() -> str:
    """Of the source that runs, with + where it differs; unknown outside a checkout."""
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(out: Path) -> None:
    """report.json and report.html of a run folder whose evaluation has run."""
    recipe = json.loads((out / "recipe.json").read_text())
    record = {"commit": commit(), "seed": recipe["seed"], "machine": machine(),
              "stages": json.loads((out / "stages.json").read_text()) if (out / "stages.json").exists() else [],
              **json.loads((out / "scores.json").read_text())}
    write_json(out / "report.json", record)
    examples = json.loads((out / "examples.json").read_text())
    page = "".join(_page(recipe, record, examples, read_metrics(out / "pretrain"), read_metrics(out / "sft")))
    (out / "report.html").write_text(page)


def _page(recipe: Mapping[str, Any], record: Mapping[str, Any], examples: Mapping[str, Any],
          pretraining: Sequence[Mapping[str, Any]], tuning: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    own = recipe["data"] is not None
    yield f"<!doctype html><meta charset=utf-8><title>mmllm quick start</title><style>{STYLE}</style><h1>mmllm quick start</h1>"
    what = f"pictures from <code>{html.escape(str(recipe['data']))}</code>" if own else f"procedural scenes of level {recipe['level']}"
    model, minutes = recipe["model"], sum(stage["seconds"] for stage in record["stages"]) / 60
    yield (f"<p>A visual tokenizer and a language model of {model['num_layers']} layers × {model['hidden_size']} were trained from "
           f"nothing on {what}: it draws what it is told and says what it sees. {minutes:.1f} minutes on {record['machine']['cores']} "
           f"cores ({html.escape(record['machine']['cpu'])}), seed {record['seed']}, commit {record['commit'][:10]}.</p>")
    yield "<div class=cards>" + "".join(f"<div><b class=big>{value}</b><span>{name}</span></div>"
                                        for name, value in _headline(record, own)) + "</div>"
    drawn = ("Each picture was drawn from the caption below it, which was held out of training." if own else
             "Prompt below each picture; a program read each picture back and judged it whole: every object, colour, count and place "
             "right and nothing besides.")
    yield f"<h2>It draws</h2><p>{drawn}</p>"
    if not own:
        yield _table("skill", record["generation"])
    yield from _groups(examples["drawings"], lambda d: _figure(d["picture"], d["prompt"], d["right"]), "skill")
    said = "The model's description, with the picture's own caption below." if own else \
        "What the model said of pictures it had not seen, and its answers."
    yield f"<h2>It sees</h2><p>{said}</p>"
    if not own:
        yield _table("", {split: {"caption exact": s["caption_exact"], **{f"answers: {k}": v for k, v in s["answers"].items()}}
                          for split, s in record["understanding"].items()})
    yield from _groups(examples["descriptions"], _description)
    yield "<h2>The tokenizer</h2>"
    tokenizer = record["tokenizer"]
    yield ("<p>Original and reconstruction. Below: what each code means, a text phrase from the semantic table of each book.</p>"
           if not own else "<p>Original and reconstruction.</p>")
    yield "<table><tr><th>book<th>codes used<th>perplexity" + "".join(
        f"<tr><td>{n}<td>{b['usage']:.1%}<td>{b['perplexity']:.1f}" for n, b in enumerate(tokenizer["books"])) + "</table>"
    yield from _groups(examples["reconstructions"], _reconstruction)
    yield "<h2>Training</h2>" + _curves(pretraining, tuning)
    yield "<h2>Time and memory</h2><table><tr><th>stage<th>seconds<th>peak memory" + "".join(
        f"<tr><td>{s['name']}<td>{s['seconds']:.0f}<td>{s['peak_memory_bytes'] / 2**30:.2f} GiB" for s in record["stages"]) + "</table>"
    yield f"<h2>Numbers</h2><details><summary>report.json</summary><pre>{html.escape(json.dumps(record, indent=1))}</pre></details>"


def _headline(record: Mapping[str, Any], own: bool) -> list[tuple[str, str]]:
    tokenizer = record["tokenizer"]
    if own:
        seen, drawn = record["understanding"], record["generation"]
        found = next(value for name, value in seen.items() if name.startswith("caption_among"))
        return [("reconstruction PSNR", f"{tokenizer['psnr']:.1f} dB"),
                (f"right caption found among {round(1 / seen['chance'])}", f"{found:.0%}"),
                (f"CLIP score of drawn pictures (of real ones: {drawn['clip_score_of_real']:.2f})", f"{drawn['clip_score']:.2f}")]
    seen, drawn = record["understanding"]["seen"], record["generation"]["seen"]
    return [("pictures drawn exactly right", f"{drawn['overall']:.0%}"),
            ("descriptions exactly right", f"{seen['caption_exact']:.0%}"),
            ("questions answered right", f"{seen['answers']['overall']:.0%}"),
            ("scenes that survive the tokenizer", f"{tokenizer['scene_exact']:.0%}"),
            ("reconstruction PSNR", f"{tokenizer['psnr']:.1f} dB")]


def _table(name: str, scores: Mapping[str, Mapping[str, float]]) -> str:
    rows = [*dict.fromkeys(key for columns in scores.values() for key in columns if key != "overall"), "overall"]
    rows = [row for row in rows if any(row in columns for columns in scores.values())]
    head = "".join(f"<th>{TITLES.get(split, split)}" for split in scores)
    body = "".join(f"<tr><td>{row.replace('_', ' ')}" + "".join(f"<td>{columns[row]:.2f}" if row in columns else "<td>–"
                                                                for columns in scores.values()) for row in rows)
    return f"<table><tr><th>{name}{head}{body}</table>"


def _groups(items: Sequence[Mapping[str, Any]], show: Any, second: str = "split") -> Iterable[str]:
    """Figures by split (and skill), the first group open."""
    for number, split in enumerate(dict.fromkeys(item["split"] for item in items)):
        yield f"<details {'open' if number == 0 else ''}><summary><b>{TITLES.get(split, split)}</b></summary>"
        some = [item for item in items if item["split"] == split]
        for group in dict.fromkeys(item[second] for item in some):
            if second != "split" and len({item[second] for item in some}) > 1:
                yield f"<p class=dim>{group.replace('_', ' ')}</p>"
            yield "<div class=grid>" + "".join(show(item) for item in some if item[second] == group) + "</div>"
        yield "</details>"


def _image(png: str) -> str:
    return f"<img class=p src='data:image/png;base64,{png}'>"


def _mark(right: bool | None) -> str:
    return "" if right is None else "<b class=good>✓</b> " if right else "<b class=bad>✗</b> "


def _figure(png: str, words: str, right: bool | None) -> str:
    return f"<figure>{_image(png)}<figcaption>{_mark(right)}{html.escape(words)}</figcaption></figure>"


def _description(item: Mapping[str, Any]) -> str:
    scored, answers = item["right"] is not None, ""
    for a in item["answers"]:
        words, mark = (a["answer"], _mark(a["answer"] == a["expected"])) if scored else (a["expected"], "")
        answers += f"<br><span class=dim>{html.escape(a['question'])}</span> {mark}{html.escape(words)}"
    caption = f"{_mark(item['right'])}<b>{html.escape(item['description'])}</b>{answers}"
    return f"<figure class=wide>{_image(item['picture'])}<figcaption>{caption}</figcaption></figure>"


def _reconstruction(item: Mapping[str, Any]) -> str:
    codes = "".join(f"<li>{html.escape(code)}" for code in item["codes"])
    words = f"<details><summary class=dim>codes in words</summary><ol>{codes}</ol></details>" if codes else ""
    return f"<figure class=wide>{_image(item['original'])} {_image(item['reconstruction'])}{words}</figure>"


def _curves(pretraining: Sequence[Mapping[str, Any]], tuning: Sequence[Mapping[str, Any]]) -> str:
    """Loss by modality over steps, as a picture."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    for axis, title, records in zip(axes, ("pretraining", "instruction tuning"), (pretraining, tuning), strict=True):
        for name in ("text", "image"):
            points = [(r["step"], r[f"loss/{name}"]) for r in records if f"loss/{name}" in r]
            if points:
                axis.plot(*zip(*points, strict=True), label=name)
        axis.set(title=title, xlabel="step", ylabel="nats a token", ylim=(0, None))
        axis.legend()
        axis.grid(alpha=0.3)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    plt.close(figure)
    return f"<img style='max-width:100%' src='data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}'>"
