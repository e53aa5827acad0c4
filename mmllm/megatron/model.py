"""The decoder: one translation of our `Model` into megatron-core's configuration, the layer spec, and new weights.

On CUDA the layers are Transformer Engine's, on a CPU those of `attention` and `layers`; parameters, checkpoints and
numbers are the same. A new weight is a function of the seed and its own name, not of the rank that makes it or the
order in which it is made, so every layout of ranks starts from the same model.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor

from mmllm.config import Model, Pretrain
from mmllm.megatron.attention import CoreAttention, PackedSelfAttention
from mmllm.megatron.layers import RmsNorm, SwiGlu
from mmllm.megatron.loss import HeadLoss, Targets, statistics
from mmllm.megatron.parallel import Layout
from mmllm.run import resolve_precision

VOCAB_MULTIPLE = 128
"""The vocabulary rows of the model divide by this, so any tensor-parallel width that is a power of two up to it can
split them."""


def transformer_config(model: Model, layout: Layout, dtype: torch.dtype) -> Any:
    """Our words → megatron-core's."""
    with warnings.catch_warnings():
        # it remarks on CUDA graphs, which are off
        warnings.simplefilter("ignore")
        config: Any = _transformer_config(model, layout, dtype)
    # read by GPTModel and by PackedSelfAttention
    config.rotary_base = model.rotary_base
    # the hook through which our gate enters the MLP
    config.use_te_activation_func = layout.device.type == "cpu"
    return config


def leave(weight: Tensor) -> Tensor:
    """An init method that leaves a new weight as it is."""
    return weight


def _transformer_config(model: Model, layout: Layout, dtype: torch.dtype) -> TransformerConfig:
    cuda = layout.device.type == "cuda"
    return TransformerConfig(
        num_layers=model.num_layers, hidden_size=model.hidden_size, num_attention_heads=model.num_attention_heads,
        num_query_groups=model.groups, kv_channels=model.head_width, ffn_hidden_size=model.ffn_hidden_size,
        qk_layernorm=model.qk_layernorm, layernorm_epsilon=model.norm_eps, normalization="RMSNorm",
        gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False,
        attention_dropout=0.0, hidden_dropout=0.0,
        # `initialize` fills the weights. But not perform_initialization=False: in 0.16.1 the weights would then lack
        # the mark of being split, and the gradient norm under tensor parallelism would count one rank's part
        init_method=leave, output_layer_init_method=leave, embedding_init_method=leave, use_cpu_initialization=not cuda,
        bf16=dtype == torch.bfloat16, params_dtype=dtype, pipeline_dtype=dtype,
        tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp,
        sequence_parallel=layout.tp > 1,
        # the loss comes normalised by the global weight
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=layout.pp > 1,
        masked_softmax_fusion=False, bias_dropout_fusion=False, apply_rope_fusion=cuda, persist_layer_norm=cuda,
        bias_activation_fusion=cuda, gradient_accumulation_fusion=False)


def layer_spec(model: Model, config: Any) -> Any:
    """Which modules make a layer."""
    if torch.cuda.is_available():
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=model.qk_layernorm)
    spec: Any = get_gpt_layer_local_spec(qk_layernorm=model.qk_layernorm, normalization="RMSNorm")
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RmsNorm
    layer.self_attention.module = PackedSelfAttention
    attention.core_attention = CoreAttention
    attention.q_layernorm = attention.k_layernorm = RmsNorm if model.qk_layernorm else None
    layer.mlp.submodules.activation_func = SwiGlu
    norm: Any = RmsNorm
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=norm)


class Decoder(GPTModel):
    """GPTModel whose last stage, given targets, goes from hidden states to the loss without holding the logits."""

    vocab_size_real: int

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


def build(recipe: Pretrain, layout: Layout, vocab_size: int) -> Decoder:
    """This rank's part of a new decoder."""
    config = transformer_config(recipe.model, layout, resolve_precision(recipe.precision))
    cuda = layout.device.type == "cuda"
    decoder = Decoder(
        config=config, transformer_layer_spec=layer_spec(recipe.model, config),
        vocab_size=-(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE, max_sequence_length=1 << 20,
        pre_process=layout.first_stage, post_process=layout.last_stage, parallel_output=True,
        share_embeddings_and_output_weights=recipe.model.tie_embeddings,
        position_embedding_type="rope" if cuda else "none",                    # on the CPU the attention rotates
        rotary_base=recipe.model.rotary_base)                                  # type: ignore[arg-type]
    decoder.vocab_size_real = vocab_size
    if cuda:
        decoder.cuda(layout.device)
    with torch.no_grad():
        initialize(decoder, recipe.model, recipe.seed)
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
    """Norms one, matrices normal; each from a generator seeded by the weight's name and layer."""
    output_std = model.output_init_std
    if output_std is None:
        output_std = model.init_std / math.sqrt(2 * model.num_layers)
    for name, shard in shards(decoder):
        data = shard.data
        assert data is not None, name
        if "norm" in name:
            data.fill_(1.0)
            continue
        std = output_std if "linear_proj" in name or "linear_fc2" in name else model.init_std
        if std == 0:
            data.zero_()
            continue
        lead = shard.prepend_axis_num
        layer, whole, offset = shard.global_offset[:lead], shard.global_shape[lead:], shard.global_offset[lead:]
        label = hashlib.sha256(f"{seed} {name} {layer}".encode()).digest()
        generator = torch.Generator(data.device).manual_seed(int.from_bytes(label[:7], "big"))
        full = torch.empty(whole, dtype=torch.float32, device=data.device).normal_(0.0, std, generator=generator)
        data.copy_(full[tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))])


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
