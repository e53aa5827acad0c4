"""A Hugging Face model folder as others publish them, in a second: random weights, a byte-level tokenizer trained on a few sentences."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import tiny_model
import torch

TOKENS = 380
ROWS = 400
"""Of the embedding: more than the tokenizer has tokens, as Qwen's."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLAIN = ("<think>", "</think>")
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}},
    "qwen2": {"tie_word_embeddings": True}, "qwen3": {"tie_word_embeddings": False, "head_dim": 16},
    "qwen3 tied": {"tie_word_embeddings": True, "head_dim": 8},
    "qwen3_moe": {"tie_word_embeddings": False, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                  "norm_topk_prob": True}}


@cache
def tokenizer_json(ignore_merges: bool = False) -> str:
    """In the manner of Qwen2's and Llama 3's: NFC, split by a pattern, bytes; special tokens behind the pieces and one that is text."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    fast = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    fast.decoder, fast.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(vocab_size=TOKENS - len(SPECIAL) - len(PLAIN), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    fast.train_from_iterator(tiny_model.sentences(500) + [f"<{word}> {word}|" for word in ("eos", "unk", "image")] * 20, trainer)
    fast.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    fast.add_tokens([AddedToken(name, normalized=False) for name in PLAIN])
    return fast.to_str()


def folder(out: Path, kind: str, dtype: torch.dtype = torch.bfloat16, shard: str = "20KB") -> Path:
    """A folder with weights in several files."""
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.for_model(
        kind.split()[0], vocab_size=ROWS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=[TOKENS - 5, TOKENS - 3], pad_token_id=None,
        **SHAPES[kind])
    torch.manual_seed(len(kind))
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: what they begin as would hide a swap
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(out, max_shard_size=shard)
    (out / "tokenizer.json").write_text(tokenizer_json())
    (out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[0]}))
    return out
