"""Several evaluations side by side: what each reached, and whether it differs from the first by more than chance.

Models that did the same units are compared unit by unit under the same resamples, so what is hard for both cancels; the interval of the
difference is then much narrower than the two intervals suggest.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmllm.evaluate import bootstrap
from mmllm.evaluate.model import kept
from mmllm.evaluate.model_page import page
from mmllm.run import write_json


def compare(runs: Sequence[Path], out: Path, resamples: int = 2_000, seed: int = 0) -> dict[str, Any]:
    """Folders of `mmllm eval` → a page at `out` and the same for programs beside it (.json). → the latter"""
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} evaluation given: name 2 or more folders that `mmllm eval` wrote")
    records = [_record(run) for run in runs]
    differences: dict[str, dict[str, list[dict[str, Any] | None]]] = {}
    for task, first in records[0]["tasks"].items():
        rows = [kept(run / "measures" / f"{task}.npz") for run in runs]
        differences[task] = {what: [
            _difference(first["scores"], record["tasks"].get(task, {}).get("scores", {}), rows[0], other, what, resamples, seed)
            for record, other in zip(records[1:], rows[1:], strict=True)] for what in first["scores"]}
    found = {"runs": [{"folder": str(run), **{key: record[key] for key in ("model", "fingerprint", "shards", "commit")},
                       "scores": {task: one["scores"] for task, one in record["tasks"].items()}}
                      for run, record in zip(runs, records, strict=True)], "differences": differences}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out.with_suffix(".json"), found)
    out.write_text("".join(page(records, differences)))
    return found


def _record(run: Path) -> dict[str, Any]:
    path = run / "eval.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run} holds no eval.json: give folders that `mmllm eval … --out` wrote")
    record = json.loads(path.read_text())
    if "tasks" not in record:
        raise ValueError(f"{path} is no evaluation of a model: `mmllm tokenizer eval` writes one of the same name")
    return record


def _difference(first: Mapping[str, Any], other: Mapping[str, Any], before: Mapping[str, bootstrap.Measure],
                after: Mapping[str, bootstrap.Measure], what: str, resamples: int, seed: int) -> dict[str, Any] | None:
    """Of one number of one run; from standard errors where rows were not kept."""
    if what not in other:
        return None
    if what in before and what in after and before[what].of == after[what].of and before[what].rows.shape[1] == after[what].rows.shape[1]:
        return bootstrap.difference(before[what], after[what], resamples, seed)
    a, b = first[what], other[what]
    value, error = b["value"] - a["value"], math.hypot(a["error"], b["error"])
    return {"value": value, "low": value - 1.96 * error, "high": value + 1.96 * error, "paired": False}
