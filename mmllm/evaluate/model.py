"""`mmllm eval`: everything that a model folder is measured by, on documents held out, each number with its interval.

    OUT/records/TASK.jsonl  what the model did, unit by unit: an evaluation goes on where it was
        tasks/TASK.json     the numbers of a task, some examples, and what they were made by
        measures/TASK.npz   rows behind the numbers, for paired comparisons
        eval.json, eval.html

A second call with more tasks, a larger limit or weights that were missing does what is new.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.evaluate import bootstrap
from mmllm.evaluate.bootstrap import Measure
from mmllm.evaluate.model_page import page
from mmllm.evaluate.report import commit, machine
from mmllm.evaluate.settings import Evaluation
from mmllm.evaluate.task import Given, Record, Task
from mmllm.evaluate.tasks import TASKS, Tell, pool_of, work
from mmllm.run import write_json
from mmllm.streams import weight_files

EITHER_WAY = {"tasks", "batch", "processes", "device", "model", "shards", "out"}
"""Settings that change no number; the verb's paths among them, as what lies there has its own part in `made_by`."""
SHOWN = 12
"""Examples of each split on the page."""
HASHED = 2**20
"""Bytes of a weight file's ends that name it: whole files may be hundreds of GB."""


def evaluate(model: Path, shards: Path | None, out: Path, settings: Evaluation,
             tell: Tell = lambda task, done, whole: None) -> dict[str, Any]:
    """Measure, and write eval.json and eval.html. → what is in eval.json"""
    given = Given(model=model, shards=shards, out=out, settings=settings)
    source = {"model": fingerprint(model), "shards": str(shards.absolute()) if shards else None}
    with pool_of(settings.processes) as pool:
        for name, task in TASKS.items():
            if name in settings.tasks:
                write_json(out / "tasks" / f"{name}.json", measured(given, name, task, source, pool, tell))
    done = {name: json.loads(path.read_text()) for name in TASKS if (path := out / "tasks" / f"{name}.json").is_file()}
    record = {"model": str(model), "fingerprint": source["model"], "shards": source["shards"], "commit": commit(), "machine": machine(),
              "settings": _plain(asdict(settings)), "tasks": done}
    write_json(out / "eval.json", record)
    (out / "eval.html").write_text("".join(page([record], {})))
    return record


def measured(given: Given, name: str, task: Task, source: dict[str, Any], pool: Executor | None, tell: Tell) -> dict[str, Any]:
    """One task's numbers; those that lie in OUT are taken where they were made by the same."""
    start, settings = time.perf_counter(), _plain(asdict(given.settings))
    units = task.units(given)
    if not units:
        return {"made_by": "", "scores": {}, "missing": {name: task.lacking}, "notes": [], "examples": [], "seconds": 0.0}
    decides = {key: value for key, value in settings.items() if key not in EITHER_WAY}
    made_by = hashlib.sha256(json.dumps([source, decides, [unit.name for unit in units]]).encode()).hexdigest()
    path = given.out / "tasks" / f"{name}.json"
    if given.settings.geneval_results is None and path.is_file() and (before := json.loads(path.read_text()))["made_by"] == made_by:
        tell(name, len(units), len(units))
        return before
    records = work(given, name, units, {**source, **{key: settings[key] for key in task.decided_by}}, pool, tell)
    found = task.score(given, records)
    keep(given.out / "measures" / f"{name}.npz", found.measures)
    scores = {what: bootstrap.number(one, given.settings.resamples, given.settings.seed) for what, one in found.measures.items()}
    return {"made_by": made_by, "scores": {**scores, **found.ready}, "missing": dict(found.missing), "notes": list(found.notes),
            "examples": examples(given, task, records), "seconds": round(time.perf_counter() - start, 1)}


def examples(given: Given, task: Task, records: list[Record]) -> list[dict[str, Any]]:
    """The first of each split, and of each skill where there are some."""
    if task.show is None:
        return []
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["split"], record.get("skill", "")), []).append(record)
    some = {split: max(1, SHOWN // sum(one == split for one, _ in groups)) for split, _ in groups}
    return [{"split": split, "skill": skill, **task.show(given, record)._asdict()}
            for (split, skill), members in groups.items() for record in members[:some[split]]]


def keep(path: Path, measures: Mapping[str, Measure]) -> None:
    """Rows behind the numbers, to be read by `kept`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"names": np.array([*measures])}
    for number, one in enumerate(measures.values()):
        arrays |= {f"{number}.units": np.array(one.units), f"{number}.rows": one.rows, f"{number}.of": one.of,
                   f"{number}.better": one.better}
    np.savez_compressed(path, **arrays)


def kept(path: Path) -> dict[str, Measure]:
    if not path.is_file():
        return {}
    with np.load(path) as found:
        return {str(name): Measure(units=tuple(found[f"{i}.units"].tolist()), rows=found[f"{i}.rows"], of=str(found[f"{i}.of"]),
                                   better=int(found[f"{i}.better"])) for i, name in enumerate(found["names"])}


def fingerprint(model: Path) -> str:
    """Of what decides an answer: configuration, tokenizers, and sizes and ends of the weight files. 16 hex digits."""
    digest = hashlib.sha256()
    for name in ("config.json", "mmllm.json", "vocab.json"):
        digest.update((model / name).read_bytes())
    for path in sorted(weight_files(model)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(HASHED))
            file.seek(max(0, size - HASHED))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def _plain(values: Any) -> Any:
    return json.loads(json.dumps(values, default=str))
