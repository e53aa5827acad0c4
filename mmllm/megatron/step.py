"""One step's arithmetic: every micro-batch forward and backward, and the losses of the whole batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mmllm.megatron import moe, parallel
from mmllm.megatron.batch import MicroBatch
from mmllm.megatron.loss import STATISTICS, means
from mmllm.megatron.parallel import Layout


def forward_backward(model: list[DistributedDataParallel], batches: list[MicroBatch], layout: Layout) -> dict[str, float]:
    """Every micro-batch of a step through megatron-core's schedule; gradients are ready, the global batch's losses
    returned to all."""

    def forward_step(iterator: Any, part: Any) -> tuple[Any, Any]:
        batch: MicroBatch = next(iterator)
        output = part(batch.tokens, None, None, labels=batch.targets, packed_seq_params=batch.packed)
        if not isinstance(output, tuple):                                     # a stage before the last
            return output, None
        loss, statistics = output

        # loss, tokens to divide by (already done), to collect
        def report(loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return loss, torch.zeros((), dtype=torch.int, device=layout.device), statistics
        return loss, report

    iterators, parts = [iter(batches) for _ in model], list[torch.nn.Module](model)
    reported = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iterators if len(model) > 1 else iterators[0], model=parts,
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.size(1) * layout.cp, micro_batch_size=1, forward_only=not torch.is_grad_enabled())
    sums = torch.stack(reported).sum(0) if reported else torch.zeros(len(STATISTICS), device=layout.device)
    if layout.dp * layout.cp > 1:
        dist.all_reduce(sums, group=parallel.batch_group())
    if layout.pp > 1:
        dist.all_reduce(sums, group=parallel.pipeline_group())                 # zeros but on the last stage
    losses, config = means(sums.tolist()), model[0].module.config
    if torch.is_grad_enabled() and moe.is_balanced(config):
        losses["balance"] = moe.take_balance(config)
    return losses
