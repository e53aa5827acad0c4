"""Is what the model knew of text kept? lm-evaluation-harness on the exported folder, as anyone would run it.

`AutoModelForCausalLM` and `AutoTokenizer` open the folder; nothing of ours is between. Tasks are the harness's own, or defined in
--lm-folder; their data must lie on this machine. Of each example its own score is kept: intervals and paired differences are made as those
of every other task, not by the harness.
"""

import os
from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from mmllm.evaluate.bootstrap import Measure, mean
from mmllm.evaluate.task import Given, Record, Scores, Task, Unit

LESS = {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter"}
"""Metrics of which less is better."""


def units(given: Given) -> list[Unit]:
    return [Unit(name, "text", name) for name in given.settings.lm_tasks]


def run(given: Given, some: list[Unit]) -> list[Record]:
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    try:
        from lm_eval import evaluator
    except ImportError as error:
        raise ValueError(f"lm-evaluation-harness cannot be imported ({error}): pip install 'mmllm[eval]', or leave `text` out of "
                         "--tasks") from error
    settings, harness = given.settings, cast(Any, evaluator)
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, manager = _model(given.model, device, settings.batch), _tasks(settings.lm_tasks, settings.lm_folder)
    records: list[Record] = []
    for unit in some:
        try:
            found = harness.simple_evaluate(model, tasks=[unit.work], limit=settings.lm_limit, task_manager=manager, bootstrap_iters=0,
                                            random_seed=settings.seed, numpy_random_seed=settings.seed, torch_random_seed=settings.seed)
        except Exception as error:  # of the harness, datasets and the hub, over many lines
            first = " ".join(str(error).split())[:200]
            raise ValueError(f"lm-evaluation-harness cannot run {unit.work!r} ({type(error).__name__}: {first}): give --lm-tasks whose "
                             "data is on this machine, or --lm-folder with their definitions") from error
        records.append({"name": unit.name, "split": unit.split, "tasks": {
            name: {"metrics": by_example(samples), "harness": _whole(found["results"].get(name, {}))}
            for name, samples in found["samples"].items()}})
    return records


@lru_cache(maxsize=1)
def _model(folder: Path, device: str, batch: int) -> Any:
    from lm_eval.models import huggingface

    return cast(Any, huggingface).HFLM(pretrained=str(folder), device=device, batch_size=batch)


@lru_cache(maxsize=1)
def _tasks(names: tuple[str, ...], folder: Path | None) -> Any:
    """The harness's index of tasks. Its own, thousands of files, are left out where the folder defines all that is asked for."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}: give --lm-folder one with definitions of tasks (YAML)")
        own: Any = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=None if folder is None else str(folder))


def by_example(samples: list[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """Samples as the harness logs them → by metric and filter, [example, what it scored] or [example, sum, weight] of each."""
    out: dict[str, list[list[float]]] = defaultdict(list)
    for one in samples:
        suffix = "" if one.get("filter", "none") == "none" else f" ({one['filter']})"
        for metric in one.get("metrics", ()):
            value = one.get(metric)
            if isinstance(value, bool | int | float):
                out[metric + suffix].append([one["doc_id"], float(value)])
            elif isinstance(value, tuple | list) and len(value) == 2 and metric in LESS:
                out[metric + suffix].append([one["doc_id"], *map(float, value)])
    return dict(out)


def _whole(results: Mapping[str, Any]) -> dict[str, float]:
    """The harness's own numbers, to be compared with ours."""
    return {name: float(value) for name, value in results.items() if isinstance(value, int | float) and "stderr" not in name}


def score(given: Given, records: list[Record]) -> Scores:
    """Means over examples; perplexities from summed log-likelihoods, as the harness defines them."""
    measures: dict[str, Measure] = {}
    missing: dict[str, str] = {}
    for record in records:
        for name, task in record["tasks"].items():
            for metric, values in task["metrics"].items():
                examples = [f"{name}/{int(one[0])}" for one in values]
                kind = metric.split(" (")[0]
                if len(values[0]) == 2 and kind not in LESS:
                    measures[f"{name}/{metric}"] = mean(examples, [one[1] for one in values])
                    continue
                if len(values[0]) == 2 and kind != "perplexity":
                    measures[f"{name}/{metric}"] = mean(examples, [one[1] for one in values], better=-1)
                    continue
                rows = np.array([[-one[1], one[2] if len(one) > 2 else 1] for one in values], np.float64)  # log-likelihoods
                if kind == "bits_per_byte":
                    rows[:, 0] /= np.log(2)
                of = "ratio" if kind == "bits_per_byte" else "exp"
                measures[f"{name}/{metric}"] = Measure(units=tuple(examples), rows=rows, of=of, better=-1)
            if not task["metrics"]:
                missing[name] = "the harness keeps no score of single examples for it"
    return Scores(measures=measures, missing=missing)


TEXT = Task(units=units, run=run, score=score, decided_by=("seed", "lm_folder", "lm_limit"), at_once=1,
            lacking="no tasks given (--lm-tasks)")
