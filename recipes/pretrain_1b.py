"""A 1.4 B decoder from nothing, 105 B tokens of text, pairs and interleaved documents at 256 px. For two nodes of H100.

    mmllm plan pretrain_1b --write launch && sbatch launch/slurm.sh

The layers of Llama 3.2 1B (huggingface.co/meta-llama/Llama-3.2-1B, config.json) with QK norm, which mixed-modal training wants, and an
output layer of its own. The vocabulary is that of a text tokenizer of 65,536 pieces (`mmllm text-tokenizer train`) and of tokenizer_256.

Three quarters of the way the mixture is broad; the last quarter, in which the rate falls (WSD), is better captions and conversations.
bf16: at this width fp8 gains little or loses (nanochat, dev/LOG.md: 1.17 × per tensor, 0.90 × row-wise).

Planned, not measured: 500 GPU hours, 1.3 days, where the parts of peaks are reached that published runs reached.
"""

from pathlib import Path

from data.config import DataConfig
from data.mixture import Source, Stage
from data.vocab import Vocab
from mmllm.config import Model, Optim, Parallel, Pretrain, Spikes

VOCAB = Vocab(text_size=65_536, codebook_size=32_768, grids=((16, 16), (8, 8), (4, 4)))
TOKENS = Path("/data/tokens")
STEPS = 100_000

RECIPE = Pretrain(
    out=Path("/data/runs/pretrain_1b"), steps=STEPS, global_batch=256, micro_batch=4, vocab_size=VOCAB.size,
    model=Model(num_layers=16, hidden_size=2048, num_attention_heads=32, num_query_groups=8, ffn_hidden_size=8192, rotary_base=500_000.0,
                norm_eps=1e-5),
    optim=Optim(lr=6e-4, warmup_steps=2_000, schedule="wsd", decay_ratio=0.25, min_lr_ratio=0.0),
    data=DataConfig(
        row_len=4096, long_documents="split",
        stages=(
            Stage(sources=(Source(shards=TOKENS / "text", weight=0.45), Source(shards=TOKENS / "pairs", weight=0.35),
                           Source(shards=TOKENS / "interleaved", weight=0.20))),
            Stage(from_step=STEPS * 3 // 4,
                  sources=(Source(shards=TOKENS / "text", weight=0.35), Source(shards=TOKENS / "recaptioned", weight=0.40),
                           Source(shards=TOKENS / "interleaved", weight=0.15), Source(shards=TOKENS / "conversations", weight=0.10))))),
    parallel=Parallel(ranks=16), precision="bf16", loader_workers=2, spikes=Spikes(rule="skip"),
    save_every=1_000, keep_last=3, keep_every=10_000, validate_every=1_000, log_every=10, tensorboard=True)
