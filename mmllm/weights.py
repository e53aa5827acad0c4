"""Names and layouts: the tensors of a pretraining checkpoint as Hugging Face's Llama and Qwen3 call and arrange them.

Three things differ. megatron-core stacks all layers of a weight on dimension 0. Queries, keys and values are one
matrix, group by group: the r queries of a group, its key, its value. The gate and the up projection are one matrix,
gate first. Besides, the model's vocabulary is padded, and Hugging Face's is not.

Read with plain `torch.distributed.checkpoint`, so no megatron-core and no process group is needed. Letters: L layers, g
key heads, r query heads for each, d width of a head, h hidden size, f width of the MLP.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm.config import Model
from mmllm.manifest import verify

LAYERS = "decoder.layers."


def read_model(checkpoint: Path) -> tuple[Model, int]:
    """The decoder's shape and its real vocabulary size, from a checkpoint folder."""
    path = checkpoint / "state.json"
    if not path.is_file():
        raise FileNotFoundError(f"{checkpoint} is no pretraining checkpoint: it has no state.json. "
                                "Give a folder like runs/NAME/checkpoints/step_0001000")
    state = json.loads(path.read_text())
    known = {field.name for field in fields(Model)}
    shape = {name: value for name, value in state["recipe"]["model"].items() if name in known}
    return Model(**shape), int(state["vocab_size"])


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every weight of the model, whole, under megatron-core's names; the optimizer's state is left where it is."""
    verify(checkpoint)
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    reader = FileSystemReader(str(checkpoint))
    entries = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")}
    with warnings.catch_warnings():
        # it remarks that this is one process: it is meant to be
        warnings.simplefilter("ignore")
        load(state, storage_reader=reader, no_dist=True)
    return state


def split_qkv(weight: Tensor, groups: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """[g (r + 2) d, h] → queries [g r d, h], keys [g d, h], values [g d, h]."""
    parts = weight.view(groups, -1, width, *weight.shape[1:])                  # [g, r + 2, d, h]
    query, key, value = parts[:, :-2], parts[:, -2], parts[:, -1]
    return query.flatten(0, 2), key.flatten(0, 1), value.flatten(0, 1)


def join_qkv(query: Tensor, key: Tensor, value: Tensor, groups: int, width: int) -> Tensor:
    """The inverse of `split_qkv`."""
    parts = [part.view(groups, -1, width, *part.shape[1:]) for part in (query, key, value)]
    return torch.cat(parts, 1).flatten(0, 2)


def to_hugging_face(weights: dict[str, Tensor], model: Model, vocab_size: int) -> dict[str, Tensor]:
    """megatron-core's tensors → Hugging Face's."""
    out = {"model.embed_tokens.weight": weights["embedding.word_embeddings.weight"][:vocab_size],
           "model.norm.weight": weights["decoder.final_layernorm.weight"]}
    if not model.tie_embeddings:
        out["lm_head.weight"] = weights["output_layer.weight"][:vocab_size]
    for i in range(model.num_layers):
        def at(name: str, layer: int = i) -> Tensor:
            return weights[LAYERS + name][layer]
        name = f"model.layers.{i}."
        out[name + "input_layernorm.weight"] = at("self_attention.linear_qkv.layer_norm_weight")
        out[name + "post_attention_layernorm.weight"] = at("mlp.linear_fc1.layer_norm_weight")
        parts = split_qkv(at("self_attention.linear_qkv.weight"), model.groups, model.head_width)
        for letter, part in zip("qkv", parts, strict=True):
            out[f"{name}self_attn.{letter}_proj.weight"] = part
        out[name + "self_attn.o_proj.weight"] = at("self_attention.linear_proj.weight")
        out[name + "mlp.gate_proj.weight"], out[name + "mlp.up_proj.weight"] = at("mlp.linear_fc1.weight").chunk(2)
        out[name + "mlp.down_proj.weight"] = at("mlp.linear_fc2.weight")
        if model.qk_layernorm:
            for letter in "qk":
                out[f"{name}self_attn.{letter}_norm.weight"] = at(f"self_attention.{letter}_layernorm.weight")
    return {name: tensor.contiguous() for name, tensor in out.items()}


def export_weights(checkpoint: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A checkpoint folder → the tensors of `model.safetensors`, in the checkpoint's precision or the one given."""
    model, vocab_size = read_model(checkpoint)
    tensors = to_hugging_face(read_tensors(checkpoint), model, vocab_size)
    return tensors if dtype is None else {name: tensor.to(dtype) for name, tensor in tensors.items()}
