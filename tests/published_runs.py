"""Training runs that others published, as jobs of ours, with what they reached.

Megatron-LM: README.md and images/model_table.png at d98e8a6 (GPT of 131,072 rows, rows of 4,096 tokens, H100, bf16, tensor-parallel,
gradient and weight messages overlapped). Its models have no gate: ours of the same weights stand in, 3 h · 8h/3 for 2 h · 4h. It says
neither micro-batch nor virtual stages; its authors chose good ones, so the plan's fastest that fits is taken.

Megatron-Bridge: docs/performance-summary-archive.md at 067f987, H100 unless named; options from src/megatron/bridge/perf_recipes/llama
(per-tensor current scaling, weights in fp8, no layer in bf16, gradients reduced in bf16, everything overlapped, Transformer Engine's loss).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mmllm.config import Fp8, Model, Parallel
from mmllm.plan import memory, step
from mmllm.plan.hardware import GPUS
from mmllm.plan.job import Job


@dataclass(frozen=True)
class Run:
    name: str
    job: Job
    tflops: float
    """Model TFLOP/s of a GPU, published."""
    hardware: str = "h100"


def llama(layers: int, hidden: int, heads: int, ffn: int) -> Model:
    """Grattafiori et al. 2024, arXiv:2407.21783, table 3."""
    return Model(num_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_query_groups=8, ffn_hidden_size=ffn,
                 qk_layernorm=False)


LLAMA_8B, LLAMA_70B, LLAMA_405B = llama(32, 4096, 32, 14_336), llama(80, 8192, 64, 28_672), llama(126, 16_384, 128, 53_248)
QWEN3_8B = Model(num_layers=36, hidden_size=4096, num_attention_heads=32, num_query_groups=8, head_dim=128, ffn_hidden_size=12_288)
QWEN3_06B = Model(num_layers=28, hidden_size=1024, num_attention_heads=16, num_query_groups=8, head_dim=128, ffn_hidden_size=3072,
                  tie_embeddings=True)
QWEN3_30B = Model(num_layers=48, hidden_size=2048, num_attention_heads=32, num_query_groups=4, head_dim=128, ffn_hidden_size=6144,
                  num_experts=128, experts_per_token=8, expert_ffn_hidden_size=768)
QWEN3_235B = replace(QWEN3_30B, num_layers=94, hidden_size=4096, num_attention_heads=64, ffn_hidden_size=12_288,
                     expert_ffn_hidden_size=1536)

MEGATRON = (  # name, heads, hidden, layers, tp, pp, GPUs, rows a step, TFLOP/s
    ("1.7B", 16, 2048, 24, 1, 1, 48, 192, 408.8), ("7.1B", 32, 4096, 30, 2, 1, 96, 192, 465.9),
    ("16B", 48, 6144, 32, 4, 1, 192, 192, 489.1), ("32B", 56, 7168, 48, 8, 1, 384, 192, 459.6),
    ("70B", 64, 8192, 84, 8, 2, 768, 384, 419.7), ("119B", 80, 10_240, 92, 8, 4, 1536, 768, 420.5),
    ("177B", 96, 12_288, 96, 8, 6, 2304, 1152, 432.8), ("314B", 128, 16_384, 96, 8, 8, 3072, 1536, 474.4),
    ("462B", 144, 18_432, 112, 8, 16, 6144, 3072, 459.9))


def megatron() -> Iterator[Run]:
    for name, heads, hidden, layers, tp, pp, gpus, rows, reached in MEGATRON:
        model = Model(num_layers=layers, hidden_size=hidden, num_attention_heads=heads, ffn_hidden_size=round(8 * hidden / 3),
                      qk_layernorm=False)
        each, stage = rows * tp * pp // gpus, layers // pp
        jobs = [Job(model=model, parallel=Parallel(ranks=gpus, tp=tp, pp=pp, virtual_stages=chunks), vocab=131_072, row_len=4096,
                    global_batch=rows, micro_batch=micro, overlapped_tp=True, overlapped_gather=True, fused_loss=True)
                for micro in (1, 2, 4) for chunks in range(1, stage + 1)
                if each % micro == 0 and (chunks == 1 or (pp > 1 and stage % chunks == 0 and each // micro % pp == 0))]
        fitting = [job for job in jobs if memory.worst(job).total <= GPUS["h100"].memory_bytes]
        yield Run(f"Megatron-LM {name}", min(fitting, key=lambda job: step.estimate(job, GPUS["h100"]).seconds), reached)


def bridge(name: str, reached: float, model: Model, widths: dict[str, Any], rows: int, hardware: str = "h100", **options: Any) -> Run:
    defaults: dict[str, Any] = {
        "vocab": 128_256, "row_len": 8192, "fp8": Fp8(scaling="tensorwise", first_layers_bf16=0, last_layers_bf16=0), "gradient_bytes": 2,
        "overlapped_tp": True, "overlapped_gather": True, "fused_loss": True}
    job = Job(model=model, parallel=Parallel(**widths), global_batch=rows, **{**defaults, **options})
    return Run(f"Bridge {name}", job, reached, hardware)


WIDTHS_70B = {"ranks": 64, "tp": 4, "pp": 8, "virtual_stages": 5}
# the embedding and the loss count as a layer each
WIDTHS_405B = {"ranks": 1024, "tp": 8, "pp": 8, "cp": 2, "virtual_stages": 8, "first_stage_layers": 15, "last_stage_layers": 15}
QWEN3: dict[str, Any] = {"vocab": 151_936, "row_len": 4096}
RUNS = (
    *megatron(),
    bridge("8B, 25.11", 744, LLAMA_8B, {"ranks": 8, "recompute": "full", "recompute_layers": 5}, 128, zero=3),
    bridge("70B, 25.11", 719, LLAMA_70B, WIDTHS_70B, 128),
    bridge("70B, 26.04.01", 731, LLAMA_70B, WIDTHS_70B, 256),
    bridge("70B, tuning, 26.06", 710, LLAMA_70B, {"ranks": 32, "tp": 4, "pp": 4, "virtual_stages": 5}, 32, row_len=4096),
    bridge("405B, 25.11", 737, LLAMA_405B, WIDTHS_405B, 512),
    bridge("405B, 26.04.01", 827, LLAMA_405B, WIDTHS_405B, 1536),
    bridge("30B-A3B, 26.06", 203, QWEN3_30B, {"ranks": 16, "ep": 16}, 1024, **QWEN3),
    bridge("235B-A22B, 26.04.01", 253, QWEN3_235B, {"ranks": 256, "tp": 2, "pp": 8, "ep": 32, "virtual_stages": 4, "first_stage_layers": 11,
                                                    "last_stage_layers": 11}, 8192, **QWEN3),
    bridge("8B on B200, 25.11", 1576, LLAMA_8B, {"ranks": 8}, 128, "b200", micro_batch=2),
    bridge("405B on B200, 25.11", 1667, LLAMA_405B, {**WIDTHS_405B, "ranks": 128, "tp": 4}, 64, "b200"),
    bridge("8B on GB200, 25.11", 1622, LLAMA_8B, {"ranks": 8}, 128, "gb200", micro_batch=2),
)
TITAN = Job(model=LLAMA_8B, parallel=Parallel(ranks=8), vocab=128_256, row_len=8192, global_batch=8, zero=3, eager=True)
"""torchtitan, benchmarks/llama3_h100_202412_torchtitan.md: uncompiled 8B under FSDP in bf16, 5,762 tokens/s a GPU, on H100s of 500 W.
`eager` is fitted on it; what it recomputes is not modelled."""
FITTED = {"Megatron-LM 16B": "bf16", "Megatron-LM 32B": "tp_in_sight", "Bridge 8B, 25.11": "fp8", "Bridge 30B-A3B, 26.06": "experts"}
"""Runs that a constant of mmllm.plan.hardware was fitted on; all others are held out."""
