"""config.json ↔ `Model`: the shape of a decoder in Hugging Face's words and in ours.

Four architectures say all that is exported: Llama, Qwen2 (biases on queries, keys and values), Qwen3 (QK norm) and Qwen3-MoE (QK norm and
experts). What a config.json asks for and our decoder lacks is refused, never left out.
"""

from collections.abc import Mapping
from typing import Any

from mmllm.config import Model

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
                 "qwen3_moe": "Qwen3MoeForCausalLM"}


def model_config(model: Model, vocab_size: int, max_len: int) -> dict[str, Any]:
    """config.json of the stock architecture with this shape. Errors: ValueError where no stock architecture has it."""
    if model.qk_layernorm and model.qkv_bias:
        raise ValueError("model.qk_layernorm and model.qkv_bias are both set: no stock Hugging Face model has QK norm and biases on "
                         "queries, keys and values alone")
    if model.num_experts and not model.qk_layernorm:
        raise ValueError(f"model.num_experts is {model.num_experts} and model.qk_layernorm off: Qwen3-MoE, the stock model with experts "
                         "that is exported, has QK norm")
    if model.image_positions != "row":
        raise ValueError(f"model.image_positions is {model.image_positions}: no stock Hugging Face model can say so")
    kind = "qwen3_moe" if model.num_experts else "qwen3" if model.qk_layernorm else "qwen2" if model.qkv_bias else "llama"
    fields: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]], "model_type": kind, "vocab_size": vocab_size, "max_position_embeddings": max_len,
        "num_hidden_layers": model.num_layers, "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size, "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.groups, "head_dim": model.head_width, "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps, "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings, "attention_dropout": 0.0, "use_cache": True,
        "rope_theta": model.rotary_base,  # transformers 4, vLLM
        "rope_parameters": {"rope_theta": model.rotary_base, **rope(model)},  # transformers 5
    }
    fields |= {"use_sliding_window": False} if kind == "qwen2" else {"attention_bias": False}
    if model.num_experts:
        fields |= {"num_experts": model.num_experts, "num_experts_per_tok": model.experts_per_token, "decoder_sparse_step": 1,
                   "moe_intermediate_size": model.expert_width, "mlp_only_layers": [], "norm_topk_prob": True,
                   "router_aux_loss_coef": model.balance_loss}
    if model.rope_scaling != "none":
        fields["rope_scaling"] = rope(model)  # transformers 4, vLLM
    return fields


def rope(model: Model) -> dict[str, Any]:
    """How rotary frequencies are stretched, as transformers' `modeling_rope_utils` reads it."""
    scaling = model.rope_scaling
    if scaling == "none":
        return {"rope_type": "default"}
    fields: dict[str, Any] = {"rope_type": scaling, "factor": model.rope_factor}
    if scaling in ("llama3", "yarn"):
        fields["original_max_position_embeddings"] = model.rope_original_len
    if scaling == "llama3":
        fields |= {"low_freq_factor": model.rope_low_freq_factor, "high_freq_factor": model.rope_high_freq_factor}
    if scaling == "yarn":
        fields |= {"beta_fast": model.rope_beta_fast, "beta_slow": model.rope_beta_slow}
        if model.rope_attention_factor is not None:
            fields["attention_factor"] = model.rope_attention_factor
    return fields


def read_model(config: Mapping[str, Any]) -> Model:
    """The shape that a config.json describes; inverse of `model_config`. Errors: ValueError naming what our decoder lacks."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"config.json: model_type {kind!r} is none of {', '.join(ARCHITECTURES)}, the decoders known here")
    lacking = {
        "hidden_act": config.get("hidden_act", "silu") != "silu", "quantization_config": bool(config.get("quantization_config")),
        "attention_bias": bool(config.get("attention_bias")), "mlp_bias": bool(config.get("mlp_bias")),
        "use_sliding_window": bool(config.get("use_sliding_window")),
        "layer_types": any(each != "full_attention" for each in config.get("layer_types") or ()),
        "partial_rotary_factor": config.get("partial_rotary_factor", 1.0) != 1.0,
        "decoder_sparse_step": config.get("decoder_sparse_step", 1) != 1, "mlp_only_layers": bool(config.get("mlp_only_layers")),
        "norm_topk_prob": kind == "qwen3_moe" and not config.get("norm_topk_prob", False)}
    if found := [f"{name} {config.get(name)!r}" for name, lacks in lacking.items() if lacks]:
        raise ValueError(f"config.json asks for {'; '.join(found)}, which the decoder here has not")
    try:
        heads = config["num_attention_heads"]
        return Model(
            num_layers=config["num_hidden_layers"], hidden_size=config["hidden_size"], num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads, ffn_hidden_size=config["intermediate_size"],
            # Qwen3 has 128 where config.json says nothing, the others share the hidden size among the heads
            head_dim=config.get("head_dim") or (128 if kind == "qwen3" else None),
            qk_layernorm=kind in ("qwen3", "qwen3_moe"), qkv_bias=kind == "qwen2", norm_eps=config.get("rms_norm_eps", 1e-6),
            init_std=config.get("initializer_range", 0.02), tie_embeddings=bool(config.get("tie_word_embeddings")),
            **_rope_fields(config), **(_expert_fields(config) if kind == "qwen3_moe" else {}))
    except KeyError as error:
        raise ValueError(f"config.json has no {error.args[0]}") from error


def _expert_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_experts": config["num_experts"] if "num_experts" in config else config["num_local_experts"],
            "experts_per_token": config["num_experts_per_tok"], "expert_ffn_hidden_size": config["moe_intermediate_size"],
            "balance_loss": config.get("router_aux_loss_coef", 0.001)}


def _rope_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
    said: dict[str, Any] = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base = float(said.pop("rope_theta", config.get("rope_theta", 10_000.0)))
    kind = said.pop("rope_type", said.pop("type", "default"))
    if said.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("config.json asks for a partial_rotary_factor, which the decoder here has not")
    fields: dict[str, Any] = {"rotary_base": base}
    if kind == "default":
        return fields
    names = {"factor": "rope_factor"}
    if kind in ("llama3", "yarn"):
        names["original_max_position_embeddings"] = "rope_original_len"
        said.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    if kind == "llama3":
        names |= {"low_freq_factor": "rope_low_freq_factor", "high_freq_factor": "rope_high_freq_factor"}
    elif kind == "yarn":
        names |= {"beta_fast": "rope_beta_fast", "beta_slow": "rope_beta_slow", "attention_factor": "rope_attention_factor"}
    elif kind != "linear":
        raise ValueError(f"config.json asks for rope_type {kind!r}: default, linear, llama3 and yarn are known here")
    said = {name: value for name, value in said.items() if value is not None and (name, value) != ("truncate", True)}
    if "factor" not in said:
        raise ValueError(f"config.json asks for {kind} rope without a factor")
    if unknown := sorted(set(said) - set(names) - ({"original_max_position_embeddings"} if kind == "linear" else set[str]())):
        raise ValueError(f"config.json asks for {kind} rope with {', '.join(unknown)}, which the decoder here has not")
    return fields | {"rope_scaling": kind} | {names[name]: value for name, value in said.items() if name in names}
