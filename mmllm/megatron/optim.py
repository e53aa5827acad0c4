"""The optimizer and its schedule: megatron-core's distributed AdamW under our names.

The distributed optimizer gives each data-parallel rank a slice of the fp32 weights and moments: gradients are reduced
and scattered, weights gathered after the step. It is used on one rank too, so that a checkpoint has one format.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer

from mmllm.config import Optim, Pretrain
from mmllm.megatron.model import Decoder
from mmllm.run import resolve_precision


def wrap(decoder: Decoder) -> DistributedDataParallel:
    """The decoder with its gradients in one fp32 buffer."""
    # gloo gains nothing from overlap and pays for buckets
    overlap = torch.cuda.is_available()
    wrapped = DistributedDataParallel(
        decoder.config, DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, use_distributed_optimizer=True), decoder)
    # no division by a token count: the loss is already normalised by the weight of the global batch
    decoder.config.finalize_model_grads_func = (
        lambda model, _tokens, **kwargs: finalize_model_grads(model, None, **kwargs))
    if overlap:
        decoder.config.no_sync_func = wrapped.no_sync
    return wrapped


def make(recipe: Pretrain, model: DistributedDataParallel) -> ChainedOptimizer:
    """AdamW over the wrapped decoder."""
    optim, dtype = recipe.optim, resolve_precision(recipe.precision)
    config = OptimizerConfig(
        optimizer="adam", lr=optim.lr, min_lr=optim.lr * optim.min_lr_ratio, decoupled_lr=optim.embedding_lr,
        weight_decay=optim.weight_decay, adam_beta1=optim.betas[0], adam_beta2=optim.betas[1], adam_eps=optim.eps,
        clip_grad=optim.clip_grad, bf16=dtype == torch.bfloat16, params_dtype=dtype, use_distributed_optimizer=True)
    optimizer: Any = get_megatron_optimizer(config, [model], use_gloo_process_groups=torch.cuda.is_available())
    # moments exist before the first step, so it can be saved
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
        for group in part.optimizer.param_groups:
            if group["params"]:
                group.setdefault("step", 0)
    return optimizer


def lr_scale(step: int, steps: int, optim: Optim) -> float:
    """Part of the highest rate at a step, 0 …: linear warmup, hold, cosine to `min_lr_ratio`."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    decay_start = optim.warmup_steps + optim.hold_ratio * steps
    if step < decay_start:
        return 1.0
    progress = min(1.0, (step - decay_start) / max(1.0, steps - decay_start))
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: ChainedOptimizer, step: int, recipe: Pretrain) -> float:
    """Set every group's rate for a step; returns that of the layers."""
    scale = lr_scale(step, recipe.steps, recipe.optim)
    groups: list[dict[str, Any]] = optimizer.param_groups
    for group in groups:
        group["lr"] = group["max_lr"] * scale
    return recipe.optim.lr * scale
