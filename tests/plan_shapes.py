"""Weights of every distinct rank of several layouts, counted on megatron-core's own modules: built without memory, in one process that
takes one rank's place after the other behind torch's fake process group. Prints {name of layout: [weights of a rank of each stage]}."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from toy_rows import TINY, tiny

from mmllm.config import Model, Parallel, Pretrain
from mmllm.megatron import model as decoder
from mmllm.megatron import parallel

QWEN2 = replace(TINY, num_layers=8, qk_layernorm=False, qkv_bias=True)
TIED = replace(TINY, num_layers=8, tie_embeddings=True)
EXPERTS = replace(TINY, num_layers=4, num_experts=4, experts_per_token=2, expert_ffn_hidden_size=32)
LLAMA_70B = Model(num_layers=80, hidden_size=8192, num_attention_heads=64, num_query_groups=8, ffn_hidden_size=28_672, qk_layernorm=False)
LAYOUTS: dict[str, tuple[Model, Parallel]] = {
    "one": (TINY, Parallel()),
    "tp": (TINY, Parallel(ranks=4, tp=2)),
    "tp and pp": (QWEN2, Parallel(ranks=16, tp=2, pp=4)),
    "tied, uneven": (TIED, Parallel(ranks=6, pp=3, first_stage_layers=1, last_stage_layers=3)),
    "virtual": (TIED, Parallel(ranks=4, pp=2, tp=2, virtual_stages=2)),
    "cp": (QWEN2, Parallel(ranks=4, cp=2, pp=2)),
    "experts": (EXPERTS, Parallel(ranks=8, tp=2, ep=4, pp=2)),
    "70B": (LLAMA_70B, Parallel(ranks=64, tp=8, pp=4)),
    "split experts": (EXPERTS, Parallel(ranks=8, tp=2, expert_tp=2)),
}
VOCAB = 1000


def recipe(name: str) -> Pretrain:
    model, layout = LAYOUTS[name]
    return tiny(Path("x"), model=model, parallel=layout, global_batch=64)


def count(name: str) -> list[int]:
    """Of the first rank of each stage."""
    made, found = recipe(name), list[int]()
    for stage in range(made.parallel.pp):
        rank = stage * made.parallel.ranks // made.parallel.pp
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=made.parallel.ranks)
        layout = parallel.start(made.parallel, 0)
        # a tied embedding over stages is moved to its device when it is built, which nothing is moved to from meta
        with torch.device("cpu" if made.model.tie_embeddings else "meta"):
            found.append(sum(p.numel() for chunk in decoder.build(made, layout, VOCAB) for p in chunk.parameters()))
        parallel.stop()
    return found


if __name__ == "__main__":
    decoder.initialize = lambda *_: None  # what has no memory gets no numbers
    json.dump({name: count(name) for name in LAYOUTS}, sys.stdout)
