"""Causal self-attention over packed documents on a CPU, and the norm and gate around it: what stands in for Transformer
Engine's.

The one distinction: a *token* stands where it is in the row; a *slot* is a place in a bucket of documents of like
length, `[documents, length]`. A row of some thousand tokens holds dozens of short documents, so a call a document costs
more than its arithmetic, and one masked call a row does thirty times the arithmetic. Instead the tokens are gathered
into a few buckets, attended to there, and gathered back; the index maps are made once a micro-batch (`pack`) and used
by every layer. Padding sits at the end of each document, so the causal mask hides it. Every token has one slot, so both
directions of the gather, and both of their gradients, are gathers.

Letters: t tokens of a micro-batch, n documents of a bucket, l its length, g key heads of this rank, r query heads for
each, d width of a head.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from numpy.typing import NDArray
from torch import Tensor

SHORT = 160
"""Documents up to this length attend by matrix product and softmax, longer ones by the fused kernel: in fp32 forward
and backward of 2,048 tokens take 7.6 against 9.9 ms at 64 tokens, 13.5 against 15.1 at 128, 31 against 23 at 256."""
STEP = 16
"""Lengths of buckets are multiples of this."""
BUCKETS = 4
"""At most this many buckets of short documents: each costs some forty calls a layer."""


@dataclass(frozen=True)
class Bucket:
    """Documents padded to one length."""

    documents: int
    length: int
    token: Tensor
    """[n * l] the token in each slot; 0 in padding."""
    padding: Tensor
    """Slots that hold no token."""


@dataclass(frozen=True)
class Packing:
    """The index maps of one micro-batch."""

    buckets: tuple[Bucket, ...]
    slot: Tensor
    """[t] each token's slot, counted through all buckets."""
    position: Tensor
    """[t] each token's place in its document."""


@dataclass
class PackedRow(PackedSeqParams):
    """megatron-core's description of packed documents, with the index maps for the CPU."""

    packing: Packing | None = None


def pack(cu_seqlens: NDArray[np.int32]) -> Packing:
    """Documents [d + 1] → buckets of documents of like length."""
    starts, lengths = cu_seqlens[:-1].astype(np.int64), np.diff(cu_seqlens).astype(np.int64)
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    rounded = -(-lengths // STEP) * STEP
    sizes = bucket_lengths(rounded)
    which = np.searchsorted(sizes, rounded)
    total = int(lengths.sum())
    slot, position = np.empty(total, np.int64), np.empty(total, np.int64)
    buckets: list[Bucket] = []
    first_slot = 0
    for index, size in enumerate(sizes):
        members = np.flatnonzero(which == index)
        place = np.arange(size)
        held = place < lengths[members, None]                                    # [n, l]
        token = np.where(held, starts[members, None] + place, 0)
        slots = first_slot + np.arange(token.size).reshape(token.shape)
        slot[token[held]] = slots[held]
        position[token[held]] = np.broadcast_to(place, token.shape)[held]
        buckets.append(Bucket(len(members), int(size), torch.from_numpy(token.reshape(-1)),
                              torch.from_numpy(np.flatnonzero(~held.reshape(-1)))))
        first_slot += token.size
    return Packing(tuple(buckets), torch.from_numpy(slot), torch.from_numpy(position))


def bucket_lengths(rounded: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ascending lengths of the buckets: short ones merged upward while that pads least, until few enough are left."""
    sizes, counts = np.unique(rounded, return_counts=True)
    sizes, counts = sizes.tolist(), counts.tolist()
    while sum(size <= SHORT for size in sizes) > BUCKETS:
        # what a token of padding costs is linear in all but the scores, so padded slots are the measure
        costs = [counts[i] * (sizes[i + 1] - sizes[i]) for i in range(len(sizes) - 1) if sizes[i + 1] <= SHORT]
        i = int(np.argmin(costs))
        counts[i + 1] += counts[i]
        del sizes[i], counts[i]
    return np.array(sizes, np.int64)


def unpacked(tokens: int, documents: int) -> Packing:
    """The maps of [s, b, …], flattened to [s * b, …]: b documents of s tokens, interleaved."""
    packing = pack(np.arange(documents + 1, dtype=np.int32) * tokens)
    order = torch.arange(tokens * documents).view(documents, tokens).t().reshape(-1)     # [b, s] -> [s, b]
    place = torch.arange(tokens * documents).view(tokens, documents).t().reshape(-1)
    buckets = tuple(Bucket(b.documents, b.length, place[b.token], b.padding) for b in packing.buckets)
    return Packing(buckets, packing.slot[order], packing.position[order])


class RotaryTable:
    """cos and sin of every position up to the longest seen; halves rotated as in Llama: (x1, x2) → (x1 c − x2 s, x2 c +
    x1 s)."""

    def __init__(self, width: int, base: float) -> None:
        self.frequencies = base ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)     # [d / 2]
        self.cos, self.sin = self.frequencies.new_empty(0, width // 2), self.frequencies.new_empty(0, width // 2)

    def at(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[t] → cos and sin, each [t, d / 2]."""
        longest = int(position.max()) + 1
        if longest > len(self.cos):
            angle = torch.outer(torch.arange(longest, dtype=torch.float32), self.frequencies)
            self.cos, self.sin = angle.cos(), angle.sin()
        return self.cos[position].to(dtype), self.sin[position].to(dtype)


@functools.cache
def causal_mask(length: int, dtype: torch.dtype) -> Tensor:
    """[l, l] of 0 and −inf."""
    return torch.full((length, length), -math.inf, dtype=dtype).triu(1)


class RotaryNorm(torch.autograd.Function):
    """RMSNorm of each head, its weight, then rotation, in one pass over queries and keys together; backward by hand.

    x [t, g, r + 1, d], the r queries and the key of each group; weight [r + 1, d]; cos, sin [t, d / 2]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        half = x.size(-1) // 2
        if weight is None:
            inverse, normed, scaled = None, None, x
        else:
            inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
            inverse = inverse.square_().div_(x.size(-1)).add_(eps).rsqrt_().to(x.dtype)          # [t, g, r + 1, 1]
            normed = x * inverse
            scaled = normed * weight
        out = torch.empty(x.shape, dtype=x.dtype)
        rotate(scaled, cos, sin, half, out)
        ctx.save_for_backward(normed, inverse, weight, cos, sin)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:       # type: ignore[override]
        normed, inverse, weight, cos, sin = ctx.saved_tensors
        width = grad.size(-1)
        back = torch.empty_like(grad)
        rotate(grad, cos, -sin, width // 2, back)                            # the inverse rotation
        if weight is None:
            return back, None, None, None, None
        grad_weight = (back * normed).sum((0, 1), dtype=torch.float32).to(weight.dtype)
        back *= weight
        dot = torch.linalg.vecdot(back, normed).unsqueeze_(-1).div_(-width)
        back.addcmul_(normed, dot).mul_(inverse)
        return back, grad_weight, None, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, half: int, out: Tensor) -> None:
    """Rotate the halves of x [t, g, r + 1, d] into out."""
    cos, sin = cos[:, None, None, :], sin[:, None, None, :]
    torch.mul(x[..., :half], cos, out=out[..., :half])
    out[..., :half].addcmul_(x[..., half:], sin, value=-1)
    torch.mul(x[..., half:], cos, out=out[..., half:])
    out[..., half:].addcmul_(x[..., :half], sin)


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
        self.rotary = RotaryTable(config.kv_channels, config.rotary_base)

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
        parts = [attend(qk_part.view(-1, g, r + 1, d), v_part.view(-1, g, d), bucket, 1 / math.sqrt(d))
                 for qk_part, v_part, bucket in zip(Gather.apply(qk.view(s * b, -1), packing), Gather.apply(v, packing),
                                                    packing.buckets, strict=True)]
        out = Ungather.apply(packing, *parts).view(s, b, -1)                 # [t, g r d] -> [s, b, g r d]
        return self.linear_proj(out)


class CoreAttention(torch.nn.Module):
    """Fills the place in the layer spec that `PackedSelfAttention` does itself."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
