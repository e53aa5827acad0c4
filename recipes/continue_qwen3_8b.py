"""Qwen3 8B taught to see and to draw: warm start, 105 B tokens at 256 px. For eight nodes of H100.

    mmllm import /data/models/Qwen3-8B /data/models/qwen3_8b --tokenizer /data/visual     the vocabulary extended by tokenizer_256's
    mmllm plan continue_qwen3_8b --write launch && sbatch launch/slurm.sh

Shape and text tokenizer are the base's (huggingface.co/Qwen/Qwen3-8B, config.json), whose 151,936 rows stay in front. New rows need a
higher rate than old ones; the text of the mixture keeps what the base knew.

Planned, not measured: 3,400 GPU hours, 2.2 days.
"""

from dataclasses import replace
from pathlib import Path

from data.mixture import Source, Stage
from data.vocab import Vocab
from mmllm.config import Optim, Parallel
from recipes.pretrain_1b import RECIPE as SMALL
from recipes.pretrain_8b_fp8 import RECIPE as FROM_NOTHING

VOCAB = Vocab(text_size=151_936, codebook_size=32_768, grids=((16, 16), (8, 8), (4, 4)))
TOKENS = Path("/data/tokens_qwen3")

RECIPE = replace(
    SMALL, out=Path("/data/runs/continue_qwen3_8b"), steps=50_000, global_batch=256, micro_batch=1, vocab_size=VOCAB.size,
    init=Path("/data/models/qwen3_8b"), model=FROM_NOTHING.model,
    optim=Optim(lr=5e-5, embedding_lr=2e-4, warmup_steps=1_000, min_lr_ratio=0.1),
    data=replace(SMALL.data, row_len=8192, stages=(
        Stage(sources=(Source(shards=TOKENS / "text", weight=0.3), Source(shards=TOKENS / "recaptioned", weight=0.4),
                       Source(shards=TOKENS / "interleaved", weight=0.2), Source(shards=TOKENS / "conversations", weight=0.1))),)),
    parallel=Parallel(ranks=64, tp=2), save_every=500, keep_every=10_000)
