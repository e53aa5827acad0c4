"""The compiled attention of a step against torch's: both ways of the decoder, on rows of any lengths."""

import numpy as np
import pytest
import torch

from mmllm.generate import decoder as decoders
from mmllm.generate.decoder import Decoder, build


def decoder(heads: int, groups: int, width: int, norms: bool) -> Decoder:
    kind = "qwen3" if norms else "qwen2"
    config = {"model_type": kind, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": heads,
              "num_key_value_heads": groups, "head_dim": width, "vocab_size": 50, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
              "tie_word_embeddings": True, "max_position_embeddings": 64, "hidden_act": "silu"}
    torch.manual_seed(heads)
    sizes = {"q": heads * width, "k": groups * width, "v": groups * width}
    tensors = {"model.embed_tokens.weight": torch.randn(50, 24), "model.norm.weight": torch.rand(24)}
    for number in range(2):
        at = f"model.layers.{number}."
        tensors |= {f"{at}{name}_layernorm.weight": torch.rand(24) + 0.5 for name in ("input", "post_attention")}
        tensors |= {f"{at}self_attn.{name}_proj.weight": torch.randn(size, 24) for name, size in sizes.items()}
        tensors |= ({f"{at}self_attn.{name}_norm.weight": torch.rand(width) + 0.5 for name in "qk"} if norms else
                    {f"{at}self_attn.{name}_proj.bias": torch.randn(size) for name, size in sizes.items()})
        tensors |= {f"{at}self_attn.o_proj.weight": torch.randn(24, heads * width), f"{at}mlp.down_proj.weight": torch.randn(24, 40)}
        tensors |= {f"{at}mlp.{name}_proj.weight": torch.randn(40, 24) for name in ("gate", "up")}
    return build(config, tensors)


@pytest.mark.parametrize(("heads", "groups", "width", "norms"), [(4, 4, 8, True), (6, 2, 4, True), (6, 3, 4, False)])
def test_compiled_attention_is_torchs(monkeypatch: pytest.MonkeyPatch, heads: int, groups: int, width: int, norms: bool) -> None:
    model = decoder(heads, groups, width, norms)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 50, n).tolist() for n in (1, 9, 4)]
    pieces = [torch.from_numpy(rng.integers(0, 50, (3, s))) for s in (1, 5, 1)]
    found: list[list[torch.Tensor]] = []
    for most in (decoders.FEW, 0):
        monkeypatch.setattr(decoders, "FEW", most)
        hidden, cache = model.start(prompts, 8)
        found.append([hidden, *(model.read(ids, cache, every=True) for ids in pieces), cache.store])
    for ours, torchs in zip(*found, strict=True):
        assert torch.allclose(ours, torchs, atol=2e-5)


def test_a_row_gets_the_same_attention_whoever_stands_beside_it() -> None:
    model = decoder(4, 2, 8, True)
    joined = torch.randn(5, 1, 8, 8)
    rooms = [model.room(5, 20), model.room(1, 20)]
    rooms[0].store[:] = torch.randn_like(rooms[0].store)
    rooms[1].store[:] = rooms[0].store[:, :, 3:4]
    norm = model.layers[1].qk_norm
    together = decoders.attend(joined.clone(), norm, rooms[0], 1, 0, np.array([3, 19, 0, 11, 7]), model.scale, model.eps)
    alone = decoders.attend(joined[3:4].clone(), norm, rooms[1], 1, 0, np.array([11]), model.scale, model.eps)
    assert torch.equal(together[3:4], alone)
    assert torch.equal(rooms[0].store[:, :, 3:4], rooms[1].store)
