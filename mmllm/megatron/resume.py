"""A run goes on from a checkpoint if what decides the numbers is as it was."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer

from mmllm.config import CONTINUABLE, Pretrain, recipe_fields, rows_before
from mmllm.manifest import read_state
from mmllm.megatron import checkpoint
from mmllm.megatron.batch import Rows

ABSENT = object()


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
    found = dict[str, Any]()
    for field in dataclasses.fields(recipe):
        value, default = getattr(recipe, field.name), field.default
        if dataclasses.is_dataclass(value):
            found.update(_defaults(value, f"{prefix}{field.name}."))
        elif default is not dataclasses.MISSING:
            found[prefix + field.name] = json.loads(json.dumps(default, default=str))
    return found
