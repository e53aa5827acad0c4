"""Matrix products in 8 bits: our `Fp8` in the words of the three configurations of megatron-core that must agree.

A mismatch among them is a silent or late error, so they are written here and nowhere else. Facts are those of megatron-core
0.16.1 and Transformer Engine 2.11; the choices for Hopper are those of NVIDIA's Megatron-Bridge.
"""

from __future__ import annotations

from typing import Any

from mmllm.config import Fp8


def transformer_fields(fp8: Fp8) -> dict[str, Any]:
    """For TransformerConfig: E4M3 forward, E5M2 for gradients; attention itself stays in bf16 (packed rows)."""
    if fp8.scaling == "none":
        return {}
    fields: dict[str, Any] = {"fp8": "hybrid", "fp8_recipe": fp8.scaling, "fp8_param": fp8.keeps_params,
                              "fp8_dot_product_attention": False, "fp8_multi_head_attention": False}
    if fp8.scaling == "delayed":
        fields |= {"fp8_amax_history_len": fp8.amax_history, "fp8_amax_compute_algo": "max"}
    else:
        fields |= {"first_last_layers_bf16": fp8.first_layers_bf16 + fp8.last_layers_bf16 > 0,
                   "num_layers_at_start_in_bf16": fp8.first_layers_bf16, "num_layers_at_end_in_bf16": fp8.last_layers_bf16}
    return fields


def optimizer_fields(config: Any) -> dict[str, Any]:
    """For OptimizerConfig, as the TransformerConfig says."""
    return {"fp8_recipe": config.fp8_recipe} if config.fp8 else {}


def gradient_fields(config: Any) -> dict[str, Any]:
    """For DistributedDataParallelConfig, as the TransformerConfig says."""
    return {"fp8_param_gather": config.fp8_param}
