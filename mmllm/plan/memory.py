"""What a rank keeps in memory, by kind, for each pipeline stage; the worst one decides.

Weights, gradients and optimizer state follow from counts. Activations are what the backward pass needs, a term for each tensor that is
kept (the method of Korthikanti et al. 2022, arXiv:2205.05198, section 4, for RMSNorm, grouped queries, a gated MLP and fused attention,
which keeps no scores); in flight on a stage are as many micro-batches as its schedule starts before it ends one (their section 4.2.3;
Narayanan et al. 2021, arXiv:2104.04473, section 2.2). Workspace is an allowance, not a count.

Letters: h, q, k, f, v, t as in `mmllm.plan.job`.
"""

from __future__ import annotations

from typing import NamedTuple

from mmllm.plan.hardware import GIB
from mmllm.plan.job import Job
from mmllm.plan.parameters import of_stage, states, trained

CHUNK_BYTES = 512 << 20
"""Logits in fp32 that our loss holds at once (mmllm.megatron.loss)."""
RESERVE_BYTES = 2.5 * GIB
"""CUDA context, NCCL's buffers, workspaces of cuBLAS and Transformer Engine."""
FRAGMENTATION = 0.04
"""Of what comes and goes, lost between blocks."""


class Memory(NamedTuple):
    """bytes of one rank."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    workspace: float

    @property
    def total(self) -> float:
        return sum(self[1:])


def kept_bytes(job: Job, narrow: bool) -> float:
    """For the backward pass, of a token in a layer, on one rank. `narrow`: the layer's products are in 8 bits, their inputs kept so."""
    model, tp, two = job.model, job.parallel.tp, job.bytes
    one = 1 if narrow else two
    norm_out = 0 if job.repeats("layernorm") else one
    norms = 2 * (two + norm_out) * model.hidden_size / job.between                    # input and output of two
    attention = two * (2 * job.q + 2 * job.k) + 4 * model.num_attention_heads         # queries, keys, values, output; a scale a head
    attention += one * job.q if narrow else 0                                         # the output once more, in 8 bits
    attention += two * (job.q + job.k) if model.qk_layernorm else 0                   # before their norm
    if model.num_experts:  # a chosen expert's input and output, its MLP; the router's scores
        each = (one + two) * model.hidden_size + (2 * two + one) * model.expert_width / job.parallel.expert_tp
        mlp = 0 if job.repeats("moe") else (model.experts_per_token * each + 8 * model.num_experts) / job.between
    else:
        mlp = 0 if job.repeats("mlp") else (2 * two + one) * model.ffn_hidden_size / tp
    # eager: norms in fp32 besides, the gate's activation by itself, heads before they are rotated
    more = 16 * model.hidden_size + two * (model.ffn_hidden_size + job.q + job.k) if job.eager else 0
    return norms + attention / tp + mlp + more


def in_flight(job: Job, stage: int) -> float:
    """Micro-batches, in whole stages, that are through forward and not through backward."""
    pp, chunks = job.parallel.pp, job.parallel.virtual_stages
    started = pp - stage if chunks == 1 else 2 * (pp - stage - 1) + (chunks - 1) * pp + 1
    return min(max(1.0, job.m) * chunks, started) / chunks


def of(job: Job, stage: int) -> Memory:
    """One rank's of a stage."""
    model, parallel, t, two = job.model, job.parallel, job.t, job.bytes
    counts = of_stage(job, stage)
    training = trained(job, counts)
    layers, narrow, again = job.stage_layers[stage], job.narrow_layers(stage), job.repeated_layers(stage)
    dp, _ = job.copies

    weights = two * counts.total
    if narrow:  # what is multiplied, in both orders, which Hopper's fp8 needs: instead of the bf16 weight, or beside it
        eight = counts.matrices * narrow / layers
        weights += 0 if job.fp8.keeps_params else 2 * eight
    each = 0 if job.offload != "none" else (12 if two == 2 else 8)            # two moments, and an fp32 master where the weight is narrower
    optimizer = each * states(job, training)
    weights *= 0 if job.offload == "all" else 1 / (dp if job.zero == 3 else 1)
    gradients = job.gradient_bytes * training.total / (dp if job.zero >= 2 else 1)

    average = (kept_bytes(job, True) * narrow + kept_bytes(job, False) * (layers - narrow)) / layers
    inputs = two * model.hidden_size / job.between                  # what a layer that is computed again keeps
    activations = t * ((layers - again) * average + again * inputs + (inputs if stage == 0 else 0)) * in_flight(job, stage)
    activations += t * average if again else 0                      # and everything of one, while it is

    logits = 0.0
    if stage == parallel.pp - 1:
        rows = job.vocab / parallel.tp
        if job.fused_loss:
            logits = 2 * two * t * rows
        elif job.eager:  # in bf16 and in fp32, their logarithm, and both gradients
            logits = (2 * two + 12) * t * job.trained * rows
        else:  # a chunk: logits, chances, their gradient in bf16; the weight's gradient; hidden states gathered, and their gradient
            logits = 2.5 * min(CHUNK_BYTES, 4 * t * job.trained * rows) + two * rows * model.hidden_size + 2 * two * t * model.hidden_size
    mlp = model.experts_per_token * model.expert_width if model.num_experts else model.ffn_hidden_size
    workspace = RESERVE_BYTES + 2 * two * t * (max(2 * mlp, job.q + 2 * job.k) / parallel.tp + model.hidden_size)
    workspace += FRAGMENTATION * (activations + logits)
    if job.zero == 3:  # two layers gathered at a time, one of gradients
        workspace += 3 * two * max(counts.matrices / max(1, layers), counts.embedding / 2)
    return Memory(stage, weights, gradients, optimizer, activations, logits, workspace)


def worst(job: Job) -> Memory:
    """Of the stage whose ranks need most."""
    return max((of(job, stage) for stage in range(job.parallel.pp)), key=lambda memory: memory.total)
