"""How many weights a decoder has, and how many of them a rank holds. Exact: a test holds it against built models.

The distinction is *dense* and *expert*: experts are split over ep ranks, and their optimizer's state over other ranks than the rest's.

Letters: h, q, k, f, v as in `mmllm.plan.job`.
"""

from __future__ import annotations

from typing import NamedTuple

from mmllm.config import Model, Parallel
from mmllm.plan.job import Job


class Counts(NamedTuple):
    """Weights of one rank, or of all."""

    dense: int
    expert: int
    matrices: int
    """Those of both that layers multiply by, which fp8 is for."""
    embedding: int
    """Those of both that are rows of the vocabulary."""

    @property
    def total(self) -> int:
        return self.dense + self.expert


def of_layer(model: Model, parallel: Parallel) -> Counts:
    """A rank's part of a layer."""
    h, d = model.hidden_size, model.head_width
    q, k = model.num_attention_heads * d, model.groups * d
    attention = 2 * h * (q + k)                                     # queries and output, keys and values
    whole = 2 * h + (2 * d if model.qk_layernorm else 0)            # norms: on every rank of tp
    bias = q + 2 * k if model.qkv_bias else 0
    if not model.num_experts:
        matrices = (attention + 3 * h * model.ffn_hidden_size) // parallel.tp
        return Counts(matrices + bias // parallel.tp + whole, 0, matrices, 0)
    matrices = attention // parallel.tp
    experts = model.num_experts // parallel.ep * 3 * h * (model.expert_width // parallel.expert_tp)
    return Counts(matrices + bias // parallel.tp + whole + model.num_experts * h, experts, matrices + experts, 0)    # … and the router


def of_stage(job: Job, stage: int) -> Counts:
    """One rank's of a pipeline stage. A tied embedding lies on the first and on the last."""
    model, one, layers = job.model, of_layer(job.model, job.parallel), job.stage_layers[stage]
    first, last = stage == 0, stage == job.parallel.pp - 1
    rows = job.vocab * model.hidden_size // job.parallel.tp * (first + last - (first and last and model.tie_embeddings))
    return Counts(one.dense * layers + rows + (model.hidden_size if last else 0), one.expert * layers, one.matrices * layers, rows)


def whole(model: Model, vocab: int) -> Counts:
    """The model's."""
    one, layers, rows = of_layer(model, Parallel()), model.num_layers, vocab * model.hidden_size * (1 if model.tie_embeddings else 2)
    return Counts(one.dense * layers + rows + model.hidden_size, one.expert * layers, one.matrices * layers, rows)


def active(model: Model, vocab: int) -> int:
    """What a token meets: of each layer's experts the chosen ones."""
    counts = whole(model, vocab)
    return counts.dense + (counts.expert * model.experts_per_token // model.num_experts if model.num_experts else 0)


def trained(job: Job, counts: Counts) -> Counts:
    """Of those the ones with gradients: all, or with LoRA two thin matrices beside a layer's (Hu et al. 2021, arXiv:2106.09685)."""
    if not job.lora_rank:
        return counts
    h, f = job.model.hidden_size, job.model.ffn_hidden_size
    sides = {"q_proj": h + job.q, "k_proj": h + job.k, "v_proj": h + job.k, "o_proj": job.q + h, "gate_proj": h + f, "up_proj": h + f,
             "down_proj": f + h}
    thin = job.lora_rank * sum(sides[name] for name in job.lora_targets) * job.model.num_layers
    rows = job.lora_rows * h * (1 if job.model.tie_embeddings else 2)
    return Counts(thin + rows, 0, 0, rows)


def states(job: Job, training: Counts) -> float:
    """Of the weights with gradients those whose optimizer state a rank has."""
    dense, expert = job.copies if job.zero else (1, 1)
    return training.dense / dense + training.expert / expert
