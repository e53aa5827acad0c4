"""The optimizer and its schedule: megatron-core's distributed AdamW under our names.

The distributed optimizer gives each data-parallel rank a slice of the fp32 weights and moments: gradients are reduced
and scattered, weights gathered after the step. It is used on one rank too, so that a checkpoint has one format.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from mmllm.config import Optim, Pretrain
from mmllm.megatron import fp8
from mmllm.megatron.model import Decoder
from mmllm.run import resolve_precision


def wrap(chunks: Sequence[Decoder]) -> list[DistributedDataParallel]:
    """Each chunk of the decoder with its gradients in one fp32 buffer."""
    # gloo gains nothing from overlap and pays for buckets
    overlap = torch.cuda.is_available()
    config = chunks[0].config
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, use_distributed_optimizer=True,
        **fp8.gradient_fields(config))
    # the first chunk's gradients are ready last: only there is something to overlap with
    wrapped = [DistributedDataParallel(config, settings, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]
    # no division by a token count: the loss is already normalised by the weight of the global batch
    config.finalize_model_grads_func = (
        lambda model, _tokens, **kwargs: finalize_model_grads(model, None, **kwargs))
    if overlap:
        no_sync: Any = [each.no_sync for each in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
        config.no_sync_func = no_sync
    return wrapped


def make(recipe: Pretrain, model: list[DistributedDataParallel]) -> ChainedOptimizer:
    """AdamW over the wrapped decoder."""
    optim, dtype = recipe.optim, resolve_precision(recipe.precision)
    config = OptimizerConfig(
        optimizer="adam", lr=optim.lr, min_lr=optim.lr * optim.min_lr_ratio, decoupled_lr=optim.embedding_lr,
        weight_decay=optim.weight_decay, adam_beta1=optim.betas[0], adam_beta2=optim.betas[1], adam_eps=optim.eps,
        clip_grad=optim.clip_grad, bf16=dtype == torch.bfloat16, params_dtype=dtype, use_distributed_optimizer=True,
        **fp8.optimizer_fields(model[0].config))
    optimizer: Any = get_megatron_optimizer(config, list[Any](model), use_gloo_process_groups=torch.cuda.is_available())
    # moments exist before the first step, so it can be saved
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
        for group in part.optimizer.param_groups:
            if group["params"]:
                group.setdefault("step", 0)
    return optimizer


@torch.no_grad()
def gradient_norm(optimizer: ChainedOptimizer) -> float:
    """Of the whole gradient, over all ranks; not a number where megatron-core found one that is none. First half of a step."""
    if optimizer.prepare_grads():
        return math.nan
    return float(optimizer.get_grad_norm() or 0.0)


@torch.no_grad()
def update(optimizer: ChainedOptimizer, norm: float) -> None:
    """Clip by the norm and move the weights. Second half of a step: between the two it may be called off."""
    for part in optimizer.chained_optimizers:
        parameters: list[Any] = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm)
    optimizer.step_with_ready_grads()


def lr_scale(step: int, steps: int, optim: Optim) -> float:
    """Part of the highest rate at a step, 0 …: linear warmup, then by `optim.schedule`, never below `min_lr_ratio`."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    low = optim.min_lr_ratio
    if optim.schedule == "inverse_sqrt":
        return max(low, math.sqrt(optim.warmup_steps / (step + 1)))
    begin = optim.warmup_steps + optim.hold_ratio * steps if optim.schedule == "cosine" else max(
        optim.warmup_steps, (1 - optim.decay_ratio) * steps)
    if step < begin:
        return 1.0
    progress = min(1.0, (step - begin) / max(1.0, steps - begin))
    if optim.schedule == "cosine":
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - (1 - low) * (progress if optim.decay == "linear" else math.sqrt(progress))


def set_lr(optimizer: ChainedOptimizer, step: int, recipe: Pretrain) -> float:
    """Set every group's rate for a step; returns that of the layers."""
    scale = lr_scale(step, recipe.steps, recipe.optim)
    groups: list[dict[str, Any]] = optimizer.param_groups
    for group in groups:
        group["lr"] = group["max_lr"] * scale
    return recipe.optim.lr * scale
