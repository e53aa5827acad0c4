"""The decoder: which modules make a layer, the chunks of layers that a rank has, and new weights.

On CUDA the layers are Transformer Engine's, on a CPU those of `attention` and `layers`; parameters, checkpoints and
numbers are the same. A new weight is a function of the seed and its own name, not of the rank that makes it or the
order in which it is made, so every layout of ranks starts from the same model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor

from mmllm.config import Model, Pretrain
from mmllm.megatron import rope
from mmllm.megatron.attention import CoreAttention, GridSelfAttention, PackedSelfAttention
from mmllm.megatron.layers import RmsNorm, SwiGlu
from mmllm.megatron.loss import HeadLoss, Targets, statistics
from mmllm.megatron.moe import Router
from mmllm.megatron.parallel import Layout
from mmllm.megatron.translation import transformer_config


def layer_spec(model: Model, config: Any, virtual_stage: int | None) -> Any:
    """Which modules make a layer."""
    experts = model.num_experts or None
    if torch.cuda.is_available():
        spec: Any = get_gpt_layer_with_transformer_engine_spec(num_experts=experts, moe_grouped_gemm=True, qk_layernorm=model.qk_layernorm)
        if model.image_positions == "grid":
            spec.submodules.self_attention.module = GridSelfAttention
    else:
        spec = get_gpt_layer_local_spec(num_experts=experts, qk_layernorm=model.qk_layernorm, normalization="RMSNorm")
        layer, attention = spec.submodules, spec.submodules.self_attention.submodules
        layer.input_layernorm = layer.pre_mlp_layernorm = RmsNorm
        layer.self_attention.module = PackedSelfAttention
        attention.core_attention = CoreAttention
        attention.q_layernorm = attention.k_layernorm = RmsNorm if model.qk_layernorm else None
    mlp = spec.submodules.mlp.submodules
    if experts:
        mlp.router = Router
    if torch.cuda.is_available():
        return spec
    if experts:
        mlp.experts.submodules.activation_func = SwiGlu
        # before experts the norm has a name of its own, as in Transformer Engine's spec
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    else:
        mlp.activation_func = SwiGlu
    norm: Any = RmsNorm
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config, virtual_stage), layer_norm=norm)


class Decoder(GPTModel):
    """GPTModel whose last stage, given targets, goes from hidden states to the loss without holding the logits."""

    vocab_size_real: int

    def forward(self, input_ids: Tensor, position_ids: Any, attention_mask: Any, *args: Any, labels: Any = None,   # type: ignore[override]
                **kwargs: Any) -> Any:
        """[1, t] ids → logits [1, t, v / tp]; with Targets, on the last stage, (loss, statistics)."""
        config: Any = self.config
        config.balance_tokens = math.inf                                       # experts are balanced in training alone
        if isinstance(labels, Targets) and labels.padding is not None:
            config.balance_tokens = labels.balance_tokens
            padding = labels.padding
            if config.sequence_parallel and not self.pre_process:
                # 0.16.1 splits it only on the stage that has the embedding
                padding = padding.chunk(config.tensor_model_parallel_size, 1)[self.pg_collection.tp.rank()]
            kwargs["padding_mask"] = padding
        targets: Any = labels
        return super().forward(input_ids, position_ids, attention_mask, *args, labels=targets, **kwargs)

    def _postprocess(self, hidden_states: Tensor, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        if not self.post_process or not isinstance(labels, Targets):
            return super()._postprocess(hidden_states, *args, labels=labels, **kwargs)
        tp: dist.ProcessGroup = self.pg_collection.tp
        shared: Any = self.shared_embedding_or_output_weight
        # [s / tp, b, h] -> [s, b, h]; backward reduces and scatters
        if self.config.sequence_parallel:
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=tp)
        elif tp.size() > 1:
            hidden_states = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states, group=tp)
        weight: Any = shared() if self.share_embeddings_and_output_weights else self.output_layer.weight
        chosen = hidden_states.flatten(0, 1).index_select(0, labels.where)     # [m, h]
        first = tp.rank() * weight.size(0)
        columns = min(weight.size(0), max(0, self.vocab_size_real - first))
        loss, nll, log_z = HeadLoss.apply(chosen, weight, labels.labels, labels.weight, labels.z_loss, first, columns,
                                          tp if tp.size() > 1 else None)
        return loss, statistics(loss, nll, log_z, labels)


def build(recipe: Pretrain, layout: Layout, vocab_size: int) -> list[Decoder]:
    """This rank's part of a new decoder: a chunk of layers for each of its virtual stages, one if there are none."""
    config, chunks = transformer_config(recipe, layout), recipe.parallel.virtual_stages
    decoders: list[Decoder] = []
    for i in range(chunks):
        first, last = layout.first_stage and i == 0, layout.last_stage and i == chunks - 1
        decoders.append(chunk(recipe, layout, vocab_size, config, first, last, i if chunks > 1 else None))
    return decoders


def chunk(recipe: Pretrain, layout: Layout, vocab_size: int, config: Any, first: bool, last: bool, virtual_stage: int | None) -> Decoder:
    """One chunk; the first holds the embedding, the last the output layer."""
    model, cuda = recipe.model, layout.device.type == "cuda"
    decoder = Decoder(
        config=config, transformer_layer_spec=layer_spec(model, config, virtual_stage),
        vocab_size=model.vocab_rows(vocab_size), max_sequence_length=1 << 20,
        pre_process=first, post_process=last, parallel_output=True,
        share_embeddings_and_output_weights=model.tie_embeddings,
        # else the attention rotates
        position_embedding_type="rope" if cuda and model.image_positions == "row" else "none",
        rotary_base=model.rotary_base, vp_stage=virtual_stage)                 # type: ignore[arg-type]
    if hasattr(decoder, "rotary_pos_emb"):
        decoder.rotary_pos_emb.inv_freq = rope.frequencies(model)              # ours knows every scaling; it moves to the device itself
    decoder.vocab_size_real = vocab_size
    for name, parameter in decoder.named_parameters():
        if ".experts." in name:
            # 0.16.1 marks them only where ep > 1: then their gradients would not be summed over tp, and their optimizer state
            # would be saved under other names
            parameter.allreduce = False                                        # type: ignore[attr-defined]
    if cuda:
        decoder.cuda(layout.device)
    with torch.no_grad():
        initialize(decoder, model, recipe.seed)
        if recipe.init_rows is not None:
            place_rows(decoder, recipe.init_rows, vocab_size)
    return decoder


def shards(decoder: Decoder) -> Iterator[tuple[str, ShardedTensor]]:
    """(name, shard) of every parameter; a shard knows its place in the whole tensor. Layers are told apart by their
    first offset."""
    metadata = ensure_metadata_has_dp_cp_group(None)
    for entry in decoder.sharded_state_dict(metadata=metadata).values():
        for shard in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
            if isinstance(shard, ShardedTensor):
                yield shard.key, shard


def initialize(decoder: Decoder, model: Model, seed: int) -> None:
    """Norms one, biases zero, matrices normal; each from a generator seeded by the weight's name and layer."""
    parameters = dict(decoder.named_parameters())
    for name, entry in decoder.sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group(None)).items():
        if name not in parameters:
            continue
        # a weight that is saved in parts (gate and up) is made in parts: a view of one may be none where it is kept in 8 bits
        if isinstance(entry, ShardedTensorFactory):
            shards: Any = entry.build()
            parts: Any = [fresh(shard, model, seed) for shard in shards]
            whole = entry.merge_fn(parts)
        else:
            whole = fresh(entry, model, seed)
        parameters[name].copy_(whole)


def fresh(shard: ShardedTensor, model: Model, seed: int) -> Tensor:
    """The new values of a shard, fp32: its part of a tensor that is the same whoever makes it."""
    name, shape, data = shard.key, shard.local_shape, shard.data
    assert data is not None, name
    if "norm" in name:
        return torch.ones(shape, device=data.device)
    std = model.init_std
    if "linear_proj" in name or "linear_fc2" in name:
        std = model.output_init_std if model.output_init_std is not None else model.init_std / math.sqrt(2 * model.num_layers)
    if std == 0 or name.endswith("bias"):
        return torch.zeros(shape, device=data.device)
    lead = shard.prepend_axis_num
    layer, whole, offset = shard.global_offset[:lead], shard.global_shape[lead:], shard.global_offset[lead:]
    label = hashlib.sha256(f"{seed} {name} {layer}".encode()).digest()
    generator = torch.Generator(data.device).manual_seed(int.from_bytes(label[:7], "big"))
    full = torch.empty(whole, dtype=torch.float32, device=data.device).normal_(0.0, std, generator=generator)
    return full[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]


def place_rows(decoder: Decoder, path: Path, vocab_size: int) -> None:
    """Start given ids from given rows: `rows` [n, hidden] at `ids` [n] (all ids in order if absent), `output_rows` for
    the output layer."""
    from safetensors.torch import load_file
    given = load_file(path)
    rows = given["rows"]
    ids = given.get("ids", torch.arange(len(rows)))
    if rows.shape != (len(ids), decoder.config.hidden_size) or int(ids.max()) >= vocab_size:
        raise ValueError(f"{path} holds rows {list(rows.shape)} for ids up to {int(ids.max())}; the model wants "
                         f"[{len(ids)}, {decoder.config.hidden_size}] and ids below {vocab_size}: "
                         "make init_rows for this model")
    for name, shard in shards(decoder):
        if name not in ("embedding.word_embeddings.weight", "output_layer.weight"):
            continue
        assert shard.data is not None
        source = given.get("output_rows", rows) if name == "output_layer.weight" else rows
        local = ids - shard.global_offset[0]
        here = (local >= 0) & (local < len(shard.data))
        shard.data[local[here]] = source[here].to(shard.data)
