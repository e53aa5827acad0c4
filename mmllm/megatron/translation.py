"""A recipe in megatron-core's words.

The one distinction: ours says what is wanted, megatron-core's how it is done. Everything that follows from the one for the
other is decided here, and what FP8 asks of three configurations in `fp8`.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mmllm.config import Parallel, Pretrain
from mmllm.megatron import fp8, rope
from mmllm.megatron.parallel import Layout
from mmllm.run import resolve_precision


def transformer_config(recipe: Pretrain, layout: Layout) -> Any:
    """Our words → megatron-core's."""
    with warnings.catch_warnings():
        # it remarks on CUDA graphs, which are off
        warnings.simplefilter("ignore")
        config: Any = TransformerConfig(**transformer_fields(recipe, layout))
    # read by GPTModel, and by our attention
    config.rotary_base, config.rotary_frequencies = recipe.model.rotary_base, rope.frequencies(recipe.model)
    # written by the decoder and by the routers
    config.balance_tokens, config.balance_seen = math.inf, 0.0
    # the hook through which our gate enters the MLP
    config.use_te_activation_func = layout.device.type == "cpu"
    return config


def leave(weight: Tensor) -> Tensor:
    """An init method that leaves a new weight as it is."""
    return weight


def transformer_fields(recipe: Pretrain, layout: Layout) -> dict[str, Any]:
    model, dtype, cuda = recipe.model, resolve_precision(recipe.precision), layout.device.type == "cuda"
    return {
        "num_layers": model.num_layers, "hidden_size": model.hidden_size, "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.groups, "kv_channels": model.head_width, "ffn_hidden_size": model.ffn_hidden_size,
        "qk_layernorm": model.qk_layernorm, "layernorm_epsilon": model.norm_eps, "normalization": "RMSNorm",
        "gated_linear_unit": True, "activation_func": F.silu, "add_bias_linear": False, "add_qkv_bias": model.qkv_bias,
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "softmax_scale": rope.softmax_scale(model),
        # `initialize` fills the weights. But not perform_initialization=False: in 0.16.1 the weights would then lack
        # the mark of being split, and the gradient norm under tensor parallelism would count one rank's part
        "init_method": leave, "output_layer_init_method": leave, "embedding_init_method": leave, "use_cpu_initialization": not cuda,
        "bf16": dtype == torch.bfloat16, "params_dtype": dtype, "pipeline_dtype": dtype,
        # the loss comes normalised by the global weight
        "calculate_per_token_loss": True,
        "masked_softmax_fusion": False, "bias_dropout_fusion": False, "apply_rope_fusion": cuda, "persist_layer_norm": cuda,
        "bias_activation_fusion": cuda, "gradient_accumulation_fusion": False,
        **parallel_fields(recipe.parallel, cuda), **expert_fields(recipe, cuda), **fp8.transformer_fields(recipe.fp8)}


def parallel_fields(parallel: Parallel, cuda: bool) -> dict[str, Any]:
    """How ranks share the work, and what is computed twice."""
    fields: dict[str, Any] = {
        "tensor_model_parallel_size": parallel.tp, "sequence_parallel": parallel.tp > 1 and parallel.sequence_parallel,
        "pipeline_model_parallel_size": parallel.pp, "context_parallel_size": parallel.cp,
        "expert_model_parallel_size": parallel.ep, "expert_tensor_parallel_size": parallel.expert_tp,
        "num_layers_in_first_pipeline_stage": parallel.first_stage_layers,
        "num_layers_in_last_pipeline_stage": parallel.last_stage_layers,
        # gloo sends while the schedule goes on: what is freed then would arrive as garbage
        "deallocate_pipeline_outputs": parallel.pp > 1 and (cuda or parallel.virtual_stages == 1)}
    if parallel.virtual_stages > 1:
        # messages one by one: sent together, those of two stages to each other are taken for one another
        fields |= {"virtual_pipeline_model_parallel_size": parallel.virtual_stages, "overlap_p2p_comm": True, "batch_p2p_comm": False}
    if parallel.recompute == "full":
        some = parallel.recompute_layers > 0
        fields |= {"recompute_granularity": "full", "recompute_method": "block" if some else "uniform",
                   "recompute_num_layers": parallel.recompute_layers if some else 1}
    elif parallel.recompute == "selective":
        fields |= {"recompute_granularity": "selective", "recompute_modules": list(parallel.recompute_modules)}
    return fields


def expert_fields(recipe: Pretrain, cuda: bool) -> dict[str, Any]:
    """Experts, if there are any: dropless, the k likeliest by softmax over them as in Qwen3-MoE."""
    model = recipe.model
    if not model.num_experts:
        return {}
    return {"num_moe_experts": model.num_experts, "moe_router_topk": model.experts_per_token, "moe_ffn_hidden_size": model.expert_width,
            "moe_router_load_balancing_type": "aux_loss" if model.balance_loss else "none", "moe_aux_loss_coeff": model.balance_loss,
            "moe_router_dtype": "fp32", "moe_token_dispatcher_type": "alltoall", "moe_grouped_gemm": cuda, "moe_permute_fusion": cuda,
            "moe_router_padding_for_quantization": recipe.fp8.scaling != "none"}
