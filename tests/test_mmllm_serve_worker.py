"""Who comes and goes changes nobody's answer; ids become text and pictures without a loss; the line is fair."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import serving
import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import VOCAB

from mmllm.generate.batching import run
from mmllm.generate.engine import Engine
from mmllm.generate.plan import Plan
from mmllm.generate.request import Reason, Request
from mmllm.generate.sample import Sampling
from mmllm.serve.metrics import Metrics
from mmllm.serve.refusal import Refusal
from mmllm.serve.settings import Settings
from mmllm.serve.stops import Stops
from mmllm.serve.transcript import End, Event, Line, Transcript, Words
from mmllm.serve.worker import Worker

GRID = (3, 3)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return serving.drawer(tmp_path_factory.mktemp("worker") / "model")


def request(engine: Engine, rng: random.Random) -> Request:
    """Any request: text, text and pictures, or a picture alone; guided or not."""
    prompt = [VOCAB.bos, *engine.folder.text.encode(" ".join(rng.choices(tiny_model.WORDS, k=rng.randint(1, 30))))]
    only = rng.random() < 0.4
    plan = Plan(text=Sampling(temperature=rng.choice([0.0, 1.0])), image=Sampling(temperature=1.0, top_k=rng.choice([0, 9])),
                guidance=rng.choice([1.0, 1.0, 2.5]), max_text=rng.randint(1, 12), max_pictures=0 if only else rng.randint(0, 2),
                only_picture=only)
    return Request(prompt=[*prompt, VOCAB.boi, VOCAB.grid(3, 3)] if only else prompt, plan=plan, key=rng.getrandbits(64))


@pytest.mark.parametrize("seed", range(3))
def test_everybody_hears_what_they_would_hear_alone_while_others_come_and_hang_up(engine: Engine, seed: int) -> None:
    rng = random.Random(seed)
    asked = [request(engine, rng) for _ in range(24)]
    leaves = [rng.random() < 0.25 for _ in asked]
    heard: list[list[Event]] = [[] for _ in asked]

    async def client(worker: Worker, at: int) -> None:
        await asyncio.sleep(rng.random() * 0.2)
        with worker.admit(1, str(at)) as ticket:
            ticket.start([asked[at]], GRID if asked[at].plan.only_picture else None)
            while not (heard[at] and (leaves[at] or isinstance(heard[at][-1], End))):
                heard[at].append((await ticket.next())[1])

    async def everybody() -> None:
        worker = Worker(engine, Settings(rows=5), Metrics())
        await asyncio.gather(*(client(worker, at) for at in range(len(asked))))
        worker.stop(1.0)

    asyncio.run(everybody())
    for one, said, left in zip(asked, heard, leaves, strict=True):
        ids = run(engine.decoder, engine.grammar, [one])[0]
        assert told(engine, ids, one)[:len(said) if left else None] == told_events(said)


def told(engine: Engine, ids: list[int], one: Request) -> list[object]:
    """What is heard of a row that was decoded alone."""
    transcript = Transcript(VOCAB, engine.folder.text, GRID if one.plan.only_picture else None)
    stopped = one.plan.only_picture or ids[-1] in (VOCAB.eos, VOCAB.user)
    reason: list[Reason] = ["" for _ in ids[:-1]] + ["stop" if stopped else "length"]
    return told_events([event for token, why in zip(ids, reason, strict=True) for event in transcript.take(token, why)])


def told_events(events: list[Event]) -> list[object]:
    """Arrays as lists, to be compared."""
    return [(event.picture, event.number, event.codes.tolist()) if isinstance(event, Line) else event for event in events]


# Transcript -------------------------------------------------------------------------------------------------------

def test_a_transcript_tells_text_and_lines_as_they_are_certain() -> None:
    text = tiny_model.text_tokenizer()
    codes = np.random.default_rng(0).integers(0, 48, (2, 3, 3)).astype(np.int32)
    first, second = text.encode("a red ✓ star"), text.encode("two of é")
    ids = [*first, VOCAB.boi, VOCAB.grid(3, 3), *VOCAB.image_ids(codes).tolist(), VOCAB.eoi, *second, VOCAB.user]
    transcript = Transcript(VOCAB, text)
    told = [event for place, token in enumerate(ids) for event in transcript.take(token, "stop" if place == len(ids) - 1 else "")]
    kinds = [type(event) for event in told]
    lines = [event for event in told if isinstance(event, Line)]
    cut = kinds.index(Line)
    assert "".join(e.text for e in told[:cut] if isinstance(e, Words)) == "a red ✓ star"
    assert "".join(e.text for e in told[cut:] if isinstance(e, Words)) == "two of é"
    assert not any("�" in event.text for event in told if isinstance(event, Words))
    assert [line.number for line in lines] == [0, 1, 2] and (lines[-1].codes == codes).all()
    assert (lines[0].codes == codes[:, :1]).all()  # what is to come repeats the newest line
    assert told[-1] == End("stop", len(first) + len(second) + 1, 21)


def test_half_a_character_at_the_end_is_told_as_what_it_is() -> None:
    text = tiny_model.text_tokenizer()
    transcript, ids = Transcript(VOCAB, text), text.encode("✓")[:-1]
    told = [event for place, token in enumerate(ids) for event in transcript.take(token, "length" if place == len(ids) - 1 else "")]
    assert [type(event) for event in told] == [Words, End] and isinstance(told[-1], End) and told[-1].reason == "length"


@settings(max_examples=200, deadline=None)
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=4), st.integers(1, 5))
def test_text_in_pieces_ends_at_the_first_stop_word_as_text_in_one_does(text: str, words: list[str], size: int) -> None:
    stops = Stops(words)
    told = "".join(stops.take(text[at:at + size]) for at in range(0, len(text), size)) + stops.take("", last=True)
    met = [end for end in range(len(text) + 1) for word in words if text[:end].endswith(word)]  # where a word is whole
    expected = min((text.find(word) for word in words if word in text), default=len(text))
    assert told == text[:expected] or (met and text[:min(met)].startswith(told))
    assert not any(word in told for word in words)
    assert stops.met == bool(met)


# The line ---------------------------------------------------------------------------------------------------------

def long(engine: Engine, key: int = 0) -> Request:
    return Request(prompt=[VOCAB.bos, *engine.folder.text.encode("a red star"), VOCAB.boi, VOCAB.grid(3, 3)], key=key,
               plan=Plan(only_picture=True))


def test_who_asks_for_much_waits_behind_who_asks_for_little(engine: Engine) -> None:
    async def finished() -> list[str]:
        worker, order = Worker(engine, Settings(rows=2), Metrics()), list[str]()

        async def client(name: str, rows: int) -> None:
            with worker.admit(rows, name) as ticket:
                ticket.start([long(engine, key) for key in range(rows)], (3, 3))
                ended = 0
                while ended < rows:
                    _, event = await ticket.next()
                    if isinstance(event, End):
                        ended += 1
                        order.append(name)

        await asyncio.gather(client("greedy", 12), client("modest", 2))
        worker.stop(1.0)
        return order

    order = asyncio.run(finished())
    assert Counter(order) == {"greedy": 12, "modest": 2}
    assert max(place for place, name in enumerate(order) if name == "modest") < 7


def test_a_full_line_refuses_and_says_when_to_come_again(engine: Engine) -> None:
    async def refused() -> Refusal:
        worker = Worker(engine, Settings(queue=8), Metrics())
        with worker.admit(8, "a"), pytest.raises(Refusal) as caught:
            worker.admit(1, "b")
        worker.admit(8, "c")  # the place is free again
        worker.stop(0.0)
        return caught.value

    error = asyncio.run(refused())
    assert error.status == 429 and error.retry_s is not None and 1 <= error.retry_s <= 60


def test_who_leaves_frees_the_place_in_the_batch(engine: Engine) -> None:
    async def left() -> None:
        roomy = replace(engine.folder, config={**engine.folder.config, "max_position_embeddings": 200_000})
        worker = Worker(replace(engine, folder=roomy), Settings(rows=1), Metrics())
        endless = Request(prompt=[VOCAB.bos], plan=Plan(text=Sampling(temperature=1.0, top_k=2), max_text=100_000), key=1)
        with worker.admit(1, "a") as ticket:
            ticket.start([endless])
            await ticket.next()
        with worker.admit(1, "b") as ticket:
            ticket.start([long(engine)], (3, 3))
            while not isinstance((await ticket.next())[1], End):
                pass
        worker.stop(1.0)
        assert not worker.alive

    start = time.monotonic()
    asyncio.run(left())
    assert time.monotonic() - start < 5


def test_a_failed_step_ends_those_in_it_and_serves_the_next(engine: Engine) -> None:
    async def both() -> tuple[Refusal, End]:
        worker = Worker(engine, Settings(), Metrics())
        with worker.admit(1, "a") as ticket, pytest.raises(Refusal) as caught:
            ticket.start([Request(prompt=[VOCAB.size + 7], plan=Plan(), key=0)])  # no such id: the embedding fails
            await ticket.next()
        with worker.admit(1, "b") as ticket:
            ticket.start([long(engine)], (3, 3))
            while not isinstance((event := await ticket.next())[1], End):
                pass
        worker.stop(1.0)
        assert isinstance(event[1], End)
        return caught.value, event[1]

    error, end = asyncio.run(both())
    assert error.status == 500 and end.image_tokens == 18


def test_room_that_a_long_row_took_is_given_back_when_nobody_asks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmllm.generate.batching.IDLE_BYTES", 1 << 10)
    held = list[int]()

    async def once() -> None:
        worker = Worker(engine, Settings(rows=1), Metrics())
        with worker.admit(8, "a") as ticket:  # one behind the other
            ticket.start([long(engine, key) for key in range(8)], GRID)
            await ticket.next()
            held.append(worker.held_bytes)
            ended = 0
            while ended < 8:
                ended += isinstance((await ticket.next())[1], End)
        end = time.monotonic() + 5
        while worker.held_bytes and time.monotonic() < end:
            await asyncio.sleep(0.01)
        held.append(worker.held_bytes)
        worker.stop(1.0)

    asyncio.run(once())
    assert held[0] > 1 << 10 and held[1] == 0
