"""The nearest layout that works and fits: the one that changes fewest fields, of those the fastest.

Every combination of a few values of each field is tried; what the recipe's own check refuses, or what needs more memory than there is, is
out. A field counts as changed where its value differs from the recipe's; memory and time are the plan's own estimates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any, Literal, NamedTuple

from mmllm.config import Pretrain
from mmllm.plan import memory, step
from mmllm.plan.hardware import Gpu
from mmllm.plan.recipe import Given, job_of, wrong_with
from mmllm.runs.sft_recipe import Sft


class Candidate(NamedTuple):
    """A recipe that works and fits."""

    recipe: Pretrain | Sft
    changes: tuple[str, ...]
    """Words of a command line that make it of the recipe."""
    seconds: float
    """Of a step."""


def nearest(recipe: Pretrain | Sft, gpu: Gpu, given: Given) -> Candidate | None:
    """Fewest changes first, then time."""
    return min(working(recipe, gpu, given), key=lambda found: (len(found.changes), found.seconds), default=None)


def fastest(recipe: Pretrain | Sft, gpu: Gpu, given: Given) -> Candidate | None:
    """Time first."""
    return min(working(recipe, gpu, given), key=lambda found: (found.seconds, len(found.changes)), default=None)


def working(recipe: Pretrain | Sft, gpu: Gpu, given: Given) -> Iterator[Candidate]:
    """Every combination that works and fits."""
    for changes, changed in _pretrain_layouts(recipe) if isinstance(recipe, Pretrain) else _sft_layouts(recipe):
        if wrong_with(changed):
            continue
        job = job_of(changed, given)
        if memory.worst(job).total <= gpu.memory_bytes:
            yield Candidate(changed, changes, step.estimate(job, gpu).seconds)


def _pretrain_layouts(recipe: Pretrain) -> Iterator[tuple[tuple[str, ...], Pretrain]]:
    now, layers = recipe.parallel, recipe.model.num_layers
    tps = {1, 2, 4, 8, now.tp}
    pps = {*(n for n in range(1, 33) if layers % n == 0), now.pp}
    cps = {1, 2, 4, 8, now.cp}
    micros, recomputes = {1, 2, 4, recipe.micro_batch}, {"none", "full", now.recompute}
    for tp, pp, cp, micro, recompute in product(sorted(tps), sorted(pps), sorted(cps), sorted(micros), sorted(recomputes)):
        if now.ranks % (tp * pp * cp):
            continue
        ends = {} if pp == now.pp else {"first_stage_layers": None, "last_stage_layers": None}
        chunks = [now.virtual_stages] if pp == now.pp else [1, layers // pp] if pp > 1 else [1]
        for virtual in chunks:
            wanted: dict[str, Any] = {"tp": tp, "pp": pp, "cp": cp, "recompute": recompute, "virtual_stages": virtual, **ends}
            words = [f"--parallel.{name.replace('_', '-')} {value}" for name, value in wanted.items() if value != getattr(now, name)]
            words += [f"--micro-batch {micro}"] * (micro != recipe.micro_batch)
            yield tuple(words), replace(recipe, micro_batch=micro, parallel=replace(now, **wanted))


def _sft_layouts(recipe: Sft) -> Iterator[tuple[tuple[str, ...], Sft]]:
    share = recipe.global_batch // max(1, recipe.ranks)
    micros = {recipe.micro_batch, *(n for n in (1, 2, 4, 8) if share % n == 0)}
    zeros: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
    offloads: tuple[Literal["none", "optimizer", "all"], ...] = ("none", "optimizer", "all")
    for zero, micro, again, offload in product(zeros, sorted(micros), (False, True), offloads):
        words = [f"--zero-stage {zero}"] * (zero != recipe.zero_stage) + [f"--micro-batch {micro}"] * (micro != recipe.micro_batch)
        words += [f"--{'' if again else 'no-'}gradient-checkpointing"] * (again != recipe.gradient_checkpointing)
        words += [f"--offload {offload}"] * (offload != recipe.offload)
        yield tuple(words), replace(recipe, zero_stage=zero, micro_batch=micro, gradient_checkpointing=again, offload=offload)
