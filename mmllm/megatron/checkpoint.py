"""Checkpoints: whole or absent, readable under any layout of ranks, written while training goes on.

How a folder is whole or absent is `mmllm.manifest`'s. The format is megatron-core's distributed one with fully reshardable optimizer
state, so TP, PP and DP may differ between the run that saved and the one that loads.

A save has three parts. *Begin*, on all ranks: who writes what is agreed, and what must not change under the writer is copied to the
host. *Write*, each rank by itself, in a thread: Python waits there for the disk and the hash, both of which let the step run. *Complete*,
on all ranks: the first one lists the files and gives the folder its name, or, if any rank could not write, removes it and says why.
megatron-core plans and writes; its own asynchronous callers are not used: in 0.16.1 they fork a process that has threads, and a rank
whose write failed raises between collectives that the others wait in.
"""

from __future__ import annotations

import io
import queue
import shutil
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from mmllm.manifest import MANIFEST, STATE, entry, finish
from mmllm.run import write_json


class SaveFailed(OSError):
    """A checkpoint could not be written; nothing of it is left."""


@dataclass(kw_only=True)
class Saving:
    """A checkpoint on its way to the disk, on one rank."""

    beside: Path
    """Where it is written."""
    step: int
    state: dict[str, Any]
    """Plain values for `state.json`."""
    common: bytes
    """What megatron-core keeps in `common.pt`, as it was when the save began."""
    writer: Any
    """megatron-core's, with what this rank writes."""
    metadata: Any
    """Of the whole, on the first rank."""
    thread: threading.Thread | None = None
    results: list[Any] = field(default_factory=list[Any])
    """Of this rank's writing: where each tensor lies."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """Of this rank's writing: sizes and hashes."""
    problem: str = ""
    """Why it could not write."""


def sharded_state(model: list[DistributedDataParallel], optimizer: ChainedOptimizer | None, loading: bool) -> dict[str, Any]:
    """Weights and optimizer state, each tensor with its place in the whole."""
    metadata = ensure_metadata_has_dp_cp_group({"distrib_optim_sharding_type": "fully_reshardable"})
    chunks: list[Any] = [chunk.module for chunk in model]
    # the names in the dictionary are this rank's; on disk a tensor goes by its own name and its place in the whole
    state: dict[str, Any] = {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=metadata)
    return state


def save(folder: Path, step: int, model: list[DistributedDataParallel], optimizer: ChainedOptimizer,
         state: dict[str, Any], keep_last: int, keep_every: int = 0) -> Path:
    """Save everything at a step under `folder`, then delete all but the last `keep_last`. `state`: plain values to find
    in `state.json`. Errors: SaveFailed, on every rank."""
    return complete(begin(folder, step, model, optimizer, state, background=False), keep_last, keep_every)


def begin(folder: Path, step: int, model: list[DistributedDataParallel], optimizer: ChainedOptimizer, state: dict[str, Any],
          background: bool) -> Saving:
    """Agree on a save and start writing. In the background, weights and moments may change as soon as this returns."""
    beside = folder / f"step_{step:07d}.tmp"

    def make() -> None:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    together(make, step, beside)
    sharded, common = save_preprocess(sharded_state(model, optimizer, loading=False) | {"rng": torch.get_rng_state()},
                                      validate_access_integrity=False)
    serialized = io.BytesIO()
    torch.save(common, serialized)
    live = {shard.data.untyped_storage().data_ptr() for shard in nested_values(sharded)
            if isinstance(shard, ShardedTensor) and shard.data is not None}
    strategy: Any = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    # what it would make of the plan is a request to its own caller: take the plan
    strategy._get_save_and_finalize_callbacks = lambda _writer, planned: planned
    # in 0.16.1 every save starts a manager process for results, which come back in our own way
    filesystem_async._results_queue = queue.Queue()  # pyright: ignore[reportPrivateUsage]
    writer, metadata, _ = strategy.async_save(sharded, beside)
    saving = Saving(beside=beside, step=step, state=state, common=serialized.getvalue(), writer=writer, metadata=metadata)
    writer.write_buckets = [(path, name, (objects, [(item, at_host(tensor, live if background else set())) for item, tensor in tensors]))
                            for path, name, (objects, tensors) in writer.write_buckets]
    if background:
        saving.thread = threading.Thread(target=write, args=(saving,), name=f"checkpoint {step}", daemon=True)
        saving.thread.start()
    else:
        write(saving)
    return saving


def at_host(tensor: torch.Tensor, live: set[int]) -> torch.Tensor:
    """On the CPU, and a copy where its storage is one of those that training goes on to change."""
    return tensor.to("cpu", copy=tensor.untyped_storage().data_ptr() in live)


def write(saving: Saving) -> None:
    """This rank's part; what goes wrong is kept for `complete`."""
    for bucket in saving.writer.write_buckets:
        try:
            done, count = queue.Queue[Any](), queue.Queue[Any]()               # one in: its way to say that a bucket is written
            count.put(0)
            transforms = [saving.writer.transforms] if hasattr(saving.writer, "transforms") else []
            saving.writer.write_preloaded_data(transforms, 0, bucket, done, count, True)
            _, results = done.get_nowait()
            if isinstance(results, Exception):
                raise results
            saving.results += results
            saving.files[bucket[1]] = entry(Path(bucket[0]))
        except Exception as error:
            saving.problem = f"{bucket[1]}: {reason(error, saving.beside)}"
            return


def reason(error: Exception, folder: Path) -> str:
    """An error of writing in one line, with the room that is left: torch's own streams do not say that a disk is full."""
    said = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return f"{said} ({shutil.disk_usage(there).free / 1e6:,.1f} MB free)"


def written(saving: Saving) -> bool:
    """This rank is done writing, well or not."""
    return saving.thread is None or not saving.thread.is_alive()


def complete(saving: Saving, keep_last: int, keep_every: int = 0) -> Path:
    """Wait for this rank's writing, then for all, and name the folder. Errors: SaveFailed, on every rank."""
    if saving.thread is not None:
        saving.thread.join()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    parts: list[Any] = [None] * ranks
    dist.gather_object((saving.problem, saving.results, saving.files), parts if rank == 0 else None, dst=0)

    def end() -> None:
        for number, (problem, _, _) in enumerate(parts):
            if problem:
                raise SaveFailed(f"rank {number}, {problem}")
        beside, files = saving.beside, {name: listed for part in parts for name, listed in part[2].items()}
        saving.writer.finish(saving.metadata, [results for _, results, _ in parts])
        (beside / COMMON_STATE_FNAME).write_bytes(saving.common)
        save_config(CheckpointingConfig("torch_dist", 1), str(beside))
        write_json(beside / STATE, {"step": saving.step, **saving.state})
        small = {path.name: entry(path) for path in beside.iterdir() if path.is_file() and path.name not in (*files, MANIFEST)}
        finish(beside, saving.step, dict(sorted({**files, **small}.items())), keep_last, keep_every)
    together(end, saving.step, saving.beside)
    return saving.beside.with_suffix("")


def together(act: Callable[[], None], step: int, beside: Path) -> None:
    """The first rank acts, and all go on or fail as one, with nothing left `beside`."""
    problem = [""]
    if dist.get_rank() == 0:
        try:
            act()
        except Exception as error:
            said = str(error) if isinstance(error, SaveFailed) else reason(error, beside)
            problem = [f"the checkpoint of step {step} was not written: {said}"]
            shutil.rmtree(beside, ignore_errors=True)
    dist.broadcast_object_list(problem)
    if problem[0]:
        raise SaveFailed(problem[0])


def load(checkpoint: Path, model: list[DistributedDataParallel], optimizer: ChainedOptimizer | None, history: bool = True) -> None:
    """Load weights and, if given, optimizer state, under whatever layout this run has. `history`: Transformer Engine's past 8-bit scales
    too."""
    wanted = sharded_state(model, optimizer, loading=True)
    if not history:
        wanted = {part: {name: entry for name, entry in entries.items() if "_extra_state" not in name} for part, entries in wanted.items()}
    with warnings.catch_warnings():
        # torch and megatron-core disagree on tensor classes
        warnings.simplefilter("ignore")
        state: Any = dist_checkpointing.load(wanted, str(checkpoint))
    for i, chunk in enumerate(model):
        chunk.module.load_state_dict(state[f"model{i}"], strict=False)
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
