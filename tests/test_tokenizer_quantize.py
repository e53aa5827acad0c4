"""The quantizer picks the nearest joint entry, keeps codes alive, and its start finds clusters."""

import pytest
import torch
import torch.nn.functional as F

from tokenizer.quantize import QuantizerConfig, SharedIndexQuantizer, kmeans, nearest

CONFIG = QuantizerConfig(codebook_size=32, pixel_dims=(6, 10), semantic_dim=4, semantic_weight=0.5, phrase_len=2)


def quantizer(config: QuantizerConfig = CONFIG) -> SharedIndexQuantizer:
    torch.manual_seed(0)
    return SharedIndexQuantizer(config, torch.randn(20, 12), torch.arange(20) + 100)


def latents(n: int = 50, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 8, generator=generator), torch.randn(n, 16, generator=generator)


def test_a_code_is_the_entry_with_the_least_joint_distance() -> None:
    q, (semantic, pixel) = quantizer(), latents()
    codes = q.encode(semantic, pixel)
    for m, (s, p) in enumerate(zip(semantic.split(4, -1), pixel.split((6, 10), -1), strict=True)):
        ds = torch.cdist(F.normalize(s, dim=-1), q.semantic_table(m)).square()
        dp = torch.cdist(p, q.pixel_tables[m]).square()
        assert torch.equal(codes[:, m], (0.5 * ds + dp).argmin(-1))


def test_both_parts_of_an_entry_share_one_index() -> None:
    q = quantizer()
    codes = torch.randint(32, (9, 2))
    semantic, pixel = q.decode(codes)
    assert torch.equal(semantic[:, 4:], q.semantic_table(1)[codes[:, 1]])
    assert torch.equal(pixel[:, :6], q.pixel_tables[0][codes[:, 0]])


def test_an_entry_encodes_to_itself() -> None:
    q = quantizer()
    codes = torch.stack([torch.arange(32), torch.arange(32).flip(0)], -1)
    assert torch.equal(q.encode(*q.decode(codes)), codes)


def test_chunks_do_not_change_what_is_nearest() -> None:
    x, entries = torch.randn(70, 5), torch.randn(11, 5)
    assert torch.equal(nearest(x, entries), torch.cat([nearest(row[None], entries) for row in x]))


def test_codes_are_the_same_under_autocast() -> None:
    q, (semantic, pixel) = quantizer(), latents()
    with torch.autocast("cpu", torch.bfloat16):
        inside = q(semantic, pixel).codes
    assert torch.equal(inside, q.encode(semantic, pixel))


def test_the_loss_is_the_mean_squared_joint_distance_with_commitment() -> None:
    q, (semantic, pixel) = quantizer(), latents()
    out = q(semantic, pixel)
    zs = torch.cat([F.normalize(s, dim=-1) for s in semantic.split(4, -1)], -1)
    qs, qp = q.decode(out.codes)
    squares = torch.cat([0.5 * (zs - qs).square(), (pixel - qp).square()], -1)
    assert torch.isclose(out.loss, 1.25 * squares.mean())


def test_gradients_reach_latents_and_tables() -> None:
    q, (semantic, pixel) = quantizer(), latents()
    semantic.requires_grad_(), pixel.requires_grad_()
    out = q(semantic, pixel)
    (out.semantic.sum() + out.pixel.sum()).backward()
    assert semantic.grad is not None and pixel.grad is not None and pixel.grad.abs().min() > 0
    assert q.pixel_tables[0].grad is not None and q.projection.grad is not None


def test_dead_codes_move_onto_latents_and_living_ones_stay() -> None:
    q, (_, pixel) = quantizer(), latents()
    q.usage[:] = 1
    q.usage[0, :5] = 0
    before = q.pixel_tables[0].detach().clone()
    assert q.revive(pixel) == 5
    assert torch.equal(q.pixel_tables[0][5:], before[5:])
    revived = q.pixel_tables[0][:5].detach()
    assert torch.cdist(revived, pixel[:, :6]).min(1).values.max() < 1e-2


def test_usage_falls_only_for_codes_that_are_not_chosen() -> None:
    q = quantizer()
    q.count(torch.zeros(10, 2, dtype=torch.long))
    assert q.usage[0, 0] > 1 and (q.usage[0, 1:] < 1).all()


def test_the_start_points_each_phrase_at_its_target() -> None:
    q = quantizer(QuantizerConfig(codebook_size=8, pixel_dims=(6,), semantic_dim=4, phrase_len=1))
    phrases = torch.arange(8)[:, None]
    target = F.normalize(torch.randn(8, 4), dim=-1)
    q.start(0, torch.randn(8, 6), phrases, target)
    assert F.cosine_similarity(q.semantic_table(0), target).min() > 0.9
    assert q.words(0)[3].tolist() == [103]


@pytest.mark.parametrize("count", [4, 9])
def test_kmeans_finds_separate_clusters(count: int) -> None:
    torch.manual_seed(0)
    middles = torch.randn(4, 3) * 20
    x = middles.repeat_interleave(30, 0) + torch.randn(120, 3) * 0.1
    centres = kmeans(x, torch.ones(120), count, rounds=20, seed=0)
    assert torch.cdist(middles, centres).min(1).values.max() < 0.3


def test_kmeans_with_fewer_points_than_codes_keeps_every_point() -> None:
    x = torch.randn(5, 3)
    centres = kmeans(x, torch.ones(5), 8, rounds=3, seed=0)
    assert centres.shape == (8, 3) and torch.cdist(x, centres).min(1).values.max() < 1e-6
