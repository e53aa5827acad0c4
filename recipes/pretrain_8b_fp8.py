"""An 8 B decoder from nothing in fp8, 1.0 T tokens at 256 px. For 16 nodes of H100.

    mmllm plan pretrain_8b_fp8 --write launch && sbatch launch/slurm.sh

The layers of Qwen3 8B (arXiv:2505.09388, table 1; huggingface.co/Qwen/Qwen3-8B, config.json). Per-tensor current scaling, the first and the
last layer in bf16. Rows of 8,192 divide by what fp8 asks, 16 tokens × tp. Mixture and vocabulary as in pretrain_1b.

Planned, not measured: 23,000 GPU hours, 7.5 days.
"""

from dataclasses import replace
from pathlib import Path

from mmllm.config import Fp8, Model, Optim, Parallel
from recipes.pretrain_1b import RECIPE as SMALL

STEPS = 240_000
_BROAD, _FINE = SMALL.data.stages

RECIPE = replace(
    SMALL, out=Path("/data/runs/pretrain_8b_fp8"), steps=STEPS, global_batch=512, micro_batch=1,
    model=Model(num_layers=36, hidden_size=4096, num_attention_heads=32, num_query_groups=8, head_dim=128, ffn_hidden_size=12_288,
                rotary_base=1_000_000.0),
    optim=Optim(lr=3e-4, warmup_steps=2_000, schedule="wsd", decay_ratio=0.25, min_lr_ratio=0.0),
    data=replace(SMALL.data, row_len=8192, stages=(_BROAD, replace(_FINE, from_step=STEPS * 3 // 4))),
    parallel=Parallel(ranks=128, tp=2), fp8=Fp8(scaling="tensorwise"), save_every=500, keep_every=20_000,
    validation_rows=256)
