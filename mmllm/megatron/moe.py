"""Experts: which of them a token goes to, and the loss that keeps them equally busy.

megatron-core routes and exchanges the tokens; ours is the balance loss. Like every loss here it is a sum whose divisor is the
whole global batch, so that any split into ranks and micro-batches gives the same step, and padding takes no part in it.
(In 0.16.1 the gradient of its own would shrink with the ranks that share a micro-batch: it multiplies by the tokens of one.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_tokens_per_expert_and_token_count
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

if not torch.cuda.is_available():
    # 0.16.1 names it only where Transformer Engine is, and asks for it everywhere
    moe_utils.te_general_gemm = None                                           # type: ignore[attr-defined]


class Router(TopKRouter):
    """Softmax over the k likeliest experts, with our balance loss."""

    def _apply_aux_loss(self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor,
                        with_padding_mask: bool = False) -> Tensor:
        """scores_for_aux_loss, routing_map [t, experts] of this rank, zero at padding. Switch Transformer, equation 4: experts
        Σ f P, f the share of the (token, expert) pairs and P the mean chance of each expert over the micro-batch."""
        config: Any = self.config
        weight = self.get_aux_loss_coeff("aux_loss")
        if weight == 0:
            return probs
        busy, _, tokens = get_tokens_per_expert_and_token_count(                # over the ranks that share the micro-batch
            routing_map=routing_map, reduce_group=self.tp_cp_group, topk=self.topk, with_padding_mask=with_padding_mask)
        loss = config.num_moe_experts * (scores_for_aux_loss.sum(0) * busy).sum() / (self.topk * tokens * tokens)
        loss = loss * (tokens / config.balance_tokens)                          # the micro-batch counts by its tokens
        config.balance_seen = config.balance_seen + loss.detach()
        return MoEAuxLossAutoScaler.apply(probs, weight * loss)                # type: ignore[no-any-return]


def is_balanced(config: Any) -> bool:
    """There are experts, and a loss that balances them."""
    return bool(config.num_moe_experts) and config.moe_aux_loss_coeff > 0


def take_balance(config: Any) -> float:
    """The balance loss of the step, mean of the layers, 1 where all experts are equally busy; asked of all ranks at once."""
    seen = torch.as_tensor(config.balance_seen, dtype=torch.float32, device="cuda" if torch.cuda.is_available() else "cpu")
    config.balance_seen = 0.0
    dist.all_reduce(seen)
    return float(seen) / int(config.num_layers)
