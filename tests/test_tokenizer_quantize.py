"""The shared-index quantizer picks the nearest joint entry, keeps codes alive, and learns the same on one rank and on two."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from two_ranks import on_two_ranks

from tokenizer.kmeans import kmeans
from tokenizer.nearest import AllRows, entropies, nearest, neighbours
from tokenizer.quantize import QuantizerConfig, SharedIndexQuantizer, TextEmbedding
from tokenizer.tables import EmaTable

CONFIG = QuantizerConfig(codebook_size=32, pixel_dims=(6, 10), semantic_dim=4, semantic_weights=(0.5,), phrase_len=2)
WEIGHTS: dict[str, Any] = {"semantic_weights": (1.0,), "pixel_norm": True}


def quantizer(config: QuantizerConfig = CONFIG) -> SharedIndexQuantizer:
    torch.manual_seed(0)
    return SharedIndexQuantizer(config, TextEmbedding(torch.randn(20, 12), torch.arange(20) + 100, 12))


def latents(n: int = 50, seed: int = 1, dims: int = 24) -> torch.Tensor:
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed))


def test_a_code_is_the_entry_with_the_least_joint_distance() -> None:
    q, z = quantizer(), latents()
    codes = q.encode(z)
    for m, (s, p) in enumerate(zip(z[:, :8].split(4, -1), z[:, 8:].split((6, 10), -1), strict=True)):
        semantic, pixel = q.rows(m)
        ds, dp = torch.cdist(F.normalize(s, dim=-1), semantic).square(), torch.cdist(p, pixel).square()
        assert torch.equal(codes[:, m], (0.5 * ds + dp).argmin(-1))


def test_both_parts_of_an_entry_share_one_index() -> None:
    q, codes = quantizer(), torch.randint(32, (9, 2))
    semantic, pixel = q.parts(q.decode(codes))
    assert torch.equal(semantic[:, 4:], q.rows(1)[0][codes[:, 1]]) and torch.equal(pixel[:, :6], q.rows(0)[1][codes[:, 0]])


def test_an_entry_encodes_to_itself() -> None:
    q, codes = quantizer(), torch.stack([torch.arange(32), torch.arange(32).flip(0)], -1)
    assert torch.equal(q.encode(q.decode(codes)), codes)


def test_tiles_do_not_change_what_is_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    x, entries = torch.randn(70, 5), torch.randn(11, 5)
    whole, near, mixed = nearest(x, entries), neighbours(entries, 3), entropies(x, entries, 0.5)
    monkeypatch.setattr("tokenizer.nearest.TILE", {"cpu": 30})
    assert torch.equal(nearest(x, entries), whole) and torch.equal(neighbours(entries, 3), near)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(entropies(x, entries, 0.5), mixed, strict=True))


def test_neighbours_are_the_nearest_others() -> None:
    entries = torch.randn(12, 3)
    away = torch.cdist(entries, entries).fill_diagonal_(torch.inf)
    assert torch.equal(neighbours(entries, 4).long(), away.topk(4, largest=False).indices)
    with pytest.raises(ValueError, match="12 neighbours"):
        neighbours(entries, 12)


def test_a_books_neighbours_do_not_depend_on_the_other_books() -> None:
    q = quantizer()
    found = q.neighbours(5)
    assert found.shape == (2, 32, 5)
    assert torch.equal(found[1], neighbours(q.entries(1), 5))


def test_entropies_are_those_of_the_dense_softmax_and_so_are_their_gradients() -> None:
    x, entries = latents(20, dims=5).requires_grad_(), latents(9, 2, dims=5).requires_grad_()
    p = (x @ entries.T / 0.3).softmax(-1)
    dense = torch.special.entr(p).sum(-1).mean() - torch.special.entr(p.mean(0)).sum()
    wanted = torch.autograd.grad(dense, (x, entries))
    sure, used = entropies(x, entries, 0.3)
    assert torch.allclose(sure - used, dense, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(torch.autograd.grad(sure - used, (x, entries)), wanted, strict=True))


def test_index_backpropagation_has_the_gradients_of_the_dense_formula() -> None:
    z, entries, weight = latents(20, dims=5).requires_grad_(), latents(9, 2, dims=5).requires_grad_(), latents(20, 3, dims=5)
    soft = (z @ entries.T).softmax(-1)
    codes = soft.argmax(-1)
    hard = F.one_hot(codes, 9).float()
    wanted = torch.autograd.grad((((hard - soft).detach() + soft) @ entries * weight).sum(), (z, entries))
    found = torch.autograd.grad((AllRows.apply(z, entries, codes) * weight).sum(), (z, entries))  # pyright: ignore
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))


def test_codes_are_the_same_under_autocast() -> None:
    q, z = quantizer(), latents()
    with torch.autocast("cpu", torch.bfloat16):
        inside = q(z)
    assert torch.equal(inside.codes, q.encode(z)) and inside.entries.dtype == torch.float32


def test_the_loss_is_the_mean_squared_joint_distance_with_commitment() -> None:
    q, z = quantizer(), latents()
    out = q(z)
    squares = (q.compared(z) - q.compared(q.decode(out.codes))).square()
    assert torch.isclose(out.losses["quantize"], 1.25 * squares.mean())


@pytest.mark.parametrize("gradient", ["latent", "both", "all"])
def test_gradients_reach_whom_the_setting_names(gradient: Any) -> None:
    q = quantizer(QuantizerConfig(codebook_size=32, pixel_dims=(6, 10), semantic_dim=4, gradient=gradient, **WEIGHTS))
    z = latents().requires_grad_()
    out = q(z)
    assert torch.allclose(out.entries, q.decode(out.codes), atol=1e-6)
    out.entries.square().sum().backward()
    assert z.grad is not None
    grad = q.pixel_tables[0].entries.grad  # pyright: ignore
    rows = 0 if grad is None else int((grad.abs().sum(-1) > 0).sum())  # pyright: ignore
    assert rows == {"latent": 0, "both": len(out.codes[:, 0].unique()), "all": 32}[gradient]


def test_dead_codes_move_onto_latents_and_living_ones_stay() -> None:
    q, z = quantizer(), latents()
    q.usage[:] = 1
    q.usage[0, :5] = 0
    before = q.rows(0)[1].detach().clone()
    assert q.revive(z) == 5
    assert torch.equal(q.rows(0)[1][5:], before[5:])
    assert torch.cdist(q.rows(0)[1][:5].detach(), z[:, 8:14]).min(1).values.max() < 1e-2


def test_usage_falls_only_for_codes_that_are_not_chosen() -> None:
    q = quantizer()
    q.count(torch.zeros(10, 2, dtype=torch.long))
    assert q.usage[0, 0] > 1 and (q.usage[0, 1:] < 1).all() and q.usage.sum(-1).allclose(torch.full((2,), 32.0))


def test_an_even_book_has_a_perplexity_of_its_size() -> None:
    assert quantizer().perplexity() == pytest.approx([32.0, 32.0])


def test_a_moving_average_ends_at_the_mean_of_what_chose_it() -> None:
    table, z = EmaTable(2, 3), torch.randn(40, 3)
    for _ in range(2000):
        table.follow(z, torch.zeros(40, dtype=torch.long))
    assert torch.allclose(table.rows()[0], z.mean(0), atol=1e-4)


def test_a_text_table_points_each_phrase_at_its_target_and_names_it() -> None:
    q = quantizer(QuantizerConfig(codebook_size=8, pixel_dims=(6,), semantic_dim=4, phrase_len=1))
    target = F.normalize(torch.randn(8, 4), dim=-1)
    q.semantic_tables[0].fit(torch.arange(8)[:, None], target)  # pyright: ignore
    assert F.cosine_similarity(q.rows(0)[0], target).min() > 0.9
    words = q.words(0)
    assert words is not None and words[3].tolist() == [103]


def test_a_table_without_its_text_uses_the_rows_it_was_saved_with() -> None:
    q = quantizer()
    q.freeze()
    rows = q.rows(1)[0]
    q.semantic_tables[1].text = None  # pyright: ignore
    assert torch.equal(q.rows(1)[0], rows)


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="semantic_weights has 3 numbers for 2 books"):
        QuantizerConfig(semantic_weights=(1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="needs a text embedding"):
        SharedIndexQuantizer(QuantizerConfig())
    with pytest.raises(ValueError, match="ema table takes none"):
        QuantizerConfig(gradient="all", pixel_table="ema")


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


def test_two_ranks_learn_what_one_learns_on_the_joined_batch() -> None:
    """k-means, usage, moving averages and revival: latents shared out unevenly, 30 and 50 of 80."""
    one, two = _learn(latents(80, 5)), on_two_ranks("test_tokenizer_quantize:_learn", [latents(80, 5)[:30], latents(80, 5)[30:]])
    for name, value in one.items():
        assert torch.allclose(two[0][name], value, atol=1e-4), name
        assert torch.equal(two[0][name], two[1][name]), name


def _learn(z: torch.Tensor) -> dict[str, torch.Tensor]:
    q = quantizer(QuantizerConfig(codebook_size=32, pixel_dims=(6, 10), semantic_dim=4, pixel_table="ema", **WEIGHTS)).train()
    centres = kmeans(z, torch.ones(len(z)), 12, rounds=4, seed=0)
    drawn = kmeans(z, torch.ones(len(z)), 5000, rounds=1, seed=0)[:80]
    for _ in range(3):
        q(z)
    q.usage[:, 3:9] = 0
    revived = q.revive(z, seed=4)
    return {"centres": centres, "drawn": drawn, "usage": q.usage, "rows": q.rows(0)[1], "phrases": q.semantic_tables[1].phrases.float(),  # pyright: ignore
            "revived": torch.tensor(float(revived))}
