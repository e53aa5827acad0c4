"""Process groups: which rank does which part of the model and of the batch.

The one distinction: a *place* (`Layout`) is plain numbers that the rest of the code reads; the process groups behind it
are megatron-core's, made here and taken down here. Nothing else initialises or destroys anything distributed.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from mmllm.config import Parallel

TIMEOUT = datetime.timedelta(minutes=10)
"""A rank that waits longer for another takes it for dead."""


@dataclass(frozen=True)
class Layout:
    """Where this rank stands."""

    rank: int
    ranks: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    tp: int
    pp: int
    dp: int
    device: torch.device

    @property
    def first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1


def join() -> None:
    """Join the process group, once a process: under torchrun by its environment, else by the socket that `mmllm.launch`
    left open."""
    if dist.is_initialized():
        return
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if cuda else "gloo"
    listen_fd = os.environ.get("MMLLM_LISTEN_FD")
    if "MASTER_PORT" in os.environ and listen_fd is None:
        dist.init_process_group(backend, timeout=TIMEOUT)
        return
    if ranks == 1:
        store: dist.Store = dist.HashStore()
    else:
        port = int(os.environ["MASTER_PORT"])
        store = dist.TCPStore("127.0.0.1", port, ranks, is_master=rank == 0, timeout=TIMEOUT,
                              master_listen_fd=int(listen_fd) if rank == 0 and listen_fd else None)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)


def start(parallel: Parallel, seed: int) -> Layout:
    """Join, split the ranks by tp × pp × dp, and seed them."""
    join()
    if dist.get_world_size() != parallel.ranks:
        raise ValueError(f"{dist.get_world_size()} processes were started but parallel.ranks is {parallel.ranks}: "
                         "make them equal")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp, pipeline_model_parallel_size=parallel.pp,
        # over gloo the groups themselves are gloo's: a second set would cost time at every start
        create_gloo_process_groups=torch.cuda.is_available(),
        distributed_timeout_minutes=int(TIMEOUT.total_seconds() // 60))
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return Layout(
        rank=dist.get_rank(), ranks=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(), tp=parallel.tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(), pp=parallel.pp,
        dp_rank=parallel_state.get_data_parallel_rank(), dp=parallel.dp,
        device=torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu"))


def split_again(parallel: Parallel, seed: int) -> Layout:
    """Another layout of the same processes (tests and benchmarks)."""
    parallel_state.destroy_model_parallel()
    return start(parallel, seed)


def stop() -> None:
    """Leave the process group."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def data_group() -> dist.ProcessGroup:
    """The ranks that hold the same part of the model and different rows."""
    return cast(dist.ProcessGroup, parallel_state.get_data_parallel_group())


def tensor_group() -> dist.ProcessGroup:
    """The ranks that split each matrix."""
    return cast(dist.ProcessGroup, parallel_state.get_tensor_model_parallel_group())


def pipeline_group() -> dist.ProcessGroup:
    """The ranks that split the layers."""
    return cast(dist.ProcessGroup, parallel_state.get_pipeline_model_parallel_group())
