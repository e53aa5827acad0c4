"""Checkpoints: whole or absent, readable under any layout of ranks.

How a folder is whole or absent is `mmllm.manifest`'s. The format is megatron-core's distributed one with fully reshardable optimizer
state, so TP, PP and DP may differ between the run that saved and the one that loads.
"""

from __future__ import annotations

import queue
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from mmllm.manifest import MANIFEST, STATE, entry, finish
from mmllm.run import write_json


def sharded_state(model: DistributedDataParallel, optimizer: ChainedOptimizer | None, loading: bool) -> dict[str, Any]:
    """Weights and optimizer state, each tensor with its place in the whole."""
    metadata = ensure_metadata_has_dp_cp_group({"distrib_optim_sharding_type": "fully_reshardable"})
    decoder: Any = model.module
    state: dict[str, Any] = {"model": decoder.sharded_state_dict(metadata=metadata)}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=loading, metadata=metadata)
    return state


def save(folder: Path, step: int, model: DistributedDataParallel, optimizer: ChainedOptimizer, state: dict[str, Any],
         keep_last: int) -> Path:
    """Save everything at a step under `folder`, then delete all but the last `keep_last`. `state`: plain values to find
    in `state.json`."""
    beside = folder / f"step_{step:07d}.tmp"
    if dist.get_rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    dist.barrier()
    sharded = sharded_state(model, optimizer, loading=False) | {"rng": torch.get_rng_state()}
    # in 0.16.1 every save starts a manager process for results that a plain queue carries when the save is not
    # asynchronous
    filesystem_async._results_queue = queue.Queue()  # pyright: ignore[reportPrivateUsage]
    dist_checkpointing.save(sharded, str(beside), TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
                            validate_access_integrity=False)
    if dist.get_rank() == 0:
        write_json(beside / STATE, {"step": step, **state})
    dist.barrier()
    files = hashes(beside)
    if dist.get_rank() == 0:
        finish(beside, step, files, keep_last)
    dist.barrier()
    return beside.with_suffix("")


def hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file, the work shared among the ranks."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    mine = {name: entry(folder / name) for name in names[dist.get_rank()::dist.get_world_size()]}
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return dict(sorted({name: listed for part in parts for name, listed in part.items()}.items()))


def load(checkpoint: Path, model: DistributedDataParallel, optimizer: ChainedOptimizer | None) -> None:
    """Load weights and, if given, optimizer state, under whatever layout this run has."""
    with warnings.catch_warnings():
        # torch and megatron-core disagree on tensor classes
        warnings.simplefilter("ignore")
        state: Any = dist_checkpointing.load(sharded_state(model, optimizer, loading=True), str(checkpoint))
    model.module.load_state_dict(state["model"], strict=False)
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
