"""Codes decoded ahead: the model's distribution, exactly or within its bound, in fewer passes."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import tiny_model
import torch
from scipy.stats import chisquare
from torch import Tensor

from data.vocab import Vocab
from mmllm.generate.batching import run
from mmllm.generate.decoder import Decoder, build
from mmllm.generate.grammar import Grammar, compile_grammar
from mmllm.generate.plan import Plan
from mmllm.generate.request import Request
from mmllm.generate.sample import Sampling, probabilities, sample
from mmllm.generate.speculate import Speculation, couple, draw_ahead, relax
from mmllm.hf_config import model_config


def small(books: int, codes: int, grids: tuple[tuple[int, int], ...], std: float = 0.3) -> tuple[Decoder, Grammar]:
    vocab = Vocab(text_size=12, codebook_size=codes, num_books=books, grids=grids)
    shape = tiny_model.model()
    weights = tiny_model.weights(shape, vocab.size, std)
    return build(model_config(shape, vocab.size, 512), weights), compile_grammar(vocab, (vocab.eos,))


def requests(grammar: Grammar, count: int, plan: Plan, grid: tuple[int, int], first: int = 0) -> list[Request]:
    vocab = grammar.vocab
    return [Request(prompt=[vocab.bos, 3, 5, vocab.boi, vocab.grid(*grid)], key=key, plan=plan) for key in range(first, first + count)]


def law(decoder: Decoder, grammar: Grammar, one: Request, grid: tuple[int, int]) -> dict[tuple[int, ...], float]:
    """Probability of every picture, one code after another."""
    vocab = grammar.vocab
    out = dict[tuple[int, ...], float]()
    length, K = vocab.num_books * grid[0] * grid[1], vocab.codebook_size
    ranges = [vocab.first_image + place % vocab.num_books * K for place in range(length)]
    steps = dict[tuple[int, ...], Tensor]()
    for picture in product(range(K), repeat=length):
        p = 1.0
        for place in range(length):
            known = picture[:place]
            if known not in steps:
                ids = [low + code for low, code in zip(ranges, known, strict=False)]
                blank = [vocab.bos, *one.prompt[-2:]]
                seen, blind = (decoder.logits(decoder.start([[*start, *ids]], 0)[0], ranges[place], ranges[place] + K)[0]
                               for start in (one.prompt, blank))
                steps[known] = probabilities(blind + one.plan.guidance * (seen - blind), one.plan.image)
            p *= float(steps[known][picture[place]])
        out[picture] = p
    return out


@pytest.mark.parametrize(("books", "codes", "grid", "how", "guidance"), [
    (1, 3, (1, 3), Sampling(), 1.0), (2, 2, (2, 1), Sampling(temperature=0.7), 1.0), (1, 3, (1, 3), Sampling(), 2.0),
    (1, 4, (1, 2), Sampling(top_k=3), 1.0), (1, 4, (2, 1), Sampling(top_p=0.8), 1.0)])
def test_pictures_decoded_ahead_have_the_models_distribution(books: int, codes: int, grid: tuple[int, int], how: Sampling,
                                                             guidance: float) -> None:
    decoder, grammar = small(books, codes, (grid,))
    plan = Plan(image=how, guidance=guidance, only_picture=True)
    asked = requests(grammar, 2500, plan, grid)
    exact = law(decoder, grammar, asked[0], grid)
    assert sum(exact.values()) == pytest.approx(1)
    drawn = draw_ahead(decoder, grammar, asked, Speculation(window=3))
    counts = Counter(tuple(grammar.vocab.codes(ids, *grid).reshape(books, -1).T.flatten().tolist()) for ids in drawn.ids)
    assert all(counts[name] == 0 for name in exact if exact[name] < 1e-9)
    often = [name for name in exact if 2500 * exact[name] > 5]
    seen, expected = [counts[n] for n in often], [2500 * exact[n] for n in often]
    seen, expected = [*seen, 2500 - sum(seen) + 1], [*expected, 2500 - sum(expected) + 1]
    assert chisquare(seen, expected).pvalue > 1e-3


def test_a_draft_that_is_coupled_is_a_draw_from_the_new_distribution_and_stays_as_often_as_can_be() -> None:
    torch.manual_seed(0)
    p, q = torch.rand(5).softmax(0), (4 * torch.rand(5)).softmax(0)
    n = 200_000
    u = torch.rand(n, 3) * (1 - 1e-6)
    x = sample(q.log().expand(n, 5), u[:, 2], Sampling())
    new = couple(x, q.expand(n, 5), p.expand(n, 5), u[:, :2])
    assert torch.allclose(new.bincount(minlength=5) / n, p, atol=0.005)
    assert float((new == x).float().mean()) == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.005)  # no coupling does better


@pytest.mark.parametrize("delta", [0.0, 0.05, 0.3, 1.0])
def test_relaxed_codes_move_within_their_group_and_at_most_by_delta(delta: float) -> None:
    torch.manual_seed(1)
    p, q = (3 * torch.randn(50, 12)).softmax(-1), (3 * torch.randn(50, 12)).softmax(-1)
    group = torch.randint(0, 4, (50, 12))
    moved = relax(p, q, group, delta)
    assert torch.allclose(moved.sum(-1), torch.ones(50)) and bool((moved >= 0).all())
    assert float((moved - p).abs().sum(-1).max() / 2) <= delta + 1e-6
    for number in range(4):
        assert torch.allclose(torch.where(group == number, moved, 0).sum(-1), torch.where(group == number, p, 0).sum(-1), atol=1e-6)
    if delta == 1.0:  # accepted as often as groups agree: grouped speculative decoding
        mass = [torch.stack([torch.where(group == g, x, 0).sum(-1) for g in range(4)], -1) for x in (p, q)]
        assert torch.allclose(torch.minimum(moved, q).sum(-1), torch.minimum(*mass).sum(-1), atol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 5, 64])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_likeliest_picture_is_the_one_of_decoding_one_by_one(window: int, guidance: float) -> None:
    decoder, grammar = small(2, 16, ((3, 3), (2, 4)))
    plan = Plan(image=Sampling(temperature=0), guidance=guidance, only_picture=True)
    mixed = [*requests(grammar, 2, plan, (3, 3)), *requests(grammar, 2, plan, (2, 4))]
    assert draw_ahead(decoder, grammar, mixed, Speculation(window=window)).ids == run(decoder, grammar, mixed)


def test_a_picture_decoded_ahead_depends_on_nobody_beside_it() -> None:
    decoder, grammar = small(2, 16, ((3, 3), (2, 4)))
    hot = [Plan(image=Sampling(temperature=t), guidance=g, only_picture=True) for t in (0.5, 2.0) for g in (1.0, 3.0)]
    mixed = [one for i, plan in enumerate(hot) for grid in ((3, 3), (2, 4)) for one in requests(grammar, 3, plan, grid, 10 * i)]
    together = draw_ahead(decoder, grammar, mixed, Speculation(window=6)).ids
    assert together == [draw_ahead(decoder, grammar, [one], Speculation(window=6)).ids[0] for one in mixed]


def test_codes_that_follow_from_what_came_before_cost_fewer_passes() -> None:
    decoder, grammar = small(1, 8, ((4, 4),), std=0.05)  # nearly flat: drafts are nearly as good as draws
    asked = requests(grammar, 16, Plan(only_picture=True), (4, 4))
    drawn = draw_ahead(decoder, grammar, asked, Speculation(window=8))
    assert drawn.passes <= 8 and drawn.looked <= 16 * 8 < 16 * 15 / 1.5
    assert draw_ahead(decoder, grammar, asked, Speculation(window=1)).passes == 16


def test_groups_are_look_alikes_of_one_book() -> None:
    visual = tiny_model.visual_tokenizer()
    groups = Speculation(delta=0.1, group=4).groups_of(visual)
    assert groups.shape == (2, 48) and all(1 <= (row == name).sum() <= 4 for row in groups for name in row)
    assert len(groups[0].unique()) < 30
    near = visual.quantizer.neighbours(3)
    assert np.mean([int(groups[0, near[0, code, 0]]) == int(groups[0, code]) for code in range(48)]) > 0.3
