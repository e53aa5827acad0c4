"""Requests that join and leave: each gets what it would get alone, in the room there is, and is read once."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_model
import torch
from test_mmllm_generate import eager

from data import chat
from mmllm.generate.batching import AHEAD, Batch, decode, run
from mmllm.generate.cache import SHORTEST
from mmllm.generate.engine import Engine, Plan
from mmllm.generate.grammar import compile_grammar
from mmllm.generate.int8 import Int8, rows, scores, times, to_int8
from mmllm.generate.request import Event, Request
from mmllm.generate.sample import Sampling

VOCAB = tiny_model.vocabulary()
GRAMMAR = compile_grammar(VOCAB, (VOCAB.eos, VOCAB.user))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return eager(Engine.load(tiny_model.folder(tmp_path_factory.mktemp("batching") / "tuned", chat=True), "cpu"))


def any_request(engine: Engine, rng: random.Random) -> Request:
    """Text, text and pictures, or a picture of either size; guided from nothing or from words, or not."""
    encode = engine.folder.text.encode
    prompt = [VOCAB.bos, *encode(" ".join(rng.choices(tiny_model.WORDS, k=rng.randint(1, 60))))]
    only = rng.random() < 0.4
    image = Sampling(temperature=rng.choice([0.5, 2.0]), top_k=rng.choice([0, 9]))
    plan = Plan(text=Sampling(temperature=rng.choice([0.0, 0.5])), image=image,
                guidance=rng.choice([1.0, 1.0, 2.5]), max_text=rng.randint(1, 20), max_pictures=rng.randint(0, 2), only_picture=only)
    blank = rng.choice([[], [VOCAB.bos, *encode("a blue square")]])
    return Request(prompt=[*prompt, VOCAB.boi, VOCAB.grid(*rng.choice(VOCAB.grids))] if only else prompt, plan=plan, blank=blank,
                   key=rng.getrandbits(64))


def finished(batch: Batch, events: list[Event]) -> list[Event]:
    while not batch.idle:
        events += batch.step()
    return events


def said(events: list[Event], ticket: int) -> list[int]:
    return [event.id for event in events if event.ticket == ticket]


@pytest.mark.parametrize("seed", range(4))
def test_a_request_among_others_that_come_and_go_gets_what_it_gets_alone(engine: Engine, seed: int) -> None:
    rng = random.Random(seed)
    asked, events, cancelled = [any_request(engine, rng) for _ in range(24)], list[Event](), set[int]()
    batch, tickets = Batch(engine.decoder, GRAMMAR, 7, 400, engine.prefixes), dict[int, Request]()
    while asked or not batch.idle:
        while asked and rng.random() < 0.5:
            one = asked.pop()
            tickets[batch.submit(one)] = one
        if rng.random() < 0.05 and batch.running:
            cancelled.add(rng.choice(batch.running).ticket)
            batch.cancel(max(cancelled))
        events += batch.step()
        assert len(batch.rows) <= 7
    pictures = 0
    for ticket, one in tickets.items():
        alone = run(engine.decoder, GRAMMAR, [one])[0]
        got = said(events, ticket)
        assert got == alone[:len(got)] and (len(got) == len(alone) or ticket in cancelled)
        ends = [event for event in events if event.ticket == ticket and event.last]
        assert len(ends) == (len(got) == len(alone)) or ticket in cancelled
        pictures += got.count(VOCAB.boi)
    assert pictures > 0


def test_pictures_of_different_sizes_are_drawn_together_and_whole(engine: Engine) -> None:
    plan = Plan(image=Sampling(temperature=3.0), guidance=1.5, only_picture=True)
    asked = [one for grid in VOCAB.grids for one in engine.draw_requests("a red star", 3, plan, 1, grid)]
    codes = [engine.picture_of(one, ids) for one, ids in zip(asked, engine.decode(asked), strict=True)]
    assert [x.shape for x in codes] == [(2, 3, 3)] * 3 + [(2, 2, 3)] * 3


def test_a_prompt_that_several_share_is_read_once(engine: Engine) -> None:
    batch = engine.batching(rows=16)
    asked = engine.draw_requests("a red star", 8, Plan(guidance=2.0, only_picture=True))
    for one in asked:
        batch.submit(one)
    batch.step()
    assert len(batch.rows) == 16 and batch.read == len(asked[0].prompt) + 3  # what is asked for, and nothing


def test_what_a_conversation_said_before_is_not_read_again(engine: Engine) -> None:
    fresh = replace(engine)
    turns: list[chat.Turn] = [{"role": "user", "content": "how many red squares do you see? " * 4}]
    plan = Plan(max_text=12, max_pictures=1)
    for seed in range(3):
        before = fresh.prefixes.reused
        reply = fresh.chat(turns, plan, seed)
        assert str(reply) == str(replace(engine).chat(turns, plan, seed))
        assert seed == 0 or fresh.prefixes.reused - before > SHORTEST
        turns = [*turns, {"role": "assistant", "content": reply}, {"role": "user", "content": "and what is in the background?"}]
    fresh.prefixes.max_bytes = 1
    fresh.chat(turns, plan)
    assert not fresh.prefixes.kept


def test_what_guidance_leads_away_from_counts_only_where_a_picture_is(engine: Engine) -> None:
    drawn = [engine.draw(["a red star"], guidance=3.0, sampling=Sampling(temperature=0), negative=words) for words in ("", "a blue square")]
    assert not (drawn[0] == drawn[1]).all()
    same = engine.draw(["a red star"], guidance=3.0, sampling=Sampling(temperature=0), negative="a red star")
    assert (same == engine.draw(["a red star"], sampling=Sampling(temperature=0))).all()  # what both rows see cancels
    plan = Plan(guidance=3.0, negative="a blue square", only_picture=True, image=Sampling(temperature=0))
    asked = engine.draw_requests("a red star", 1, plan)
    inside = Request(prompt=asked[0].prompt[:-2], key=0, blank=asked[0].blank,
                     plan=replace(plan, only_picture=False, max_pictures=1, max_text=30))
    ids = run(engine.decoder, GRAMMAR, [inside])[0]
    at = ids.index(VOCAB.boi)
    again = Request(prompt=[*inside.prompt, *ids[:at + 2]], key=0, blank=inside.blank, plan=asked[0].plan)
    assert run(engine.decoder, GRAMMAR, [again])[0] == ids[at + 2:ids.index(VOCAB.eoi)]


def test_a_spent_time_ends_text_and_cuts_no_picture(engine: Engine) -> None:
    plan = Plan(image=Sampling(temperature=1.0), max_text=500, max_pictures=3, max_s=0.0)
    prompts = [[VOCAB.bos, *engine.folder.text.encode("how")], [VOCAB.bos, VOCAB.boi, VOCAB.grid(3, 3)]]
    text, picture = decode(engine.decoder, GRAMMAR, prompts, [0, 0], plan)
    assert len(text) == 1 and text[0] != VOCAB.boi
    assert len(picture) == 19 and picture[-1] == VOCAB.eoi


def test_room_grows_with_a_text_that_is_longer_than_planned(engine: Engine) -> None:
    head = torch.zeros(VOCAB.size, engine.folder.config["hidden_size"])  # of equals it takes the first: it never ends
    endless = replace(engine.decoder, head=head)
    assert len(decode(endless, GRAMMAR, [[VOCAB.bos, 7]], [0], Plan(max_text=AHEAD + 300))[0]) == AHEAD + 300
    batch = Batch(endless, GRAMMAR, 4, 10_000)
    batch.submit(Request(prompt=[VOCAB.bos], key=0, plan=Plan(max_text=9000)))
    batch.step()
    assert batch.cache.columns <= AHEAD + 2 and batch.cache.rows == 1
    with pytest.raises(ValueError, match="a row holds 10,000"):
        batch.submit(Request(prompt=[VOCAB.bos], key=0, plan=Plan(max_text=10_000)))


def test_a_long_prompt_at_once_equals_one_in_pieces(engine: Engine) -> None:
    """Attention over many new tokens is another function than over a few."""
    ids = np.random.default_rng(0).integers(0, VOCAB.text_size, 150).tolist()
    whole, _ = engine.decoder.start([ids], 0)
    cache = engine.decoder.room(2, 150)
    for first in range(0, 150, 30):
        pieces = engine.decoder.prefill([ids[first:first + 30]], cache, 1)
    assert torch.allclose(whole, pieces, atol=1e-5)  # pyright: ignore[reportPossiblyUnboundVariable]
    uneven, _ = engine.decoder.start([ids[:70], ids, ids[:3]], 0)
    assert torch.allclose(uneven[1:2], whole, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"guidance": float("nan")}, {"max_text": -1}, {"max_s": float("nan")}])
def test_a_plan_refuses_what_is_no_number(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be a number"):
        Plan(**wrong)  # type: ignore[arg-type]


# 8 bits -----------------------------------------------------------------------------------------------------------

def test_int8_weights_are_within_half_a_step_and_a_quarter_of_the_size() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 512)
    small = to_int8(weight, 1)
    assert bool(((rows(small, torch.arange(64)) - weight).abs() <= small.scale / 2 * 1.001).all())
    x = torch.randn(3, 512)
    assert torch.allclose(scores(x, small, 5, 9), x @ (small.values * small.scale)[5:9].T, atol=1e-4)
    matrix = to_int8(weight.T)
    assert torch.equal(matrix.values, small.values.T)
    assert torch.allclose(times(x, matrix, torch.ones(3, 64)), 1 + x @ (small.values * small.scale).T, atol=1e-4)
    assert small.nbytes < 0.26 * weight.nbytes


def test_an_int8_engine_nearly_says_what_the_whole_one_does(tmp_path: Path) -> None:
    path = tiny_model.folder(tmp_path / "m", hidden_size=64, ffn_hidden_size=128)
    whole, small = Engine.load(path, "cpu"), Engine.load(path, "cpu", int8=True)
    assert isinstance(small.decoder.layers[0].qkv, Int8) and small.decoder.nbytes < 0.3 * whole.decoder.nbytes
    prompt = [[VOCAB.bos, *whole.folder.text.encode("a red star")]]
    a, b = (engine.decoder.logits(engine.decoder.start(prompt, 0)[0]) for engine in (whole, small))
    assert float((a - b).norm() / a.norm()) < 0.05
    assert small.draw(["a red star"], guidance=2.0).shape == (1, 1, 2, 3, 3)


def test_bfloat16_draws_whole_pictures(tmp_path: Path) -> None:
    engine = Engine.load(tiny_model.folder(tmp_path / "m"), "cpu", torch.bfloat16)
    assert engine.draw(["a red star"], n=2, guidance=2.0).shape == (1, 2, 2, 3, 3)


# Many -------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_ten_thousand_pictures_however_drawn_are_legal_and_none_is_repaired(engine: Engine) -> None:
    rng, drawn = random.Random(0), 0
    while drawn < 10_000:
        asked = list[Request]()
        for _ in range(rng.choice([1, 3, 40, 400])):
            how = Sampling(temperature=rng.choice([0.0, 1e-6, 0.3, 1.0, 10.0, 1e6]), top_k=rng.choice([0, 1, 2, 40, 10**6]),
                           top_p=rng.choice([1.0, 0.9, 1e-6]))
            plan = Plan(image=how, guidance=rng.choice([1.0, 1.0, 0.0, 3.0, -50.0, 1e4]), only_picture=True)
            words = " ".join(rng.choices(tiny_model.WORDS, k=rng.randint(1, 8)))
            asked += engine.draw_requests(words, 1, plan, rng.getrandbits(32), rng.choice(VOCAB.grids))
        for one, ids in zip(asked, replace(engine, batch=rng.choice([1, 7, 256])).decode(asked), strict=True):
            codes = engine.picture_of(one, ids)  # refuses an illegal one
            assert codes.shape[1:] == VOCAB.grids[one.prompt[-1] - VOCAB.grid(*VOCAB.grids[0])]
        drawn += len(asked)
