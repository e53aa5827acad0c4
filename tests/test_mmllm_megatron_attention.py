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
from mmllm.megatron.attention import GridSelfAttention, PackedRow, PackedSelfAttention
from mmllm.megatron.buckets import BUCKETS, SHORT, pack, unpacked
from mmllm.megatron.model import build
from mmllm.megatron.rope import attention_factor, axes, frequencies

PLAIN = Model(num_layers=1, hidden_size=32, num_attention_heads=4, ffn_hidden_size=32, init_std=0.3)
SHAPES = {"as many keys": PLAIN, "grouped": replace(PLAIN, num_query_groups=2),
          "no norm": replace(PLAIN, qk_layernorm=False), "biases": replace(PLAIN, qk_layernorm=False, qkv_bias=True),
          "yarn": replace(PLAIN, rope_scaling="yarn", rope_factor=8.0, rope_original_len=64)}
LENGTHS = [7, 33, 1, 64, 20, SHORT + 40, 90, 16, 31, 130]


@pytest.fixture(scope="module")
def one_rank() -> Iterator[parallel.Layout]:
    yield parallel.start(Parallel(), 0)
    parallel.stop()


def layer(model: Model, layout: parallel.Layout) -> PackedSelfAttention:
    attention = build(tiny(Path("x"), model=model), layout, 100)[0].decoder.layers[0].self_attention
    for parameter in attention.parameters():
        with torch.no_grad():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return attention


def slow(attention: PackedSelfAttention, x: Tensor, model: Model, position: Tensor | None = None) -> Tensor:
    """One document [n, h] → [n, h], as the papers write it. position [n, d / 2]: of each frequency; n if None."""
    n, g, d = len(x), model.groups, model.head_width
    mixed = F.linear(x, attention.linear_qkv.weight, attention.linear_qkv.bias).view(n, g, -1, d)
    q, k, v = mixed[:, :, :-2].flatten(1, 2), mixed[:, :, -2], mixed[:, :, -1]      # [n, heads, d], [n, g, d]
    if model.qk_layernorm:
        q = F.rms_norm(q, (d,), attention.q_layernorm.weight, model.norm_eps)
        k = F.rms_norm(k, (d,), attention.k_layernorm.weight, model.norm_eps)
    position = torch.arange(n)[:, None] if position is None else position
    angle = (position * frequencies(model)).repeat(1, 2)[:, None]

    def turn(y: Tensor) -> Tensor:
        return y * angle.cos() + torch.cat([-y[..., d // 2:], y[..., :d // 2]], -1) * angle.sin()
    k, v = (y.repeat_interleave(model.num_attention_heads // g, 1) for y in (turn(k), v))
    scores = torch.einsum("qhd,khd->hqk", turn(q), k) * attention_factor(model) ** 2 / d ** 0.5
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


GRID = replace(PLAIN, head_dim=16, num_query_groups=2, image_positions="grid")


def grid(lengths: list[int]) -> np.ndarray:
    """Any positions [3, t] will do."""
    return np.random.default_rng(0).integers(0, 40, (3, sum(lengths)))


def test_positions_on_a_grid_turn_each_frequency_by_its_axis(one_rank: parallel.Layout) -> None:
    attention, lengths = layer(GRID, one_rank), [7, 33, 1, 20]
    x, places = torch.randn(sum(lengths), 32), grid(lengths)
    borders = np.cumsum([0, *lengths]).astype(np.int32)
    packed = attention(x[:, None], packed_seq_params=PackedRow(qkv_format="thd", packing=pack(borders, places)))[0].squeeze(1)
    by_frequency = torch.from_numpy(places).t()[:, axes(8)]                          # [t, d / 2]
    alone = torch.cat([slow(attention, part, GRID, at) for part, at in zip(x.split(lengths), by_frequency.split(lengths), strict=True)])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


class OneDocument(torch.nn.Module):
    """Plain causal attention, in the place of Transformer Engine's."""

    def __init__(self, **_: object) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))                            # [t, heads, d] -> [heads, t, d]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1).flatten(1)


def test_what_cuda_turns_on_a_grid_is_what_the_cpu_turns(one_rank: parallel.Layout) -> None:
    ours = layer(GRID, one_rank)
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType

    from mmllm.megatron.layers import RmsNorm
    theirs = GridSelfAttention(ours.config, SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=OneDocument, linear_proj=RowParallelLinear, q_layernorm=RmsNorm,
        k_layernorm=RmsNorm), layer_number=1, attn_mask_type=AttnMaskType.causal)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    x, places, borders = torch.randn(21, 1, 32), grid([21]), np.array([0, 21], np.int32)
    cu_seqlens = torch.from_numpy(borders)
    expected = ours(x, packed_seq_params=PackedRow(qkv_format="thd", packing=pack(borders, places)))[0]
    found = theirs(x, packed_seq_params=PackedRow(
        qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=21, max_seqlen_kv=21,
        grid=torch.from_numpy(places)))[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
