"""Names and layouts: the tensors of a pretraining checkpoint as Hugging Face's Llama, Qwen2, Qwen3 and Qwen3-MoE call and arrange them.

Three things differ. megatron-core stacks all layers of a weight on dimension 0, and all experts on the next. Queries, keys and values are
one matrix, group by group: the r queries of a group, its key, its value. The gate and the up projection are one matrix, gate first.
Besides, the model's vocabulary is padded, and Hugging Face's is not.

Both directions are mappings of `Lazy` tensors: nothing is read before it is written, and no process group or megatron-core is needed.
Letters: L layers, E experts, g key heads, r query heads for each, d width of a head, h hidden size, f width of the MLP or of one expert.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mmllm.config import Model
from mmllm.manifest import STATE, verify
from mmllm.streams import Checkpoint, Chunk, Chunked, Lazy

LAYERS = "decoder.layers."
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
TABLES = {EMBEDDING: "embedding.word_embeddings.weight", HEAD: "output_layer.weight"}
"""A row a token: the vocabulary's tables, which are padded."""
QKV = "self_attention.linear_qkv."
JOINED = {"weight": [f"self_attn.{letter}_proj.weight" for letter in "qkv"], "bias": [f"self_attn.{letter}_proj.bias" for letter in "qkv"]}


def same(model: Model) -> dict[str, str]:
    """Weights of a layer that are one tensor on both sides: Hugging Face's name → megatron-core's. Those of the MLP are not among them."""
    norm = "pre_mlp_layernorm.weight" if model.num_experts else "mlp.linear_fc1.layer_norm_weight"
    names = {"input_layernorm.weight": QKV + "layer_norm_weight", "post_attention_layernorm.weight": norm,
             "self_attn.o_proj.weight": "self_attention.linear_proj.weight"}
    if model.num_experts:
        names["mlp.gate.weight"] = "mlp.router.weight"
    if model.qk_layernorm:
        names |= {f"self_attn.{letter}_norm.weight": f"self_attention.{letter}_layernorm.weight" for letter in "qk"}
    return names


def mlps(model: Model) -> tuple[list[str], str, int]:
    """(Hugging Face's prefixes of a layer's MLP, or of each of its experts; megatron-core's; f)"""
    if model.num_experts:
        return [f"mlp.experts.{j}." for j in range(model.num_experts)], "mlp.experts.experts.", model.expert_width
    return ["mlp."], "mlp.", model.ffn_hidden_size


def layer_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Every tensor of a layer by its Hugging Face name, and its shape."""
    hidden, d = model.hidden_size, model.head_width
    q, kv = model.num_attention_heads * d, model.groups * d
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,), "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden), "self_attn.v_proj.weight": (kv, hidden), "self_attn.o_proj.weight": (hidden, q)}
    prefixes, _, f = mlps(model)
    for prefix in prefixes:
        shapes |= {f"{prefix}gate_proj.weight": (f, hidden), f"{prefix}up_proj.weight": (f, hidden),
                   f"{prefix}down_proj.weight": (hidden, f)}
    if model.num_experts:
        shapes["mlp.gate.weight"] = (model.num_experts, hidden)
    if model.qkv_bias:
        shapes |= {name: (q if name.startswith("self_attn.q") else kv,) for name in JOINED["bias"]}
    if model.qk_layernorm:
        shapes |= {f"self_attn.{letter}_norm.weight": (d,) for letter in "qk"}
    return shapes


def shapes(model: Model, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Hugging Face model of this shape."""
    out = {EMBEDDING: (vocab_size, model.hidden_size), NORM: (model.hidden_size,)}
    if not model.tie_embeddings:
        out[HEAD] = (vocab_size, model.hidden_size)
    layer = layer_shapes(model)
    return out | {f"model.layers.{i}.{name}": shape for i in range(model.num_layers) for name, shape in layer.items()}


def split_qkv(weight: Tensor, groups: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """[g (r + 2) d, h] → queries [g r d, h], keys [g d, h], values [g d, h]. A bias has no h."""
    parts = weight.view(groups, -1, width, *weight.shape[1:])                  # [g, r + 2, d, h]
    query, key, value = parts[:, :-2], parts[:, -2], parts[:, -1]
    return query.flatten(0, 2), key.flatten(0, 1), value.flatten(0, 1)


def join_qkv(query: Tensor, key: Tensor, value: Tensor, groups: int, width: int) -> Tensor:
    """The inverse of `split_qkv`."""
    parts = [part.view(groups, -1, width, *part.shape[1:]) for part in (query, key, value)]
    return torch.cat(parts, 1).flatten(0, 2)


# Out ------------------------------------------------------------------------------------------------------------------


def read_model(checkpoint: Path) -> tuple[Model, int]:
    """The decoder's shape and its real vocabulary size, from a checkpoint folder."""
    path = checkpoint / STATE
    if not path.is_file():
        raise FileNotFoundError(f"{checkpoint} is no pretraining checkpoint: it has no {STATE}. "
                                "Give a folder like runs/NAME/checkpoints/step_0001000, or what `mmllm import` wrote")
    state = json.loads(path.read_text())
    known = {field.name for field in fields(Model)}
    shape = {name: value for name, value in state["recipe"]["model"].items() if name in known}
    return Model(**shape), int(state["vocab_size"])


def export_weights(checkpoint: Path, dtype: torch.dtype | None = None) -> dict[str, Lazy]:
    """A checkpoint folder → the tensors of `model.safetensors`, in the checkpoint's precision or the one given."""
    model, vocab_size = read_model(checkpoint)
    wanted = shapes(model, vocab_size)
    verify(checkpoint)
    stored = Checkpoint(checkpoint)

    def lazy(name: str, shape: tuple[int, ...]) -> Lazy:
        def make() -> Tensor:
            tensor = _read(stored, name, model, shape)
            return tensor if dtype is None else tensor.to(dtype)
        return Lazy(shape, dtype or stored.entries[_source(name, model)[0]].properties.dtype, make)
    return {name: lazy(name, shape) for name, shape in wanted.items()}


def _source(name: str, model: Model) -> tuple[str, list[int]]:
    """Where a Hugging Face tensor comes from: megatron-core's name, and which of its layers, or layers and experts."""
    if not name.startswith("model.layers."):
        return (TABLES | {NORM: "decoder.final_layernorm.weight"})[name], []
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    kind = rest.rpartition(".")[2]
    if rest in JOINED.get(kind, ()):
        return LAYERS + QKV + kind, [int(layer)]
    if rest in (known := same(model)):
        return LAYERS + known[rest], [int(layer)]
    expert = [int(rest.split(".")[2])] if model.num_experts else []
    return f"{LAYERS}{mlps(model)[1]}linear_fc{2 if rest.endswith('down_proj.weight') else 1}.weight", [int(layer), *expert]


def _read(stored: Checkpoint, name: str, model: Model, shape: tuple[int, ...]) -> Tensor:
    """One tensor out of a checkpoint, under its Hugging Face name."""
    source, index = _source(name, model)
    if source.startswith((LAYERS + QKV + "weight", LAYERS + QKV + "bias")):
        whole = stored.entries[source].size[1:]                                 # [g (r + 2) d, h]
        joined = stored.part(source, [*index] + [0] * len(whole), [1, *whole])[0]
        return split_qkv(joined, model.groups, model.head_width)["qkv".index(name.rpartition("_proj")[0][-1])].contiguous()
    first = mlps(model)[2] if name.endswith("up_proj.weight") else 0
    # of a vocabulary's table the first rows: the rest is padding
    return stored.part(source, [*index, first] + [0] * (len(shape) - 1), [*([1] * len(index)), *shape]).view(shape)


# In -------------------------------------------------------------------------------------------------------------------


def import_weights(tensors: Mapping[str, Lazy], model: Model) -> dict[str, Chunked]:
    """Hugging Face's tensors but for the vocabulary's tables → megatron-core's, a chunk a layer.

    Errors: ValueError where one is missing, has another shape, or is none of this model."""
    wanted = {name: shape for name, shape in shapes(model, 0).items() if name not in TABLES}
    for name, shape in wanted.items():
        if name not in tensors:
            raise ValueError(f"the weights hold no {name}, which config.json asks for")
        if tensors[name].shape != shape:
            raise ValueError(f"{name} is {list(tensors[name].shape)}, config.json asks for {list(shape)}")
    known = {*wanted, *TABLES}
    if unknown := sorted(name for name in tensors if name not in known and not name.endswith("rotary_emb.inv_freq")):
        raise ValueError(f"the weights hold {', '.join(unknown[:4])}{' and others' if len(unknown) > 4 else ''}, which no decoder here has")
    def of(name: str) -> list[Lazy]:
        return [tensors[f"model.layers.{i}.{name}"] for i in range(model.num_layers)]

    out = {"decoder.final_layernorm.weight": _stacked([], {(0,): tensors[NORM]}, tensors[NORM].shape)}
    for name, ours in same(model).items():
        out[LAYERS + ours] = _layers(of(name))
    for kind in ("weight", "bias") if model.qkv_bias else ("weight",):
        query, key, value = map(of, JOINED[kind])
        out[LAYERS + QKV + kind] = _layers([_joined(q, k, v, model) for q, k, v in zip(query, key, value, strict=True)])
    prefixes, ours, f = mlps(model)
    lead = [model.num_layers, *([model.num_experts] if model.num_experts else [])]
    gated, down = dict[tuple[int, ...], Lazy](), dict[tuple[int, ...], Lazy]()
    for j, prefix in enumerate(prefixes):
        for i, (gate, up, back) in enumerate(zip(*(of(f"{prefix}{each}_proj.weight") for each in ("gate", "up", "down")), strict=True)):
            index = (i, j)[:len(lead)]
            gated |= {(*index, 0, 0): gate, (*index, f, 0): up}
            down[*index, 0, 0] = back
    out[f"{LAYERS}{ours}linear_fc1.weight"] = _stacked(lead, gated, (2 * f, model.hidden_size))
    out[f"{LAYERS}{ours}linear_fc2.weight"] = _stacked(lead, down, (model.hidden_size, f))
    return out


def _joined(query: Lazy, key: Lazy, value: Lazy, model: Model) -> Lazy:
    """[g r d, h], [g d, h], [g d, h] → [g (r + 2) d, h]"""
    rows = query.shape[0] + key.shape[0] + value.shape[0]
    return Lazy((rows, *query.shape[1:]), query.dtype,
                lambda: join_qkv(query.make(), key.make(), value.make(), model.groups, model.head_width))


def _layers(tensors: list[Lazy]) -> Chunked:
    """L of […] → [L, …]"""
    shape = tensors[0].shape
    return _stacked([len(tensors)], {(i, *([0] * len(shape))): tensor for i, tensor in enumerate(tensors)}, shape)


def _stacked(lead: list[int], parts: Mapping[tuple[int, ...], Lazy], shape: tuple[int, ...]) -> Chunked:
    """Offsets → parts of a tensor [*lead, *shape]; parts lack the leading dimensions."""
    first = next(iter(parts.values()))
    ones = (1,) * len(lead)
    return Chunked((*lead, *shape), first.dtype, [
        Chunk(offsets, Lazy((*ones, *part.shape), part.dtype, partial(_view, part, ones))) for offsets, part in parts.items()])


def _view(part: Lazy, ones: tuple[int, ...]) -> Tensor:
    return part.make().view(*ones, *part.shape)
