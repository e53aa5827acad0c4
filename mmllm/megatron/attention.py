"""Causal self-attention over packed documents: on a CPU what stands in for Transformer Engine's, on CUDA what it lacks.

On a CPU tokens are gathered into buckets of documents of like length (`buckets`), attended to there, and gathered back. Every
token has one slot, so both directions of the gather, and both of their gradients, are gathers.

Letters: t tokens of a micro-batch, n documents of a bucket, l its length, g key heads of this rank, r query heads for
each, d width of a head.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from mmllm.megatron import rope
from mmllm.megatron.buckets import SHORT, Bucket, Packing, pack, unpacked
from mmllm.megatron.context import SharedPacking, attend_shared
from mmllm.megatron.rotary import RotaryNorm, RotaryTable


@dataclass
class PackedRow(PackedSeqParams):
    """megatron-core's description of packed documents, with the index maps for the CPU and the positions on a grid for CUDA."""

    packing: Packing | SharedPacking | None = None
    grid: Tensor | None = None
    """[3, t] time, row and column of this rank's tokens, for `GridSelfAttention`."""


@functools.cache
def causal_mask(length: int, dtype: torch.dtype) -> Tensor:
    """[l, l] of 0 and −inf."""
    return torch.full((length, length), -math.inf, dtype=dtype).triu(1)


class Gather(torch.autograd.Function):
    """Tokens [t, w] → the slots of every bucket [n * l, w]; a token's gradient is that of its one slot."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> tuple[Tensor, ...]:
        ctx.packing = packing
        return tuple(x.index_select(0, bucket.token) for bucket in packing.buckets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:           # type: ignore[override]
        every = grads[0] if len(grads) == 1 else torch.cat(grads)
        return every.index_select(0, ctx.packing.slot), None


class Ungather(torch.autograd.Function):
    """Slots of every bucket [n * l, w] → tokens [t, w]; padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, packing: Packing, *parts: Tensor) -> Tensor:
        ctx.packing = packing
        every = parts[0] if len(parts) == 1 else torch.cat(parts)
        return every.index_select(0, packing.slot)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:       # type: ignore[override]
        grads = (grad.index_select(0, b.token).index_fill_(0, b.padding, 0) for b in ctx.packing.buckets)
        return None, *grads


class ShortAttention(torch.autograd.Function):
    """softmax(q kᵀ / √d + mask) v for [n * heads, l, d]; keeps the probabilities, which the fused kernel would compute
    twice."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        scores = torch.baddbmm(causal_mask(q.size(1), q.dtype), q, k.transpose(1, 2), alpha=scale)
        chance = torch.softmax(scores, -1)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, chance)
        return torch.bmm(chance, v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:       # type: ignore[override]
        q, k, v, chance = ctx.saved_tensors
        grad_v = torch.bmm(chance.transpose(1, 2), grad)
        grad_chance = torch.bmm(grad, v.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_chance, chance, -1, chance.dtype).mul_(ctx.scale)  # type: ignore[attr-defined]
        return torch.bmm(grad_scores, k), torch.bmm(grad_scores.transpose(1, 2), q), grad_v, None


def attend(qk: Tensor, v: Tensor, bucket: Bucket, scale: float) -> Tensor:
    """One bucket. qk [n * l, g, r + 1, d], v [n * l, g, d] → [n * l, g * r * d]."""
    n, length, (g, each, d) = bucket.documents, bucket.length, qk.shape[1:]
    r = each - 1
    # [n, l, g, r + 1, d] -> [r + 1, n, g, l, d]
    qk = qk.view(n, length, g, each, d).permute(3, 0, 2, 1, 4)
    k, v = qk[r], v.view(n, length, g, d).permute(0, 2, 1, 3)                # [n, l, g, d] -> [n, g, l, d]
    q = qk[:r].permute(1, 2, 0, 3, 4)                                        # [r, n, g, l, d] -> [n, g, r, l, d]
    if length > SHORT:
        out = F.scaled_dot_product_attention(q.flatten(1, 2), k, v, is_causal=True, scale=scale, enable_gqa=r > 1)
    else:
        if r > 1:
            k, v = (x.unsqueeze(2).expand(n, g, r, length, d) for x in (k, v))
        q, k, v = (x.reshape(-1, length, d) for x in (q, k, v))
        out = ShortAttention.apply(q, k, v, scale)
    return out.view(n, g * r, length, d).transpose(1, 2).reshape(n * length, g * r * d)


class PackedSelfAttention(SelfAttention):
    """megatron-core's self-attention (its projections, names and checkpoints) with the part between them done on
    buckets."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.rotary = RotaryTable(config.rotary_frequencies)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *,      # type: ignore[override]
                packed_seq_params: PackedSeqParams | None = None, **_: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] → [s, b, h]. Causal within each document of `packed_seq_params`, or within each of the b
        columns."""
        project: Any = self.linear_qkv
        mixed, _bias = project(hidden_states)                        # [s, b, g (r + 2) d]
        s, b = mixed.shape[:2]
        packing = getattr(packed_seq_params, "packing", None)
        if packing is None:
            packing = unpacked(s, b) if packed_seq_params is None else pack(packed_seq_params.cu_seqlens_q.numpy())
        g, d = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        r = self.num_attention_heads_per_partition // g
        mixed = mixed.view(s * b, g, r + 2, d)
        cos, sin = self.rotary.at(packing.position, mixed.dtype)             # [t, d / 2]
        weight = None
        norms: tuple[Any, Any] = (self.q_layernorm, self.k_layernorm)
        if norms[0] is not None:
            weight = torch.cat([norms[0].weight.expand(r, d), norms[1].weight[None]])
        qk = RotaryNorm.apply(mixed[:, :, :r + 1], weight, cos, sin, self.config.layernorm_epsilon)
        v = mixed[:, :, r + 1].reshape(s * b, g * d)
        scale: float = self.config.softmax_scale or 1 / math.sqrt(d)

        def attend_all(qk: Tensor, v: Tensor) -> Tensor:
            if isinstance(packing, SharedPacking):
                return attend_shared(qk, v.view(-1, g, d), packing, scale)
            gathered = zip(Gather.apply(qk.view(s * b, -1), packing), Gather.apply(v, packing), packing.buckets, strict=True)
            return Ungather.apply(packing, *(attend(qk_part.view(-1, g, r + 1, d), v_part.view(-1, g, d), bucket, scale)
                                             for qk_part, v_part, bucket in gathered))
        if self.checkpoint_core_attention and self.training:
            out = tensor_parallel.checkpoint(attend_all, False, qk, v)
        else:
            out = attend_all(qk, v)
        return self.linear_proj(out.view(s, b, -1))                          # [t, g r d] -> [s, b, g r d]


class GridSelfAttention(SelfAttention):
    """megatron-core's self-attention where positions are on a grid: queries and keys are turned here, since its own rotation
    of packed rows counts from each document's start."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.frequencies: Tensor = config.rotary_frequencies
        self.angles = self.frequencies

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any,             # type: ignore[override]
                packed_seq_params: PackedRow | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[t, 1, h] → [t, 1, h]."""
        assert packed_seq_params is not None
        assert packed_seq_params.grid is not None
        frequencies = self.frequencies.to(hidden_states.device)
        position = packed_seq_params.grid.t()[:, rope.axes(len(frequencies)).to(hidden_states.device)]     # [t, d / 2]
        self.angles = (position * frequencies).repeat(1, 2)[:, None, None]                                 # [t, 1, 1, d]
        return super().forward(hidden_states, attention_mask, *args, packed_seq_params=packed_seq_params, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """[t, 1, heads, d] each, queries and keys turned."""
        tensors: Any = super().get_query_key_value_tensors(*args, **kwargs)
        query, key, *rest = tensors
        return (*(apply_rotary_pos_emb(x, self.angles, self.config) for x in (query, key)), *rest)


class CoreAttention(torch.nn.Module):
    """Fills the place in the layer spec that `PackedSelfAttention` does itself."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
