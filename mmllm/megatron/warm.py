"""A run that starts from the weights of another model instead of new ones: what `mmllm import` wrote, or any run's checkpoint.

Weights alone are taken: steps, data and optimizer begin anew, under any layout of ranks.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer

from data.vocab import Vocab
from mmllm.manifest import read_state, verify
from mmllm.megatron.checkpoint import sharded_state
from mmllm.megatron.parallel import Layout


def start(init: Path, vocab: Vocab, model: list[DistributedDataParallel], optimizer: ChainedOptimizer, layout: Layout) -> None:
    """Put the weights of `init` into the model and the optimizer's masters; every rank reads a part of the files to check them.

    Errors: ValueError where it is not whole, or of another vocabulary."""
    problem = ""
    try:
        verify(init, layout.rank, layout.ranks)
    except (ValueError, OSError) as error:
        problem = f"init: {str(error).partition(': delete')[0]}: import or copy it again"
    problems: list[Any] = [None] * layout.ranks
    dist.all_gather_object(problems, problem)
    if problem := next((each for each in problems if each), ""):
        raise ValueError(problem)
    size: int = read_state(init)["vocab_size"]
    if size != vocab.size or ((init / "vocab.json").is_file() and Vocab.load(init / "vocab.json") != vocab):
        raise ValueError(f"init {init} has {size:,} ids, the token shards {vocab.size:,}, or theirs are other ones: encode the shards with "
                         f"--text {init / 'text.model'} and the visual tokenizer that it was imported for")
    state: dict[str, Any] = {
        # what Transformer Engine keeps besides is history of 8-bit scales, which begins anew
        chunk: {name: entry for name, entry in entries.items() if "_extra_state" not in name}
        for chunk, entries in sharded_state(model, None, loading=True).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                        # torch and megatron-core disagree on tensor classes
        loaded: Any = dist_checkpointing.load(state, str(init))
    for i, chunk in enumerate(model):
        chunk.module.load_state_dict(loaded[f"model{i}"], strict=False)
    optimizer.reload_model_params()
