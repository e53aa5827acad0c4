"""The batch of a step gone wrong, on disk: what each rank was computing, for `mmllm replay`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.loader import Row
from data.vocab import Vocab
from mmllm.config import Pretrain, recipe_fields
from mmllm.megatron.parallel import Layout

ARRAYS = ("tokens", "labels", "loss_weight", "cu_seqlens")
NAMED = 8
"""Samples named in a message."""


def dump(recipe: Pretrain, vocab: Vocab, layout: Layout, step: int, rows: Sequence[Row], measures: dict[str, float]) -> tuple[str, str]:
    """Save a step's rows, a file of each data-parallel rank, and name the samples. Called by all ranks. → the first of the
    files (and why it was not saved), the first samples of the whole batch"""
    writer = layout.tp_rank == 0 and layout.cp_rank == 0 and layout.last_stage
    path = recipe.out / f"bad_step_{step:07d}_rank_{layout.rank}.pt"
    problem = ""
    if writer:
        plain = [{"keys": row.keys, **{name: torch.from_numpy(getattr(row, name)) for name in ARRAYS}} for row in rows]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"step": step, "rank": layout.rank, "losses": measures, "vocab": asdict(vocab), "recipe": recipe_fields(recipe),
                        "rows": plain}, path)
        except (OSError, RuntimeError) as error:  # a full disk must not hide what went wrong
            problem = f" (not saved: {str(error).splitlines()[0]})"
    parts: list[Any] = [None] * layout.ranks
    dist.all_gather_object(parts, (str(path) + problem, [key for row in rows for key in row.keys]) if writer else None)
    written = [part for part in parts if part is not None]
    keys = [key for _, named in written for key in named]
    words = ", ".join(keys[:NAMED]) + (f" and {len(keys) - NAMED} more" if len(keys) > NAMED else "")
    return written[0][0], words


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """A dumped step with the rows of all its ranks, whichever rank's file is named. → what the file says, rows"""
    siblings = sorted(path.parent.glob(path.name.partition("_rank_")[0] + "_rank_*.pt")) or [path]
    parts = [torch.load(each, "cpu", weights_only=True) for each in siblings]
    rows = [Row(keys=tuple(row["keys"]), **{name: row[name].numpy() for name in ARRAYS}) for part in parts for row in part["rows"]]
    return parts[0], rows
