"""Process groups: which rank does which part of the model and of the batch.

The one distinction: a *place* (`Layout`) is plain numbers that the rest of the code reads; the process groups behind it
are megatron-core's, made here and taken down here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from mmllm.config import Parallel
from mmllm.launch import TIMEOUT, join


@dataclass(frozen=True)
class Layout:
    """Where this rank stands."""

    rank: int
    ranks: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    tp: int
    pp: int
    cp: int
    dp: int
    device: torch.device

    @property
    def first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1


def start(parallel: Parallel, seed: int) -> Layout:
    """Join, split the ranks by tp × cp × dp × pp, and seed them."""
    join()
    if dist.get_world_size() != parallel.ranks:
        raise ValueError(f"{dist.get_world_size()} processes were started but parallel.ranks is {parallel.ranks}: "
                         "make them equal")
    if parallel.expert_tp > 1 and parallel.ep > 1 and not torch.cuda.is_available():
        raise ValueError(f"parallel.expert_tp {parallel.expert_tp} with parallel.ep {parallel.ep} needs CUDA: ranks would gather unequal "
                         "numbers of tokens, which gloo cannot. Set one of them to 1")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp, pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.virtual_stages if parallel.virtual_stages > 1 else None,
        context_parallel_size=parallel.cp, expert_model_parallel_size=parallel.ep, expert_tensor_parallel_size=parallel.expert_tp,
        # over gloo the groups themselves are gloo's: a second set would cost time at every start
        create_gloo_process_groups=torch.cuda.is_available(),
        distributed_timeout_minutes=int(TIMEOUT.total_seconds() // 60))
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return Layout(
        rank=dist.get_rank(), ranks=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(), tp=parallel.tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(), pp=parallel.pp,
        cp_rank=parallel_state.get_context_parallel_rank(), cp=parallel.cp,
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


def context_group() -> dist.ProcessGroup:
    """The ranks that split the tokens of each document."""
    return cast(dist.ProcessGroup, parallel_state.get_context_parallel_group())


def batch_group() -> dist.ProcessGroup:
    """The ranks that split the batch: by rows, and by the tokens of each."""
    return cast(dist.ProcessGroup, parallel_state.get_data_parallel_group(with_context_parallel=True))


def pipeline_group() -> dist.ProcessGroup:
    """The ranks that split the layers."""
    return cast(dist.ProcessGroup, parallel_state.get_pipeline_model_parallel_group())
