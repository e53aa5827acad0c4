"""The tasks of `mmllm eval`, by name, and their work, done here or shared out to processes.

Records are written as they come, by this process alone; a piece of work is a task and the names of some units, so what is shared is small
and a slow piece holds nobody up.
"""

import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmllm.evaluate.answers import QUESTIONS, SERVED
from mmllm.evaluate.captions import CAPTIONS
from mmllm.evaluate.generation import SCENES
from mmllm.evaluate.geneval import GENEVAL
from mmllm.evaluate.harness import TEXT
from mmllm.evaluate.perplexity import PERPLEXITY
from mmllm.evaluate.resemblance import PICTURES
from mmllm.evaluate.retrieval import RETRIEVAL
from mmllm.evaluate.task import Given, Record, Task, Unit

TASKS: dict[str, Task] = {
    "captions": CAPTIONS, "questions": QUESTIONS, "retrieval": RETRIEVAL, "perplexity": PERPLEXITY, "scenes": SCENES,
    "pictures": PICTURES, "geneval": GENEVAL, "text": TEXT, "served": SERVED}
Tell = Callable[[str, int, int], None]
"""Told (task, units done, units)."""


def work(given: Given, name: str, units: list[Unit], made_by: dict[str, Any], pool: Executor | None, tell: Tell) -> list[Record]:
    """Records of the units, in order; what is in OUT/records already is not done again. `made_by`: what decides a record."""
    path = given.out / "records" / f"{name}.jsonl"
    known = _read(path, made_by)
    left = [unit.name for unit in units if unit.name not in known]
    tell(name, len(units) - len(left), len(units))
    with path.open("a") as file:
        for records in _pieces(given, name, left, pool):
            for record in records:
                file.write(json.dumps(record) + "\n")
                known[record["name"]] = record
            file.flush()
            tell(name, len(units) - sum(unit.name not in known for unit in units), len(units))
    return [known[unit.name] for unit in units]


def _read(path: Path, made_by: dict[str, Any]) -> dict[str, Record]:
    """Records by name; a last line cut short by a kill is dropped. Errors: ValueError where they were made by something else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.is_file() else []
    if whole and (before := json.loads(whole[0])) != made_by:
        changed = ", ".join(f"{key} {before.get(key)!r} then, {value!r} now" for key, value in made_by.items() if before.get(key) != value)
        raise ValueError(f"{path} was made by another evaluation ({changed}): choose another --out, or remove the file to do it anew")
    path.write_text("".join(whole) or json.dumps(made_by) + "\n")
    return {record["name"]: record for record in map(json.loads, whole[1:])}


def _pieces(given: Given, task: str, names: list[str], pool: Executor | None) -> Iterator[list[Record]]:
    settings = given.settings
    some = TASKS[task].at_once or max(1, min(settings.batch, math.ceil(len(names) / settings.processes)))
    pieces = [names[first:first + some] for first in range(0, len(names), some)]
    if pool is None:
        yield from (_piece(given, task, one) for one in pieces)
        return
    fresh = Given(model=given.model, shards=given.shards, out=given.out, settings=settings)
    futures = [pool.submit(_piece, fresh, task, one) for one in pieces]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def _piece(given: Given, task: str, names: list[str]) -> list[Record]:
    """A process opens the model for its first piece and keeps it."""
    kept = _kept(given)
    units = _units(kept, task)
    return TASKS[task].run(kept, [units[name] for name in names])


@lru_cache(maxsize=1)
def _kept(given: Given) -> Given:
    return given


@lru_cache(maxsize=1)
def _units(given: Given, task: str) -> dict[str, Unit]:
    return {unit.name: unit for unit in TASKS[task].units(given)}


def pool_of(processes: int) -> AbstractContextManager[Executor | None]:
    """Processes to work in, or none but this one."""
    if processes == 1:
        return nullcontext()
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, context, _begin, (context.Value("i", 0), processes))


def _begin(count: Any, processes: int) -> None:
    """A worker's share of the machine: some cores, and a GPU of several."""
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    with count.get_lock():
        number, count.value = count.value, count.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
