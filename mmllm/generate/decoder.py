"""The decoder of a Hugging Face Llama, Qwen2 or Qwen3 folder, one step at a time, in plain torch.

Against `transformers` it saves what dominates a small step: module calls, mask building, a head over the whole
vocabulary. Rows of any lengths go on together in a cache (`mmllm.generate.cache`), one token or several at a time.

Letters: b rows, s new tokens, T columns of the cache in use, d hidden, H heads, G key-value groups, r = H / G, k head dim,
v ids, f MLP width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.generate.cache import Cache
from mmllm.generate.int8 import Weight, linear, rows, to_int8
from mmllm.hf_config import read_model

LONG = 64
"""New tokens beyond which scores are not laid out in memory."""


@dataclass(frozen=True)
class Layer:
    """Weights of one layer, joined where they read the same input."""

    norm: Tensor  # [d]
    qkv: Weight  # [(H + 2 G) k, d]
    qkv_bias: Tensor | None  # [(H + 2 G) k]
    qk_norm: Tensor | None  # [H + G, k]
    out: Weight  # [d, H k]
    mlp_norm: Tensor  # [d]
    gate_up: Weight  # [2 f, d]
    down: Weight  # [d, f]


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
        shape = (rows, self.num_groups, columns, self.head_dim)
        angle = torch.arange(columns, device=self.device)[:, None] * self.inverse_frequencies  # [T, k / 2]
        empty = [[self.norm.new_zeros(shape) for _ in self.layers] for _ in range(2)]
        cos, sin = angle.cos().to(self.norm), angle.sin().to(self.norm)
        return Cache(empty[0], empty[1], torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1), np.zeros(rows, np.int64))

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
        start = cache.length[row:row + b]
        used, first = int(start.max()) + s, int(start[0])
        if used > cache.columns:
            raise ValueError(f"a row would hold {used:,} tokens, the cache has room for {cache.columns:,}: plan more columns")
        place, mask = slice(first, used), None
        if even := bool((start == first).all()):
            cos, sin = cache.cos[None, place, None], cache.sin[None, place, None]  # [1, s, 1, k]
            if s > 1:
                column = torch.arange(used, device=ids.device)
                mask = (column > column[first:, None])[None]  # [1, s, T]
        else:
            position = torch.from_numpy(start[:, None] + np.arange(s)).to(ids.device)  # [b, s]
            cos, sin = cache.cos[position][:, :, None], cache.sin[position][:, :, None]  # [b, s, 1, k]
            mask = torch.arange(used, device=ids.device) > position[..., None]  # [b, s, T]
            place = (torch.arange(row, row + b, device=ids.device)[:, None], position)
        if mask is not None:
            mask = torch.zeros(mask.shape, dtype=self.norm.dtype, device=ids.device).masked_fill_(mask, -torch.inf)
        cache.length[row:row + b] += s
        x = rows(self.embedding, ids)  # [b, s, d]
        for number, layer in enumerate(self.layers):
            keys, values = cache.keys[number], cache.values[number]
            if even:
                views = keys[row:row + b].transpose(1, 2), values[row:row + b].transpose(1, 2)  # [b, T, G, k]
                write = (slice(None), place)
            else:
                views, write = (keys.transpose(1, 2), values.transpose(1, 2)), place
            x = x + self._attend(self._rms(x, layer.norm), layer, views, write,
                                 (keys[row:row + b, :, :used], values[row:row + b, :, :used]), cos, sin, mask)
            if number == len(self.layers) - 1 and not every:  # only the last token is asked: [b, d]
                x = x[:, -1] if counts is None else x[torch.arange(b, device=x.device), torch.tensor(counts, device=x.device) - 1]
            gate, up = linear(self._rms(x, layer.mlp_norm), layer.gate_up).chunk(2, -1)
            x = x + linear(F.silu(gate) * up, layer.down)
        return self._rms(x, self.norm)

    def logits(self, hidden: Tensor, low: int = 0, high: int | None = None) -> Tensor:
        """Logits [..., high − low] of the ids in that range, from hidden [..., d]."""
        return linear(hidden, self.head, low, high).float()

    def _attend(self, x: Tensor, layer: Layer, views: tuple[Tensor, Tensor], write: Any, seen: tuple[Tensor, Tensor], cos: Tensor,
                sin: Tensor, mask: Tensor | None) -> Tensor:
        """x [b, s, d] → [b, s, d]. Writes new keys and values at `write` of views [rows, columns, G, k], then looks at `seen`
        [b, G, T, k]. cos and sin [b or 1, s, 1, k], mask [b or 1, s, T]."""
        b, s, k, groups = x.shape[0], x.shape[1], self.head_dim, self.num_groups
        joined = linear(x, layer.qkv)
        qkv = (joined if layer.qkv_bias is None else joined + layer.qkv_bias).view(b, s, -1, k)
        qk, value = qkv.split([self.num_heads + groups, groups], dim=2)  # [b, s, H + G or G, k]
        if layer.qk_norm is not None:
            qk = F.rms_norm(qk, (k,), None, self.eps) * layer.qk_norm
        # rotary positions in halves: low cos − high sin, high cos + low sin
        q, key = torch.addcmul(qk * cos, qk.roll(k // 2, -1), sin).split([self.num_heads, groups], dim=2)
        views[0][write], views[1][write], (keys, values) = key, value, seen
        if x.is_cuda or s > LONG:
            mixed = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, None if mask is None else mask[:, None],
                                                   scale=self.scale, enable_gqa=self.num_heads != groups).transpose(1, 2)  # [b, s, H, k]
            return linear(mixed.reshape(b, s, -1), layer.out)
        q = q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)  # [b, G, r, s, k]
        # plain products: scaled_dot_product_attention is several times slower for short rows on a CPU
        q = q.reshape(b * groups, -1, k)
        over = q.new_zeros(1, 1, 1) if mask is None else mask[:, None, None].expand(b, groups, q.shape[1] // s, s, -1).reshape(
            b * groups, -1, mask.shape[-1])
        scores = torch.baddbmm(over, q, keys.flatten(0, 1).transpose(1, 2), alpha=self.scale)  # [b G, r s, T]
        mixed = torch.bmm(scores.softmax(-1, dtype=torch.float32).to(x.dtype), values.flatten(0, 1))
        mixed = mixed.view(b, groups, -1, s, k).permute(0, 3, 1, 2, 4)  # [b, s, G, r, k]
        return linear(mixed.reshape(b, s, -1), layer.out)

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)


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
        """Joined by outputs."""
        joined = torch.cat([tensor(name) for name in names])
        return to_int8(joined) if int8 else joined

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
    embedding = matrix("model.embed_tokens.weight")
    return Decoder(
        embedding=embedding, layers=tuple(map(layer, range(shape.num_layers))), norm=tensor("model.norm.weight"),
        head=embedding if shape.tie_embeddings else matrix("lm_head.weight"),
        num_heads=shape.num_attention_heads, num_groups=shape.groups, head_dim=width, eps=shape.norm_eps,
        inverse_frequencies=frequencies.to(device), scale=scale)
