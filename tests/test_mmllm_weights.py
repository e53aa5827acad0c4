"""Weights leave megatron-core as Hugging Face's: same logits, any layout of heads."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.config import DataConfig
from mmllm import streams
from mmllm.config import Model, Optim, Parallel, Pretrain, recipe_fields
from mmllm.hf_config import model_config
from mmllm.hf_config import read_model as read_config
from mmllm.megatron import checkpoint, optim, parallel
from mmllm.megatron.model import build
from mmllm.weights import export_weights, join_qkv, read_model, split_qkv

BASE = Model(num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, init_std=0.3)
SHAPES = {"qwen3": BASE, "grouped": replace(BASE, num_query_groups=2, head_dim=16),
          "llama": replace(BASE, qk_layernorm=False), "tied": replace(BASE, tie_embeddings=True),
          "qwen2": replace(BASE, qk_layernorm=False, qkv_bias=True, num_query_groups=2),
          "llama3": replace(BASE, qk_layernorm=False, rope_scaling="llama3", rope_factor=8.0, rope_original_len=16),
          "experts": replace(BASE, num_query_groups=2, num_experts=4, expert_ffn_hidden_size=24),
          "yarn": replace(BASE, rope_scaling="yarn", rope_factor=4.0, rope_original_len=16)}


@pytest.fixture(scope="module")
def one_rank() -> Iterator[parallel.Layout]:
    yield parallel.start(Parallel(), 0)
    parallel.stop()


@pytest.mark.parametrize("name", SHAPES)
def test_exported_weights_give_the_logits_of_megatron(name: str, tmp_path: Path, one_rank: parallel.Layout) -> None:
    from transformers import AutoModelForCausalLM
    vocab_size = 200                                                            # padded to 256 in the model
    recipe = Pretrain(out=tmp_path, steps=1, global_batch=1, model=SHAPES[name], optim=Optim(lr=1e-3), precision="fp32",
                      data=DataConfig(shards=tmp_path))
    model = optim.wrap(build(recipe, one_rank, vocab_size))
    with torch.no_grad():
        for parameter in model[0].parameters():                                    # norms too: all ones would hide a swap
            generator = torch.Generator().manual_seed(parameter.numel())
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    saved = checkpoint.save(tmp_path, 1, model, optim.make(recipe, model),
                            {"recipe": recipe_fields(recipe), "vocab_size": vocab_size}, 1)
    shape, size = read_model(saved)
    assert (shape, size) == (SHAPES[name], vocab_size)

    fields = model_config(shape, size, max_len=64)
    assert read_config(fields) == replace(shape, num_query_groups=shape.groups, head_dim=shape.head_width)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    streams.write(tmp_path, export_weights(saved), shard_bytes=50_000)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = torch.randint(0, vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model[0].module(tokens, None, None)[..., :vocab_size]               # [b, s, v]
        expected = theirs(tokens).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_joining_undoes_splitting() -> None:
    weight = torch.randn(3 * (2 + 2) * 8, 5)
    assert torch.equal(join_qkv(*split_qkv(weight, 3, 8), 3, 8), weight)


def test_a_folder_that_is_no_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no pretraining checkpoint.*state\.json"):
        export_weights(tmp_path)
