"""Where a run goes on: its newest whole checkpoint, if what decides the numbers is as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer

from mmllm.config import CONTINUABLE, Pretrain, recipe_fields, rows_before
from mmllm.manifest import newest, read_state, set_aside, tidy, verify
from mmllm.megatron import checkpoint
from mmllm.megatron.batch import Rows
from mmllm.megatron.parallel import Layout
from mmllm.progress import say

ABSENT = object()


def find(folder: Path, layout: Layout) -> Path | None:
    """The newest checkpoint that is what it was when it was saved; every rank reads a part of the files. Broken ones are set aside, with
    a line. Errors: ValueError where there are checkpoints, all of them broken."""
    broken, problem, found = list[str](), "", None
    if layout.rank == 0 and folder.is_dir():
        tidy(folder)
    while True:
        name = [str(newest(folder) or "")]                                     # the first rank's view: file systems may lag
        dist.broadcast_object_list(name)
        found = Path(name[0]) if name[0] else None
        if found is None:
            break
        try:
            verify(found, layout.rank, layout.ranks)
            problem = ""
        except (ValueError, OSError) as error:
            problem = str(error).partition(": delete")[0]
        problems: list[Any] = [None] * layout.ranks
        dist.all_gather_object(problems, problem)
        problem = next((each for each in problems if each), "")
        if not problem:
            return found
        broken.append(problem)
        aside = [str(set_aside(found)) if layout.rank == 0 else ""]
        dist.broadcast_object_list(aside)                                      # the others look again once it is gone
        if layout.rank == 0:
            say(f"{problem}: set aside as {aside[0]}, the one before is taken")
    if broken:
        raise ValueError(f"{folder} has no checkpoint left to continue from ({'; '.join(broken)}): restore one, or give another `out`")
    return None


def resume(start_from: Path, recipe: Pretrain, loader: Rows, model: list[DistributedDataParallel],
           optimizer: ChainedOptimizer) -> dict[str, Any]:
    """Continue from a checkpoint, unless something that decides the numbers has changed. → its plain values, its step among them"""
    saved = read_state(start_from)
    step: int = saved["step"]
    differing = list[str]()
    if (consumed := rows_before(recipe, step)) != saved["consumed_rows"]:
        differing.append(f"rows of the first {step} steps ({saved['consumed_rows']:,} then, {consumed:,} now: global_batch, batch_ramp)")
    if loader.vocab.size != saved["vocab_size"]:
        differing.append(f"vocabulary ({saved['vocab_size']:,} ids then, {loader.vocab.size:,} now)")
    try:
        loader.resume(saved)
    except ValueError as error:
        differing.append(str(error))
    differing += changes(saved["recipe"], recipe)
    if differing and not recipe.accept_changes:
        raise ValueError(f"{start_from} was written by another recipe: {'; '.join(differing)}. "
                         "Give another `out`, delete the folder, or set accept_changes")
    checkpoint.load(start_from, model, optimizer)
    return saved


def changes(then: Mapping[str, Any], recipe: Pretrain) -> list[str]:
    """Fields that must stay and did not, by name. One that the saved recipe does not know was added to the program since, and its default
    does what was done before."""
    now, default = recipe_fields(recipe), _defaults(recipe)
    return [f"{name} ({_at(then, name)} then, {value} now)" for name, value in _leaves(now) if name.partition(".")[0] not in CONTINUABLE
            and value != (default.get(name, ABSENT) if (before := _at(then, name)) is ABSENT else before)]


def _leaves(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _at(fields: Mapping[str, Any], name: str) -> Any:
    value: Any = fields
    for part in name.split("."):
        value = value.get(part, ABSENT) if isinstance(value, dict) else ABSENT
    return value


def _defaults(recipe: Any, prefix: str = "") -> dict[str, Any]:
    """Of every field that has one, by its dotted name, as plain values."""
    import dataclasses
    import json
    found = dict[str, Any]()
    for field in dataclasses.fields(recipe):
        value, default = getattr(recipe, field.name), field.default
        if dataclasses.is_dataclass(value):
            found.update(_defaults(value, f"{prefix}{field.name}."))
        elif default is not dataclasses.MISSING:
            found[prefix + field.name] = json.loads(json.dumps(default, default=str))
    return found
