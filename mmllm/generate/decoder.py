"""The decoder of a Hugging Face Llama or Qwen3 folder, one step at a time, in plain torch.

Against `transformers` it saves what dominates a small step: module calls, mask building, a head over the whole
vocabulary. A cache holds keys and values of all rows; rows are padded on the left, so all rows write the same column.

Letters: b rows, s new tokens, T columns of the cache, d hidden, H heads, G key-value groups, r = H / G, k head dim,
v ids, f MLP width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Cache:
    """Keys and values of every layer, and how many columns hold something."""

    keys: list[Tensor]  # L × [b, G, T, k]
    values: list[Tensor]
    padding: Tensor  # [b] empty columns on the left
    used: int

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on."""
        self.keys = [x[rows] for x in self.keys]
        self.values = [x[rows] for x in self.values]
        self.padding = self.padding[rows]

    def forget(self, rows: Tensor) -> None:
        """What these rows [b, bool] read is dropped but for the first token: it moves to the last column in use.

        Its keys and values depend on nothing before it, so this equals a prompt of that token alone."""
        which = rows.nonzero()[:, 0]
        for x in (*self.keys, *self.values):
            x[which, :, self.used - 1] = x[which, :, self.padding[which]]
        self.padding[which] = self.used - 1

    def room(self, columns: int) -> None:
        """Make space for more columns; half as much again, so that growing costs little."""
        if self.used + columns > self.keys[0].shape[2]:
            more = max(columns, self.keys[0].shape[2] // 2)
            self.keys = [F.pad(x, (0, 0, 0, more)) for x in self.keys]
            self.values = [F.pad(x, (0, 0, 0, more)) for x in self.values]


@dataclass(frozen=True)
class Layer:
    """Weights of one layer, joined where they read the same input."""

    norm: Tensor  # [d]
    qkv: Tensor  # [(H + 2 G) k, d]
    q_norm: Tensor | None  # [k]
    k_norm: Tensor | None
    out: Tensor  # [d, H k]
    mlp_norm: Tensor  # [d]
    gate_up: Tensor  # [2 f, d]
    down: Tensor  # [d, f]


@dataclass(frozen=True)
class Decoder:
    """Weights and the shape that config.json gives them."""

    embedding: Tensor  # [v, d]
    layers: tuple[Layer, ...]
    norm: Tensor  # [d]
    head: Tensor  # [v, d]
    num_heads: int
    num_groups: int
    head_dim: int
    eps: float
    inverse_frequencies: Tensor  # [k / 2]

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def start(self, prompts: list[list[int]], columns: int) -> tuple[Tensor, Cache]:
        """Read the prompts. → hidden state of each last token [b, d], and a cache with space for `columns` more."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts], device=self.device)
        padding = torch.tensor([longest - len(row) for row in prompts], device=self.device)
        shape = (len(prompts), self.num_groups, longest + columns, self.head_dim)
        empty = [[self.embedding.new_zeros(shape) for _ in self.layers] for _ in range(2)]
        cache = Cache(empty[0], empty[1], padding, used=0)
        return self.read(ids, cache), cache

    def read(self, ids: Tensor, cache: Cache) -> Tensor:
        """Append ids [b, s] to the cache. → hidden state of the last one [b, d]."""
        s = ids.shape[1]
        first, cache.used = cache.used, cache.used + s
        column = torch.arange(cache.used, device=ids.device)
        position = (column[first:] - cache.padding[:, None]).clamp(min=0)  # [b, s]
        angle = position[..., None] * self.inverse_frequencies  # [b, s, k / 2]
        cos, sin = angle.cos()[:, :, None].to(self.embedding), angle.sin()[:, :, None].to(self.embedding)
        # a padding token sees itself: a row of −inf alone would be NaN
        hidden_column = (column[None, :] < cache.padding[:, None])[:, None] | (column > column[first:, None])
        hidden_column &= column != column[first:, None]  # [b, s, T]
        mask = None
        if s > 1 or bool((cache.padding > 0).any()):
            mask = torch.zeros_like(hidden_column, dtype=self.embedding.dtype).masked_fill_(hidden_column, -torch.inf)
        x = self.embedding[ids]  # [b, s, d]
        for number, layer in enumerate(self.layers):
            x = x + self._attend(self._rms(x, layer.norm), layer, number, cache, cos, sin, mask)
            if number == len(self.layers) - 1:
                x = x[:, -1]  # only the last token is asked: [b, d]
            gate, up = F.linear(self._rms(x, layer.mlp_norm), layer.gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        return self._rms(x, self.norm)

    def logits(self, hidden: Tensor, low: int = 0, high: int | None = None) -> Tensor:
        """Logits [b, high − low] of the ids in that range, from hidden [b, d]."""
        return F.linear(hidden, self.head[low:high]).float()

    def _attend(self, x: Tensor, layer: Layer, number: int, cache: Cache, cos: Tensor, sin: Tensor,
                mask: Tensor | None) -> Tensor:
        """x [b, s, d], cos and sin [b, s, 1, k / 2], mask [b, s, T] → [b, s, d]. Reads and writes the cache."""
        (b, s, _), k, groups = x.shape, self.head_dim, self.num_groups
        qkv = F.linear(x, layer.qkv).view(b, s, -1, k)
        q, key, value = qkv.split([self.num_heads, groups, groups], dim=2)  # [b, s, H or G, k]
        if layer.q_norm is not None and layer.k_norm is not None:
            q, key = self._rms(q, layer.q_norm), self._rms(key, layer.k_norm)
        keys, values = cache.keys[number], cache.values[number]
        keys[:, :, cache.used - s:cache.used] = _rotate(key, cos, sin).transpose(1, 2)  # [b, s, G, k] -> [b, G, s, k]
        values[:, :, cache.used - s:cache.used] = value.transpose(1, 2)
        keys, values = keys[:, :, :cache.used], values[:, :, :cache.used]  # [b, G, T, k]
        q = _rotate(q, cos, sin).view(b, s, groups, -1, k).permute(0, 2, 3, 1, 4)  # [b, G, r, s, k]
        # plain products: scaled_dot_product_attention is several times slower for short rows on a CPU
        scores = q.reshape(b, groups, -1, k) @ keys.transpose(2, 3) * (1 / math.sqrt(k))  # [b, G, r s, T]
        if mask is not None:
            scores = (scores.view(b, groups, -1, s, cache.used) + mask[:, None, None]).view_as(scores)
        mixed = scores.softmax(-1, dtype=torch.float32).to(x.dtype) @ values  # [b, G, r s, k]
        mixed = mixed.view(b, groups, -1, s, k).permute(0, 3, 1, 2, 4)  # [b, s, G, r, k]
        return F.linear(mixed.reshape(b, s, -1), layer.out)

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in halves: x [b, s, H, k]."""
    low, high = x.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


def build(config: Mapping[str, object], tensors: Mapping[str, Tensor], device: torch.device | str = "cpu",
          dtype: torch.dtype = torch.float32) -> Decoder:
    """From config.json and the tensors of a Llama or Qwen3 folder. Errors: ValueError for what this forward lacks."""
    rope = config.get("rope_parameters") or {}
    assert isinstance(rope, dict)
    if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise ValueError(f"config.json asks for rope scaling ({rope or config['rope_scaling']}); "
                         "only plain rope runs here")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError("config.json asks for biases in attention or MLP; the decoder here has none")

    def tensor(name: str) -> Tensor:
        if name not in tensors:
            raise ValueError(f"the weights hold no {name}")
        return tensors[name].to(device, dtype)

    def layer(number: int) -> Layer:
        prefix = f"model.layers.{number}."
        normed = prefix + "self_attn.q_norm.weight" in tensors
        return Layer(
            norm=tensor(prefix + "input_layernorm.weight"),
            qkv=torch.cat([tensor(f"{prefix}self_attn.{name}_proj.weight") for name in "qkv"]),
            q_norm=tensor(prefix + "self_attn.q_norm.weight") if normed else None,
            k_norm=tensor(prefix + "self_attn.k_norm.weight") if normed else None,
            out=tensor(prefix + "self_attn.o_proj.weight"),
            mlp_norm=tensor(prefix + "post_attention_layernorm.weight"),
            gate_up=torch.cat([tensor(f"{prefix}mlp.{name}_proj.weight") for name in ("gate", "up")]),
            down=tensor(prefix + "mlp.down_proj.weight"))

    def number(name: str) -> int:
        value = config[name]
        assert isinstance(value, int), f"config.json: {name} is {value!r}, not a whole number"
        return value

    head_dim = number("head_dim") if config.get("head_dim") else number("hidden_size") // number("num_attention_heads")
    base = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
    eps = config["rms_norm_eps"]
    assert isinstance(base, int | float) and isinstance(eps, int | float)
    embedding = tensor("model.embed_tokens.weight")
    return Decoder(
        embedding=embedding, layers=tuple(map(layer, range(number("num_hidden_layers")))),
        norm=tensor("model.norm.weight"),
        head=embedding if config.get("tie_word_embeddings") else tensor("lm_head.weight"),
        num_heads=number("num_attention_heads"), num_groups=number("num_key_value_heads"), head_dim=head_dim,
        eps=float(eps),
        inverse_frequencies=(base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)).to(device))
