"""The whole decoder: packed documents are alone, recomputing changes nothing, experts are what the papers write."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toy_rows import TINY, VOCAB, ToyRows, tiny

from mmllm.config import Model, Parallel
from mmllm.megatron import parallel
from mmllm.megatron.attention import PackedRow
from mmllm.megatron.batch import micro_batches
from mmllm.megatron.buckets import pack
from mmllm.megatron.loss import Targets
from mmllm.megatron.model import Decoder, build

EXPERTS = replace(TINY, num_experts=4, expert_ffn_hidden_size=24, balance_loss=0.1)
SHAPES = {"qwen3": TINY, "qwen2": replace(TINY, qk_layernorm=False, qkv_bias=True), "llama": replace(TINY, qk_layernorm=False),
          "tied": replace(TINY, tie_embeddings=True), "experts": EXPERTS, "wide": replace(TINY, head_dim=16, image_positions="grid")}


@pytest.fixture(scope="module")
def one_rank() -> Iterator[parallel.Layout]:
    yield parallel.start(Parallel(), 0)
    parallel.stop()


def decoder(model: Model, layout: parallel.Layout, how: Parallel | None = None) -> Decoder:
    [built] = build(tiny(Path("x"), model=model, parallel=how or Parallel()), layout, VOCAB.size)
    for parameter in built.parameters():
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return built


def packed(borders: list[int]) -> PackedRow:
    return PackedRow(qkv_format="thd", packing=pack(np.array(borders, np.int32)))


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "wide"])
def test_a_packed_row_gives_the_logits_and_gradients_of_its_documents(name: str, one_rank: parallel.Layout) -> None:
    model, lengths = decoder(SHAPES[name], one_rank), [9, 40, 1, 23]
    tokens = torch.randint(0, VOCAB.size, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    weight = torch.randn(sum(lengths), 256, generator=torch.Generator().manual_seed(1)) / 256

    def gradients(logits: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((logits * weight).sum(), list(model.parameters()))
    together = model(tokens, None, None, packed_seq_params=packed(np.cumsum([0, *lengths]).tolist()))[0]
    alone = torch.cat([model(part, None, None, packed_seq_params=packed([0, part.size(1)]))[0] for part in tokens.split(lengths, 1)])
    assert together.abs().max() > 1
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    for ours, theirs in zip(gradients(together), gradients(alone), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


RECOMPUTED = {"full": Parallel(recompute="full"), "the first layer": Parallel(recompute="full", recompute_layers=1),
              "attention": Parallel(recompute="selective"), "mlp": Parallel(recompute="selective", recompute_modules=("mlp",)),
              "both, and norms": Parallel(recompute="selective", recompute_modules=("core_attn", "mlp", "layernorm")),
              "experts": Parallel(recompute="selective", recompute_modules=("moe",))}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputing_gives_the_same_gradients_bit_for_bit(name: str, one_rank: parallel.Layout) -> None:
    shape = EXPERTS if name == "experts" else TINY
    found = list[dict[str, Tensor]]()
    for how in (Parallel(), RECOMPUTED[name]):
        model = decoder(shape, one_rank, how)
        [batch] = micro_batches([ToyRows().row(0)], VOCAB, tiny(Path("x"), model=shape), one_rank)
        loss, _ = model(batch.tokens, None, None, labels=batch.targets, packed_seq_params=batch.packed)
        loss.backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def slow_experts(x: Tensor, layer: torch.nn.Module, k: int) -> Tensor:
    """[t, h] → [t, h], a token at a time."""
    out = list[Tensor]()
    for token in x:
        scores = F.linear(token, layer.router.weight)
        top, which = scores.topk(k)
        parts = list[Tensor]()
        for share, expert in zip(top.softmax(-1), which.tolist(), strict=True):
            one = layer.experts.local_experts[expert]
            gate, up = F.linear(token, one.linear_fc1.weight).chunk(2)
            parts.append(share * F.linear(F.silu(gate) * up, one.linear_fc2.weight))
        out.append(torch.stack(parts).sum(0))
    return torch.stack(out)


def test_experts_are_weighted_by_the_softmax_over_the_likeliest(one_rank: parallel.Layout) -> None:
    layer = decoder(EXPERTS, one_rank).decoder.layers[0].mlp.eval()
    x = torch.randn(30, 32)
    torch.testing.assert_close(layer(x[:, None])[0].squeeze(1), slow_experts(x, layer, 2), rtol=1e-4, atol=1e-5)


def test_the_balance_loss_counts_tokens_not_padding(one_rank: parallel.Layout) -> None:
    model = decoder(EXPERTS, one_rank)
    tokens = torch.randint(0, 60, (1, 50), generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(0)
    padding = torch.arange(50)[None] >= 40
    # nothing to predict: the balance is all the gradient there is
    targets = Targets(where=nothing.long(), labels=nothing.long(), weight=nothing, image=nothing.bool(), counted=nothing, z_loss=0.0,
                      padding=padding, balance_tokens=100.0)
    kept = list[Tensor]()
    router = model.decoder.layers[-1].mlp.router                                # the last: later ones would reach an earlier one's
    hook = router.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].detach()))
    loss, _ = model(tokens, None, None, labels=targets, packed_seq_params=packed([0, 40, 50]))
    hook.remove()
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(()))                         # as megatron's schedule does
    [found] = torch.autograd.grad(loss, [router.weight])
    chance = F.linear(kept[0][:40, 0], router.weight).softmax(-1)               # [t, experts]
    busy = torch.zeros_like(chance).scatter(1, chance.topk(2, -1).indices, 1.0).mean(0) / 2
    balance = 0.1 * 4 * (busy * chance.mean(0)).sum() * 40 / 100                # 40 of the global batch's 100 tokens
    [expected] = torch.autograd.grad(balance, [router.weight])
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)


def test_a_new_weight_does_not_depend_on_who_makes_it(one_rank: parallel.Layout) -> None:
    recipe = tiny(Path("x"), model=replace(EXPERTS, qkv_bias=True))
    [first], [second] = (build(recipe, one_rank, VOCAB.size) for _ in range(2))
    for (name, ours), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert float(ours.detach().std()) == pytest.approx(
            0.0 if "norm" in name or "bias" in name else 0.01 if "proj" in name or "fc2" in name else 0.02, rel=0.2), name


@pytest.mark.gpu
@pytest.mark.parametrize("positions", ["row", "grid"])
def test_transformer_engine_keeps_packed_documents_apart(positions: str) -> None:
    layout = parallel.start(Parallel(), 0)
    recipe = tiny(Path("x"), precision="bf16", model=replace(
        TINY, hidden_size=256, head_dim=64, qkv_bias=True, rope_scaling="yarn", rope_factor=4.0, rope_original_len=64,
        image_positions=positions))
    [model] = build(recipe, layout, VOCAB.size)
    row = ToyRows().row(0)
    [batch] = micro_batches([row], VOCAB, recipe, layout)
    with torch.no_grad():
        together = model(batch.tokens, None, None, packed_seq_params=batch.packed)[0].float()
        for first, end in zip(row.cu_seqlens[:-2].tolist(), row.cu_seqlens[1:-1].tolist(), strict=True):
            borders = torch.tensor([0, end - first], dtype=torch.int32, device=layout.device)
            alone = PackedRow(qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders, max_seqlen_q=end - first,
                              max_seqlen_kv=end - first, grid=None if batch.packed.grid is None else batch.packed.grid[:, first:end])
            logits = model(batch.tokens[:, first:end], None, None, packed_seq_params=alone)[0].float()
            assert (logits - together[first:end]).norm() < 2e-2 * logits.norm()
    parallel.stop()
