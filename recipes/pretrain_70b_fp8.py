"""A 70 B decoder from nothing in fp8, 2.0 T tokens at 256 px. For 128 nodes of H100.

    mmllm plan pretrain_70b_fp8 --write launch && sbatch launch/slurm.sh

The layers of Llama 3 70B (arXiv:2407.21783, table 3) with QK norm. Per-tensor current scaling, the first and the last layer in bf16. The
batch grows once, as theirs did (section 3.4.1). Mixture and vocabulary as in pretrain_1b.

Planned, not measured: 425,000 GPU hours, 17 days.
"""

from dataclasses import replace
from pathlib import Path

from mmllm.config import Fp8, Model, Optim, Parallel
from recipes.pretrain_1b import RECIPE as SMALL

STEPS = 250_000
_BROAD, _FINE = SMALL.data.stages

RECIPE = replace(
    SMALL, out=Path("/data/runs/pretrain_70b_fp8"), steps=STEPS, global_batch=512, batch_ramp=((20_000, 1024),), micro_batch=1,
    model=Model(num_layers=80, hidden_size=8192, num_attention_heads=64, num_query_groups=8, ffn_hidden_size=28_672, rotary_base=500_000.0,
                norm_eps=1e-5, vocab_multiple=1024),
    optim=Optim(lr=1.5e-4, warmup_steps=8_000, schedule="cosine", min_lr_ratio=0.01),
    data=replace(SMALL.data, row_len=8192, stages=(_BROAD, replace(_FINE, from_step=STEPS * 3 // 4))),
    parallel=Parallel(ranks=1024, tp=4, pp=8, virtual_stages=5), fp8=Fp8(scaling="tensorwise"), save_every=250, keep_every=10_000,
    validation_rows=128)
