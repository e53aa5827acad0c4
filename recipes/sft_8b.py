"""All weights of continue_qwen3_8b tuned on conversations that see, draw and edit: 1.6 B tokens. For two nodes of H100.

    mmllm plan sft_8b --decoder continue_qwen3_8b --write launch && sbatch launch/slurm.sh

ZeRO 3: weights, gradients and optimizer state are split over the ranks. Shards are documents with roles (data/README.md), encoded with the
base's text tokenizer and tokenizer_256.

Planned, not measured: 98 GPU hours, 0.26 days, where modules of transformers reach what torchtitan's uncompiled ones did.
"""

from pathlib import Path

from data.config import DataConfig
from data.mixture import Source, Stage
from mmllm.runs.sft_recipe import Sft

TOKENS = Path("/data/tokens_qwen3/sft")

RECIPE = Sft(
    out=Path("/data/runs/sft_8b"), init=Path("/data/runs/continue_qwen3_8b/hf"), conversations="as they are",
    data=DataConfig(row_len=8192, long_documents="truncate", stages=(
        Stage(sources=(Source(shards=TOKENS / "understanding", weight=0.35), Source(shards=TOKENS / "generation", weight=0.30),
                       Source(shards=TOKENS / "editing", weight=0.10), Source(shards=TOKENS / "text", weight=0.25))),)),
    steps=3_000, global_batch=64, micro_batch=1, lr=1e-5, min_lr_ratio=0.1, warmup_steps=100, ranks=16, zero_stage=3, precision="bf16",
    gradient_checkpointing=True, loader_workers=2, save_every=500, keep_last=2, validate_every=250, export_precision="bf16",
    tensorboard=True)
