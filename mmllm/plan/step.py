"""How long a step takes: arithmetic, memory traffic and messages of the slowest stage, and what the schedule adds.

Three kinds of time add up in a layer, since a GPU does one after the other: matrix products at a part of the peak, element-wise work at a
part of the memory's bandwidth, messages in sight at a part of the link's. What is overlapped counts where it is longer than what hides
it.

*Model* FLOPs, which MFU counts, are Megatron-LM's (`num_floating_point_operations` in megatron/training/training.py): 6 a weight and
token, attention at its causal half, the whole output layer, nothing that is computed twice. *Done* is what the hardware does: layers that
are computed again, and no output layer for tokens that are not trained on.

Letters: h, q, k, f, v, t, m as in `mmllm.plan.job`.
"""

from __future__ import annotations

from typing import NamedTuple

from mmllm.flops import FORWARD_AND_BACKWARD, attention_flops, head_flops, matrix_flops, weights_met
from mmllm.plan.hardware import REACHED, Gpu, Reached
from mmllm.plan.job import Job
from mmllm.plan.parameters import of_layer, of_stage, states, trained

ATTENTION_PASSES = 3.5
"""Products of fused attention, forward and backward, in forward passes: it computes the scores again."""
LAUNCHES = 80
"""Kernels of a layer, forward and backward: what a small model waits for."""


class Layer(NamedTuple):
    """s of a micro-batch in one layer on one rank, forward and backward."""

    matrices: float
    attention: float
    elementwise: float
    tp: float
    """In sight, as those below."""
    cp: float
    ep: float
    again: float
    """What is computed twice of it, were the layer recomputed as the recipe says."""

    @property
    def once(self) -> float:
        return sum(self[:-1])


class Step(NamedTuple):
    """A step, and where its time goes."""

    seconds: float
    parts: dict[str, float]
    """s of the slowest stage; they add up to `seconds`."""
    sent: dict[str, float]
    """bytes that one rank sends, by group."""
    message_seconds: dict[str, float]
    """s that sending them takes, in sight or not."""
    flops: float
    """Model FLOPs of all ranks."""
    tokens_per_s: float
    """A GPU's."""
    flops_per_s: float
    """A GPU's model FLOPs."""
    mfu: float
    """Of the bf16 peak, under fp8 too, so that both compare."""


def model_flops(job: Job) -> float:
    """Of a step, with the whole output layer."""
    attention = attention_flops(job.model, 1) * job.span             # of a token: a document's are in the square of its length
    return job.tokens * FORWARD_AND_BACKWARD * (matrix_flops(job.model) + attention + head_flops(job.model, job.vocab))


def elementwise_bytes(job: Job, narrow: bool) -> float:
    """Read and written between matrix products, of a token in a layer, forward and backward, on one rank."""
    model, h, tp, between = job.model, job.model.hidden_size, job.parallel.tp, job.between
    wide = job.bytes / 2                                             # counted in bf16
    moved = (20 + 24) * h / between                                  # two norms: 8 there, 12 back; two residual sums: 12 and 12
    moved += (8 + (10 if model.qk_layernorm else 0)) * (job.q + job.k) / tp              # rotation; norm of queries and keys
    f, split, copies = model.ffn_hidden_size, tp, 1
    if model.num_experts:  # tokens are sorted by expert and back, there and back again
        f, split, copies = model.expert_width / job.parallel.expert_tp, between, model.experts_per_token
        moved += copies * 16 * h / between
    moved += copies * 16 * f / split                                 # the gate: 4 in, 2 out; back 6 in, 4 out
    if not narrow:
        return wide * moved
    # each input and each gradient of a product: read for its largest value, read again, written in 8 bits in both orders
    inputs = job.q / tp + h / between + copies * (h / between + f / split)
    gradients = (job.q + 2 * job.k) / tp + h / between + copies * (h / between + 2 * f / split)
    return moved + 6 * (inputs + gradients)


def bandwidth(gpu: Gpu, reached: Reached, ranks: int, stride: int) -> float:
    """bytes/s of a rank in a ring of `ranks`, `stride` GPUs apart. A ring over hosts uses the adapters of all its ranks in one."""
    inside = gpu.link * reached.link
    if ranks * stride <= gpu.domain:
        return inside
    return min(inside, gpu.network * reached.network * max(1, gpu.domain // stride))


def messages(job: Job, gpu: Gpu, reached: Reached) -> dict[str, tuple[float, float]]:
    """(bytes that a rank sends, s) of a micro-batch: in a layer for tp, cp and ep, over a border of stages for pp."""
    parallel, h, t = job.parallel, job.model.hidden_size, job.t
    tp, cp, ep = parallel.tp, parallel.cp, parallel.ep
    # gather and scatter around attention and MLP, there and back, and inputs gathered again for the weights' gradients; or four sums
    tp_bytes = (10 if parallel.sequence_parallel else 8) * job.bytes * h * t * (tp - 1) / tp
    cp_bytes = 3 * job.bytes * 2 * job.k / tp * t * (cp - 1)         # keys and values pass by once, and twice in the backward pass
    ep_bytes = 4 * job.bytes * h * job.model.experts_per_token * t / job.between * (ep - 1) / ep       # to experts and from, there and back
    pp_bytes = 2 * job.bytes * h * t / job.between * parallel.virtual_stages if parallel.pp > 1 else 0.0
    rings = {"tp": (tp_bytes, tp, 1), "cp": (cp_bytes, cp, tp), "ep": (ep_bytes, ep, parallel.expert_tp),
             "pp": (pp_bytes, parallel.pp, parallel.ranks // parallel.pp)}
    return {name: (size, size / bandwidth(gpu, reached, ranks, stride)) for name, (size, ranks, stride) in rings.items()}


def layer_of(job: Job, gpu: Gpu, reached: Reached, narrow: bool) -> Layer:
    """A layer whose products are in 8 bits, or not."""
    parallel, t, h = job.parallel, job.t, job.model.hidden_size
    share = reached.eager if job.eager else 1.0
    peak, memory = peak_of(job, gpu, reached, narrow) * share, gpu.memory_bandwidth * reached.memory * share
    passes = 2 if job.lora_rank else 3                               # no gradient of a frozen matrix
    dense, expert = weights_met(job.model)
    dense_s, expert_s = (2 * t * weights / split / rate for weights, split, rate in (
        (dense, parallel.tp, peak), (expert, job.between, peak * reached.experts)))      # forward
    attend = 2 * job.q * job.span / parallel.tp * t / (gpu.bf16 * reached.attention)     # forward
    accumulated = 0 if job.lora_rank else of_layer(job.model, parallel).matrices * (8 if job.fused_loss else 12)    # gradients, summed
    elementwise = (t * elementwise_bytes(job, narrow) + accumulated) / memory
    sent = messages(job, gpu, reached)
    tp = sent["tp"][1] * (reached.tp_in_sight if job.overlapped_tp else 1.0)
    cp = max(0.0, sent["cp"][1] - ATTENTION_PASSES * attend)
    again = 0.0
    if parallel.recompute == "full":
        again = dense_s + expert_s + attend + elementwise / 3 + 0.4 * tp + sent["ep"][1] / 2
    for module in parallel.recompute_modules if parallel.recompute == "selective" else ():
        mlp = 2 * t * 3 * h * job.model.ffn_hidden_size / parallel.tp / peak + 0.2 * tp
        norms = 8 * h * t / job.between / memory
        again += {"core_attn": attend, "mlp": mlp, "moe": expert_s + sent["ep"][1] / 2, "layernorm": norms}[module]
    return Layer(passes * (dense_s + expert_s), ATTENTION_PASSES * attend, elementwise, tp, cp, sent["ep"][1], again)


def peak_of(job: Job, gpu: Gpu, reached: Reached, narrow: bool) -> float:
    """FLOP/s that matrix products reach."""
    if narrow:
        if gpu.fp8 is None:
            raise ValueError(f"fp8.scaling is {job.fp8.scaling} but {gpu.name} has no fp8: plan for h100 or later, or set fp8.scaling none")
        return gpu.fp8 * reached.fp8
    return gpu.bf16 * reached.bf16 / (16 if job.precision == "fp32" else 1)    # CUDA cores: 67 of 989 TFLOP/s on H100


def estimate(job: Job, gpu: Gpu, reached: Reached = REACHED) -> Step:
    """Of the slowest stage, and of the step."""
    model, parallel, t, m = job.model, job.parallel, job.t, job.m
    memory, wide = gpu.memory_bandwidth * reached.memory, layer_of(job, gpu, reached, False)
    eight = layer_of(job, gpu, reached, True) if job.fp8.scaling != "none" else wide
    sent = messages(job, gpu, reached)

    rows = job.vocab / parallel.tp * t * (1.0 if job.fused_loss else job.trained)
    head = 6.0 * model.hidden_size * rows / peak_of(job, gpu, reached, False) + (12 if job.fused_loss else 44) * rows / memory
    border = sent["pp"][1] if parallel.virtual_stages == 1 else 0.0  # else behind the chunks
    stages = list[dict[str, float]]()
    for stage, layers in enumerate(job.stage_layers):
        narrow, again = job.narrow_layers(stage), job.repeated_layers(stage) if parallel.recompute == "full" else layers
        part = {name: narrow * getattr(eight, name) + (layers - narrow) * getattr(wide, name) for name in Layer._fields}
        part["again"] *= again / max(1, layers)
        part["launches"] = max(0.0, LAUNCHES * layers * reached.launch_s - sum(part.values()))
        stages.append({**part, "head": head if stage == parallel.pp - 1 else 0.0, "pp": border})
    slowest = max(stages, key=lambda part: sum(part.values()))
    each = sum(slowest.values())

    # once a step: gradients, weights, the optimizer
    held = [of_stage(job, stage) for stage in range(parallel.pp)]
    training = max((trained(job, counts) for counts in held), key=lambda counts: counts.total)
    dp, expert_dp = job.copies
    rate = bandwidth(gpu, reached, dp, parallel.tp)
    moved = training.dense * (dp - 1) / dp + training.expert * (expert_dp - 1) / expert_dp
    weight_bytes = 1 if job.fp8.keeps_params else job.bytes
    reduced, gathered = job.gradient_bytes * moved, weight_bytes * moved
    if job.zero == 3:  # weights twice and gradients once a micro-batch, behind it
        whole = max(counts.total for counts in held) * (dp - 1) / dp
        reduced, gathered = m * reduced, 2 * m * weight_bytes * whole
        from_host = 2 * m * job.bytes * whole / dp / gpu.host if job.offload == "all" else 0.0
        in_sight = max(0.0, (reduced + gathered) / rate + from_host - m * each)
    else:
        in_sight = max(0.1 * reduced / rate, reduced / rate - each * 2 / 3)                  # behind the last backward pass
        in_sight += max(0.0, gathered / rate - (each / 3 if job.overlapped_gather else 0.0))
    held_states = states(job, training)
    host = 32 * held_states / gpu.host if job.offload != "none" else 0.0  # gradients there, weights back, and Adam at the host's bandwidth
    update = (34 * held_states + 2 * job.gradient_bytes * training.total) / memory + host

    parts = {name: m * value for name, value in slowest.items()}
    parts |= {"bubble": each * (parallel.pp - 1) / parallel.virtual_stages, "dp": in_sight, "optimizer": update}
    seconds, flops = sum(parts.values()), model_flops(job)
    layers = max(job.stage_layers)
    times = {"tp": m * layers, "cp": m * layers, "ep": m * layers * bool(model.num_experts), "pp": m}
    speed = flops / seconds / parallel.ranks
    return Step(seconds, parts, {**{n: c * sent[n][0] for n, c in times.items()}, "dp": reduced + gathered},
                {**{n: c * sent[n][1] for n, c in times.items()}, "dp": (reduced + gathered) / rate},
                flops, job.tokens / seconds / parallel.ranks, speed, speed / gpu.bf16)
