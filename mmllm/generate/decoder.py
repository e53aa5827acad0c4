"""The decoder of a Hugging Face Llama, Qwen2 or Qwen3 folder, one step at a time, without modules.

Against `transformers` it saves what dominates a small step: module calls, mask building, a head over the whole
vocabulary. Rows of any lengths go on together in a cache (`mmllm.generate.cache`), one token or several at a time.

Letters: b rows, s new tokens, T columns of the cache in use, d hidden, H heads, G key-value groups, r = H / G, k head dim,
v ids, f MLP width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mmllm.generate.attend import FEW, attend
from mmllm.generate.cache import Cache
from mmllm.generate.int8 import Weight, rows, scores, times, to_int8
from mmllm.hf_config import read_model


@dataclass(frozen=True)
class Layer:
    """Weights of one layer, joined where they read the same input. Matrices are stored from inputs to outputs: for the few rows of a
    step that is mostly faster on a CPU than `nn.Linear`'s way."""

    norm: Tensor  # [d]
    qkv: Weight  # [d, (H + 2 G) k]
    qkv_bias: Tensor | None  # [(H + 2 G) k]
    qk_norm: Tensor | None  # [H + G, k]
    out: Weight  # [H k, d]
    mlp_norm: Tensor  # [d]
    gate_up: Weight  # [d, 2 f]
    down: Weight  # [f, d]


class Place(NamedTuple):
    """Of new tokens in a cache."""

    write: Any
    """Index [b, s] of rows and columns they go to."""
    rows: slice
    columns: slice
    """What is looked at."""
    cos: Tensor  # [b or none, s, 1, k]
    sin: Tensor
    mask: Tensor | None  # [b or 1, 1, s, T]


@dataclass(frozen=True)
class Decoder:
    """Weights and the shape that config.json gives them."""

    embedding: Weight  # [v, d]
    layers: tuple[Layer, ...]
    norm: Tensor  # [d]
    head: Weight  # [v, d]
    num_heads: int
    num_groups: int
    head_dim: int
    eps: float
    inverse_frequencies: Tensor  # [k / 2]
    scale: float
    """What products of queries and keys are multiplied by."""

    @property
    def device(self) -> torch.device:
        return self.norm.device

    @property
    def nbytes(self) -> int:
        """Of all weights."""
        every = [self.embedding, self.norm, *(x for layer in self.layers for x in vars(layer).values() if x is not None)]
        return sum(x.nbytes for x in every) + (0 if self.head is self.embedding else self.head.nbytes)

    def room(self, rows: int, columns: int) -> Cache:
        """An empty cache for so many rows of so many tokens."""
        shape = (len(self.layers), 2, rows, self.num_groups, columns, self.head_dim)
        angle = torch.arange(columns, device=self.device)[:, None] * self.inverse_frequencies  # [T, k / 2]
        cos, sin = angle.cos().to(self.norm), angle.sin().to(self.norm)
        return Cache(self.norm.new_zeros(shape), torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)], 1),
                     np.zeros(rows, np.int64))

    def start(self, prompts: Sequence[Sequence[int]], columns: int) -> tuple[Tensor, Cache]:
        """Read prompts. → hidden state of each last token [b, d], and a cache with room for `columns` more."""
        cache = self.room(len(prompts), max(map(len, prompts)) + columns)
        return self.prefill(prompts, cache), cache

    def prefill(self, prompts: Sequence[Sequence[int]], cache: Cache, row: int = 0) -> Tensor:
        """Append a piece each to the rows from `row` on. → hidden state of each last token [b, d]"""
        counts, longest = [len(prompt) for prompt in prompts], max(map(len, prompts))
        ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=self.device)
        before = cache.length[row:row + len(prompts)].copy()
        hidden = self.read(ids, cache, row, None if min(counts) == longest else counts)
        cache.length[row:row + len(prompts)] = before + counts  # what lies behind is padding
        return hidden

    def read(self, ids: Tensor, cache: Cache, row: int = 0, counts: Sequence[int] | None = None, every: bool = False) -> Tensor:
        """Append ids [b, s] to the rows from `row` on. → hidden state of the last token [b, d]; of the last of `counts` [b] tokens if
        given; of `every` one [b, s, d]."""
        b, s = ids.shape
        start = cache.length[row:row + b].copy()
        used = int(start.max()) + s
        if used > cache.columns:
            raise ValueError(f"a row would hold {used:,} tokens, the cache has room for {cache.columns:,}: plan more columns")
        few = not ids.is_cuda and self.norm.dtype == torch.float32 and b * s * used * self.num_heads * self.head_dim <= FEW
        place = None if few else self._place(cache, row, start, b, s)
        cache.length[row:row + b] += s
        x = rows(self.embedding, ids.flatten())  # [b s, d]
        for number, layer in enumerate(self.layers):
            joined = times(self._rms(x, layer.norm), layer.qkv)
            if layer.qkv_bias is not None:
                joined += layer.qkv_bias
            joined = joined.view(b, s, -1, self.head_dim)  # [b, s, H + 2 G, k]
            if place is None:
                seen = attend(joined, layer.qk_norm, cache, number, row, start, self.scale, self.eps)
            else:
                seen = self._attend(joined, layer.qk_norm, cache.store[number], place)
            times(seen, layer.out, x)
            if number == len(self.layers) - 1 and not every and s > 1:  # only the last token is asked: [b, d]
                last = s - 1 if counts is None else torch.tensor(counts, device=x.device) - 1
                x = x.view(b, s, -1)[torch.arange(b, device=x.device), last]
            gate, up = times(self._rms(x, layer.mlp_norm), layer.gate_up).chunk(2, -1)
            times(F.silu(gate).mul_(up), layer.down, x)
        x = self._rms(x, self.norm)
        return x.view(b, s, -1) if every else x

    def logits(self, hidden: Tensor, low: int = 0, high: int | None = None) -> Tensor:
        """Logits [..., high − low] of the ids in that range, from hidden [..., d]."""
        return scores(hidden, self.head, low, high).float()

    def _place(self, cache: Cache, row: int, start: NDArray[np.int64], b: int, s: int) -> Place:
        """Of s new tokens behind the first `start` [b] of the rows from `row` on."""
        first, used, device = int(start[0]), int(start.max()) + s, self.device
        column, mask = torch.arange(used, device=device), None
        if bool((start == first).all()):
            turns, write = cache.turns[first:used], (slice(row, row + b), slice(first, used))  # [s, 2, k]
            if s > 1:
                mask = (column > column[first:, None])[None]
        else:
            position = torch.from_numpy(start[:, None] + np.arange(s)).to(device)  # [b, s]
            turns, write = cache.turns[position], (torch.arange(row, row + b, device=device)[:, None], position)  # [b, s, 2, k]
            mask = column > position[..., None]
        if mask is not None:
            mask = torch.zeros(mask.shape, dtype=self.norm.dtype, device=device).masked_fill_(mask, -torch.inf)[:, None]
        return Place(write, slice(row, row + b), slice(used), turns[..., :1, :], turns[..., 1:, :], mask)

    def _attend(self, joined: Tensor, qk_norm: Tensor | None, room: Tensor, place: Place) -> Tensor:
        """As `attend`, in room [2, R, G, T, k]."""
        heads, groups = self.num_heads, self.num_groups
        qk = joined[:, :, :heads + groups]
        if qk_norm is not None:
            qk = self._rms(qk, qk_norm)
        # rotary positions in halves: low cos − high sin, high cos + low sin
        qk = torch.addcmul(qk * place.cos, qk.roll(self.head_dim // 2, -1), place.sin)
        for part, new in zip(room, (qk[:, :, heads:], joined[:, :, heads + groups:]), strict=True):
            part.transpose(1, 2)[place.write] = new  # [b, s, G, k]
        keys, values = room[:, place.rows, :, place.columns]
        seen = F.scaled_dot_product_attention(qk[:, :, :heads].transpose(1, 2), keys, values, place.mask, scale=self.scale,
                                              enable_gqa=heads != groups)  # [b, H, s, k]
        return seen.transpose(1, 2).flatten(2).flatten(0, 1)

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        """Over the last dimension. On a CPU by the length of x, which is one operation where a mean of squares is several."""
        if x.is_cuda:
            return F.rms_norm(x, x.shape[-1:], None, self.eps) * weight
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return (x * torch.addcmul(self._eps, length, length, value=1 / x.shape[-1]).rsqrt_()).to(x.dtype) * weight

    @cached_property
    def _eps(self) -> Tensor:
        return torch.tensor(self.eps)


def build(config: Mapping[str, object], tensors: Mapping[str, Tensor], device: torch.device | str = "cpu",
          dtype: torch.dtype = torch.float32, int8: bool = False) -> Decoder:
    """From config.json and the tensors of a Llama, Qwen2 or Qwen3 folder; matrices as int8 if asked. Errors: ValueError for what this
    forward lacks."""
    shape = read_model(config)
    if shape.num_experts:
        raise ValueError(f"config.json asks for {shape.num_experts} experts; the decoder here has none: use transformers or vLLM")

    def tensor(name: str) -> Tensor:
        if name not in tensors:
            raise ValueError(f"the weights hold no {name}")
        return tensors[name].to(device, dtype)

    def matrix(*names: str) -> Weight:
        """[i, o], joined by outputs."""
        joined = torch.cat([tensor(name) for name in names]).t().contiguous()
        return to_int8(joined) if int8 else joined

    def table(name: str) -> Weight:
        """[v, d]"""
        return to_int8(tensor(name), 1) if int8 else tensor(name)

    counts = {"q": shape.num_attention_heads, "k": shape.groups}

    def layer(number: int) -> Layer:
        prefix = f"model.layers.{number}."
        return Layer(
            norm=tensor(prefix + "input_layernorm.weight"),
            qkv=matrix(*(f"{prefix}self_attn.{name}_proj.weight" for name in "qkv")),
            qkv_bias=torch.cat([tensor(f"{prefix}self_attn.{name}_proj.bias") for name in "qkv"]) if shape.qkv_bias else None,
            qk_norm=torch.cat([tensor(f"{prefix}self_attn.{name}_norm.weight").expand(count, -1) for name, count in counts.items()])
            if shape.qk_layernorm else None,
            out=matrix(prefix + "self_attn.o_proj.weight"),
            mlp_norm=tensor(prefix + "post_attention_layernorm.weight"),
            gate_up=matrix(*(f"{prefix}mlp.{name}_proj.weight" for name in ("gate", "up"))),
            down=matrix(prefix + "mlp.down_proj.weight"))

    width = shape.head_width
    if shape.rope_scaling != "none":
        from mmllm.megatron import rope  # brings megatron-core along: only where it is needed
        frequencies, scale = rope.frequencies(shape), rope.softmax_scale(shape)
    else:
        frequencies = shape.rotary_base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
        scale = 1 / math.sqrt(width)
    embedding = table("model.embed_tokens.weight")
    return Decoder(
        embedding=embedding, layers=tuple(map(layer, range(shape.num_layers))), norm=tensor("model.norm.weight"),
        head=embedding if shape.tie_embeddings else table("lm_head.weight"),
        num_heads=shape.num_attention_heads, num_groups=shape.groups, head_dim=width, eps=shape.norm_eps,
        inverse_frequencies=frequencies.to(device), scale=scale)
