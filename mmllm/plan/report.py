"""A plan as lines to read and as JSON."""

from __future__ import annotations

from typing import Any

from mmllm.config import Pretrain
from mmllm.plan import memory, parameters, step
from mmllm.plan.hardware import GIB, Gpu
from mmllm.plan.job import Job
from mmllm.runs.sft_recipe import Sft

DAY = 86_400
STATES = memory.Memory._fields[1:]


def plan(name: str, recipe: Pretrain | Sft, job: Job, gpu: Gpu) -> dict[str, Any]:
    """Everything that is known of a recipe on these GPUs, in plain values: bytes, s, FLOP, tokens."""
    model, layout = job.model, job.parallel
    whole, worst, found = parameters.whole(model, job.vocab), memory.worst(job), step.estimate(job, gpu)
    held = [parameters.of_stage(job, stage) for stage in range(layout.pp)]
    seconds = job.tokens_in_all / (found.tokens_per_s * layout.ranks)
    return {
        "recipe": name, "hardware": {"name": gpu.name, "gpus": layout.ranks, "source": gpu.source},
        "layout": {"dp": layout.dp, "tp": layout.tp, "pp": layout.pp, "virtual_stages": layout.virtual_stages, "cp": layout.cp,
                   "ep": layout.ep, "micro_batch": job.micro_batch, "micro_batches": job.m, "recompute": layout.recompute, "zero": job.zero,
                   "precision": job.precision if job.fp8.scaling == "none" else f"fp8 {job.fp8.scaling}"},
        "parameters": {"total": whole.total, "active": parameters.active(model, job.vocab), "embedding": whole.embedding,
                       "trained": sum(parameters.trained(job, counts).total for counts in held) if job.lora_rank else whole.total,
                       "of_stage": [counts.total for counts in held], "vocab_rows": job.vocab},
        "memory": {"available": gpu.memory_bytes, "total": worst.total, "stage": worst.stage, "fits": worst.total <= gpu.memory_bytes,
                   **{kind: getattr(worst, kind) for kind in STATES}, "of_stage": [memory.of(job, s).total for s in range(layout.pp)]},
        "step": {"tokens": job.tokens, "flops": found.flops, "seconds": found.seconds, "parts": found.parts, "sent": found.sent,
                 "message_seconds": found.message_seconds, "tokens_per_s_gpu": found.tokens_per_s, "flops_per_s_gpu": found.flops_per_s,
                 "mfu_bf16": found.mfu},
        "run": {"steps": job.steps, "tokens": job.tokens_in_all, "seconds": seconds, "gpu_hours": seconds * layout.ranks / 3600},
        "measured": False,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The same to read."""
    layout, hardware, counts, needed, one, run = (found[k] for k in ("layout", "hardware", "parameters", "memory", "step", "run"))
    widths = " × ".join(f"{name} {layout[name]}" for name in ("dp", "tp", "pp", "cp", "ep") if layout[name] > 1 or name == "dp")
    chunks = f", {layout['virtual_stages']} chunks a stage" if layout["virtual_stages"] > 1 else ""
    parts = sorted(((seconds / one["seconds"], name) for name, seconds in one["parts"].items()), reverse=True)
    active = f", {_count(counts['active'])} active" if counts["active"] != counts["total"] else ""
    trained = f", {_count(counts['trained'])} trained" if counts["trained"] != counts["total"] else ""
    sent = [f"{name} {size / 1e9:,.1f} GB in {one['message_seconds'][name]:.2f} s" for name, size in one["sent"].items() if size]
    return [
        f"{found['recipe']} on {hardware['gpus']:,} × {hardware['name']}: {widths}{chunks}, {layout['precision']}, micro-batches of "
        f"{layout['micro_batch']} × {layout['micro_batches']:g}, recompute {layout['recompute']}"
        + (f", ZeRO {layout['zero']}" if layout["zero"] != 1 else ""),
        f"parameters   {counts['total']:,} ({_count(counts['total'])}{active}{trained}, {_count(counts['embedding'])} of them in "
        f"{counts['vocab_rows']:,} rows of the vocabulary); {_count(max(counts['of_stage']))} on a rank",
        f"memory       {needed['total'] / GIB:.1f} of {needed['available'] / GIB:.1f} GiB on a rank of stage {needed['stage']}: "
        + ", ".join(f"{kind} {needed[kind] / GIB:.1f}" for kind in STATES),
        f"step         {one['tokens']:,} tokens, {one['flops'] / 1e15:,.1f} PFLOP, {one['seconds']:.2f} s: "
        + ", ".join(f"{name} {part:.0%}" for part, name in parts if part >= 0.005),
        f"messages     of a rank: {', '.join(sent) or 'none'}",
        f"speed        {one['tokens_per_s_gpu']:,.0f} tokens/s and {one['flops_per_s_gpu'] / 1e12:,.0f} TFLOP/s a GPU, "
        f"{one['mfu_bf16']:.1%} of the bf16 peak",
        f"run          {run['steps']:,} steps, {_count(run['tokens'])} tokens: {run['seconds'] / DAY:,.1f} days, "
        f"{run['gpu_hours']:,.0f} GPU hours",
        "planned, not measured: parts of peaks that H100s reached in published runs, mmllm/plan/hardware.py",
    ]


def _count(number: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:,.2f} {name}"
    return f"{number:,.0f}"
