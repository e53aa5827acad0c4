"""Attention over packed documents equals attention over each document alone, forward and backward."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toy_rows import tiny

from mmllm.config import Model, Parallel
from mmllm.megatron import parallel
from mmllm.megatron.attention import BUCKETS, SHORT, PackedRow, PackedSelfAttention, pack, unpacked
from mmllm.megatron.model import build

PLAIN = Model(num_layers=1, hidden_size=32, num_attention_heads=4, ffn_hidden_size=32, init_std=0.3)
SHAPES = {"as many keys": PLAIN, "grouped": replace(PLAIN, num_query_groups=2),
          "no norm": replace(PLAIN, qk_layernorm=False)}
LENGTHS = [7, 33, 1, 64, 20, SHORT + 40, 90, 16, 31, 130]


@pytest.fixture(scope="module")
def one_rank() -> Iterator[parallel.Layout]:
    yield parallel.start(Parallel(), 0)
    parallel.stop()


def layer(model: Model, layout: parallel.Layout) -> PackedSelfAttention:
    attention = build(tiny(Path("x"), model=model), layout, 100).decoder.layers[0].self_attention
    for parameter in attention.parameters():
        with torch.no_grad():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return attention


def slow(attention: PackedSelfAttention, x: Tensor, model: Model) -> Tensor:
    """One document [n, h] → [n, h], as the papers write it."""
    n, g, d = len(x), model.groups, model.head_width
    mixed = (x @ attention.linear_qkv.weight.t()).view(n, g, -1, d)
    q, k, v = mixed[:, :, :-2].flatten(1, 2), mixed[:, :, -2], mixed[:, :, -1]      # [n, heads, d], [n, g, d]
    if model.qk_layernorm:
        q = F.rms_norm(q, (d,), attention.q_layernorm.weight, model.norm_eps)
        k = F.rms_norm(k, (d,), attention.k_layernorm.weight, model.norm_eps)
    angle = torch.outer(torch.arange(n), model.rotary_base ** (-torch.arange(0, d, 2) / d)).repeat(1, 2)[:, None]

    def turn(y: Tensor) -> Tensor:
        return y * angle.cos() + torch.cat([-y[..., d // 2:], y[..., :d // 2]], -1) * angle.sin()
    k, v = (y.repeat_interleave(model.num_attention_heads // g, 1) for y in (turn(k), v))
    scores = torch.einsum("qhd,khd->hqk", turn(q), k) / d ** 0.5
    scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ attention.linear_proj.weight.t()


@pytest.mark.parametrize("name", SHAPES)
def test_packed_documents_do_not_see_each_other(name: str, one_rank: parallel.Layout) -> None:
    model, attention = SHAPES[name], layer(SHAPES[name], one_rank)
    borders = np.cumsum([0, *LENGTHS]).astype(np.int32)
    x = torch.randn(borders[-1], 32, requires_grad=True)
    weight = torch.randn(borders[-1], 32)

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((out * weight).sum(), (x, *attention.parameters()))
    packed = attention(x[:, None], packed_seq_params=PackedRow(qkv_format="thd", packing=pack(borders)))[0].squeeze(1)
    alone = torch.cat([slow(attention, part, model) for part in x.split(LENGTHS)])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(gradients(packed), gradients(alone), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_unpacked_columns_are_documents(one_rank: parallel.Layout) -> None:
    model = SHAPES["grouped"]
    attention = layer(model, one_rank)
    x = torch.randn(25, 3, 32)                                                      # [s, b, h]
    ours = attention(x)[0]
    alone = torch.stack([slow(attention, x[:, i], model) for i in range(3)], 1)
    torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_every_token_has_one_slot_and_few_buckets_pad_little(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, SHORT, 60)
    packing = pack(np.cumsum([0, *lengths]).astype(np.int32))
    every = torch.cat([bucket.token for bucket in packing.buckets])
    assert torch.equal(every[packing.slot], torch.arange(lengths.sum()))
    assert len(packing.slot.unique()) == lengths.sum()
    assert packing.position.tolist() == [i for length in lengths for i in range(length)]
    assert len(packing.buckets) <= BUCKETS
    assert len(every) < 1.4 * lengths.sum()


def test_interleaved_columns_keep_their_positions() -> None:
    packing = unpacked(tokens=5, documents=2)
    assert packing.position.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
