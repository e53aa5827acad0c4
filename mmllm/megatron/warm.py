"""A run that starts from the weights of another model instead of new ones: what `mmllm import` wrote, or any run's checkpoint.

Weights alone are taken: steps, data and optimizer begin anew, under any layout of ranks.
"""

from __future__ import annotations

from pathlib import Path

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer

from data.vocab import Vocab
from mmllm.manifest import problem_of, read_state
from mmllm.megatron import checkpoint
from mmllm.megatron.parallel import Layout


def start(init: Path, vocab: Vocab, model: list[DistributedDataParallel], optimizer: ChainedOptimizer, layout: Layout) -> None:
    """Put the weights of `init` into the model and the optimizer's masters; every rank reads a part of the files to check them.

    Errors: ValueError where it is not whole, or of another vocabulary."""
    if problem := problem_of(init, layout.rank, layout.ranks):
        raise ValueError(f"init: {problem}: import or copy it again")
    size: int = read_state(init)["vocab_size"]
    if size != vocab.size or ((init / "vocab.json").is_file() and Vocab.load(init / "vocab.json") != vocab):
        raise ValueError(f"init {init} has {size:,} ids, the token shards {vocab.size:,}, or theirs are other ones: encode the shards with "
                         f"--text {init / 'text.model'} and the visual tokenizer that it was imported for")
    checkpoint.load(init, model, None, history=False)                          # of 8-bit scales: it begins anew
    optimizer.reload_model_params()
