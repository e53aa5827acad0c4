"""Checkpoints of a tuning run: whole or absent (`mmllm.manifest`), one file a rank and kind as DeepSpeed writes them.

ZeRO's files are of their number of ranks, so a run goes on with as many as it began with. Weights that are not trained are not saved:
they are those of `init`, whose name is kept to tell it from another.
"""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from data.loader import Row
from data.vocab import Vocab
from mmllm import streams
from mmllm.manifest import MANIFEST, STATE, entry, find, finish, read_state
from mmllm.run import write_json
from mmllm.runs.sft_engine import quiet
from mmllm.runs.sft_recipe import Sft, fields_of, kept

SAMPLE = 1 << 20
"""bytes at both ends of a file of weights that name it: trained weights differ everywhere"""


class Rows(Protocol):
    """Packed rows by number; `data.chat.ChatLoader` or `data.loader.Loader`."""

    vocab: Vocab
    row_len: int

    def row(self, number: int, /) -> Row: ...
    def state(self, consumed_rows: int) -> dict[str, Any]: ...
    def resume(self, state: Mapping[str, Any]) -> None: ...


def save(engine: Any, folder: Path, step: int, recipe: Sft, rows: Rows) -> None:
    """All ranks write and list theirs; then the first names the checkpoint whole, and old ones go."""
    beside, rank, ranks = folder / f"step_{step:07d}.tmp", dist.get_rank(), dist.get_world_size()
    if rank == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    dist.barrier()
    try:
        with quiet():
            engine.save_checkpoint(str(folder), tag=beside.name, save_latest=False, exclude_frozen_parameters=True)
        if rank == 0:
            write_json(beside / STATE, state(step, recipe, rows))
    except (OSError, RuntimeError) as error:
        raise RuntimeError(f"checkpoint {beside} cannot be written ({error}): make room and start the same command again, it continues "
                           "from the one before") from error
    dist.barrier()
    names = sorted(str(path.relative_to(beside)) for path in beside.rglob("*") if path.is_file() and path.name != MANIFEST)
    parts: list[Any] = [None] * ranks
    dist.all_gather_object(parts, {name: entry(beside / name) for name in names[rank::ranks]})
    if rank == 0:
        finish(beside, step, {name: listed for part in parts for name, listed in part.items()}, recipe.keep_last)
    dist.barrier()


def resume(engine: Any, folder: Path, recipe: Sft, rows: Rows) -> int:
    """Steps already done: those of the newest whole checkpoint, if there is one. Errors: ValueError if it is another run's."""
    start_from = find(folder)
    if start_from is None:
        return 0
    saved = read_state(start_from)
    if differing := go_on(saved, recipe, rows):
        raise ValueError(f"{start_from} was written by another recipe: {'; '.join(differing)}. Give another `out`, or delete the folder")
    with quiet():
        engine.load_checkpoint(str(folder), tag=start_from.name, load_module_strict=False)
    return int(saved["step"])


def state(step: int, recipe: Sft, rows: Rows) -> dict[str, Any]:
    """The plain values of a checkpoint."""
    return {"step": step, "recipe": fields_of(recipe), "init": name_of(recipe.init), **rows.state(step * recipe.global_batch)}


def go_on(saved: Mapping[str, Any], recipe: Sft, rows: Rows) -> list[str]:
    """Put the rows where a checkpoint left them. → what must be as it was then and is not"""
    then, now = saved["recipe"], kept(recipe)
    differing = [f"{name} ({then.get(name)} then, {value} now)" for name, value in now.items() if then.get(name) != value]
    if saved["init"] != (name := name_of(recipe.init)):
        differing.append(f"init (weights {saved['init']} then, {name} now)")
    try:
        rows.resume(saved)
    except ValueError as error:
        differing.append(str(error))
    return differing


def name_of(model: Path) -> str:
    """Of a model folder's weights: sizes and both ends of its files."""
    digest = hashlib.sha256()
    for path in streams.weight_files(model):
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{path.name} {size}".encode() + file.read(SAMPLE))
            file.seek(max(0, size - SAMPLE))
            digest.update(file.read())
    return digest.hexdigest()[:16]
