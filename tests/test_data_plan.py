"""The plan: every document once an epoch, shares as the mixture says, the same rows after any stop, and few tokens of padding."""

import dataclasses
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtri

from data.chance import uniform
from data.choices import Table
from data.config import DataConfig
from data.document import IMAGE, ROLE, TEXT
from data.index import Index, hashed
from data.mixture import Source, Stage
from data.order import Group, Order
from data.plan import Listed, Plan
from data.skipped import Skipped

ROW = 256


def indexes(name: str, counts: list[int], length: Callable[[np.ndarray], np.ndarray] = lambda u: 10 + (60 * u).astype(int)) -> list[Index]:
    """Indexes of shards of one text a document, as long as `length` makes of numbers in [0, 1)."""
    out = list[Index]()
    for shard, count in enumerate(counts):
        keys = [f"{name}{shard}-{i}".encode() for i in range(count)]
        lengths = length(uniform(0, hashed(keys), 0, 9)).astype(np.int32) if count else np.zeros(0, np.int32)
        starts = np.arange(count + 1, dtype=np.int64)
        out.append(Index(np.array(keys, np.bytes_), hashed(keys), starts[:-1], np.int64(20) + 4 * lengths.astype(np.int64), starts,
                         np.full(count, TEXT, np.int8), lengths, "f", "c", Skipped()))
    return out


def listed(shards: list[Index]) -> Listed:
    def read(group: Group) -> Table:
        return Table.join([shards[number] for number in group.shards])
    return Listed(np.array([len(s.keys) for s in shards]), sum(int(s.lengths.sum()) for s in shards), [s.keys.tobytes().hex()[:16] + str(i)
                                                                                                     for i, s in enumerate(shards)], read)


def plan(sources: dict[str, list[Index]], stages: tuple[Stage, ...] = (), first_row: Callable[[int], int] = lambda step: step,
         **changes: object) -> Plan:
    stages = stages or (Stage(sources=tuple(Source(shards=name) for name in sources)),)
    config = dataclasses.replace(DataConfig(stages=stages, row_len=ROW, block_len=64), **changes)  # type: ignore[arg-type]
    return Plan(config, {f"{name}/train*": listed(shards) for name, shards in sources.items()}, first_row)


def keys_of(plan: Plan, row: int) -> list[tuple[str, int, int, int]]:
    """(key, epoch, first id, end) of each document of a row."""
    block, members = plan.row(row)
    return [(plan.table(*place[:3]).keys[place.number].decode(), place.epoch, begin, end)
            for place, _, begin, end in block.members(members)]


# What is in the rows ----------------------------------------------------------------------------------------------

@settings(max_examples=40)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=9).filter(any), st.integers(1, 4), st.integers(1, 90), st.integers(0, 3))
def test_every_document_is_in_exactly_one_row_of_each_epoch(counts: list[int], mixed: int, block_len: int, seed: int) -> None:
    shards, size = indexes("a", counts), sum(counts)
    one = plan({"a": shards}, shuffle_shards=mixed, block_len=block_len, seed=seed)
    seen, row = Counter[tuple[str, int]](), 0
    while sum(seen.values()) < 3 * size + block_len:
        placed = keys_of(one, row)
        assert 0 < sum(end - begin for *_, begin, end in placed) <= ROW
        seen.update((key, epoch) for key, epoch, *_ in placed)
        row += 1
    assert set(seen.values()) == {1}
    assert {(key.decode(), epoch) for shard in shards for key in shard.keys for epoch in range(3)} <= set(seen)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any), st.integers(1, 9), st.integers(0, 5))
def test_an_order_is_a_shuffle_of_every_epoch(counts: list[int], mixed: int, epoch: int) -> None:
    order = Order(np.array(counts), mixed, 7)
    found = [(order.group(e, group).shards, number) for e, group, numbers in order.places(epoch * order.size, (epoch + 1) * order.size)
             for number in numbers.tolist()]
    assert len(set(found)) == len(found) == order.size
    some = order.places(epoch * order.size + order.size // 3, epoch * order.size + order.size // 3 + 1)
    assert [(order.group(e, g).shards, n) for e, g, numbers in some for n in numbers.tolist()] == [found[order.size // 3]]


def test_a_reader_has_few_shards_open() -> None:
    one = plan({"a": indexes("a", [20] * 40)}, shuffle_shards=4, block_len=20)
    groups = [block.group[0] for block in (one.row(row)[0] for row in range(60)) for _ in block.group]
    assert [g for i, g in enumerate(groups) if not i or g != groups[i - 1]] == sorted(set(groups))  # one after the other
    assert one.table.cache_info().misses == len(set(groups))


def test_packing_wastes_less_than_half_a_percent_on_a_lognormal_mixture() -> None:
    lognormal = lambda u: np.clip(np.exp(6.2 + ndtri(u)), 8, 8000)  # noqa: E731
    one = plan({"a": indexes("a", [5000] * 4, lognormal)}, row_len=8192, block_len=8192, window=4096)
    used = [sum(end - begin for *_, begin, end in keys_of(one, row)) for row in range(one.block(0).rows)]
    assert np.mean(used) / 8192 >= 0.995


# Longer than a row ------------------------------------------------------------------------------------------------

def test_documents_longer_than_a_row_are_refused_dropped_split_or_truncated_and_counted() -> None:
    shards = {"a": indexes("a", [50], lambda u: np.where(u < 0.2, 900, 40))}
    long = {key.decode() for key, n in zip(shards["a"][0].keys, shards["a"][0].lengths, strict=True) if n == 900}
    assert 3 < len(long) < 20
    with pytest.raises(ValueError, match=r"sample a0-\d+ of a/train\* has 902 tokens, a row holds 256: .*data.long_documents"):
        plan(shards).row(0)
    for rule, pieces in (("drop", []), ("truncate", [(0, 256)]), ("split", [(0, 256), (256, 512), (512, 768), (768, 902)])):
        one = plan(shards, long_documents=rule, block_len=50)
        block, _ = one.row(0)
        found = [piece for row in range(block.rows) for piece in keys_of(one, row)]
        assert {key for key, *_ in found} == {k.decode() for k in shards["a"][0].keys} - (long if rule == "drop" else set())
        for key in long:
            assert sorted(piece[2:] for piece in found if piece[0] == key) == pieces
        assert (block.left_out, block.cut) == ((len(long), 0) if rule == "drop" else (0, len(long)))
        one.row(block.rows)
        assert one.state(block.rows + 1)["cursor"]["left_out"] == block.left_out


def test_a_source_whose_documents_never_fit_is_an_error_and_no_endless_search() -> None:
    with pytest.raises(ValueError, match="no document fits in a row of 256 tokens"):
        plan({"a": indexes("a", [50], lambda u: np.full(len(u), 900))}, long_documents="drop").row(0)


# Mixtures ---------------------------------------------------------------------------------------------------------

def taken(plan: Plan, rows: int) -> dict[str, tuple[int, int]]:
    """(documents, tokens) of each source in the first rows."""
    out = dict.fromkeys(plan.names, (0, 0))
    for row in range(rows):
        block, members = plan.row(row)
        for place, _, begin, end in block.members(members):
            name = plan.names[place.source]
            out[name] = out[name][0] + 1, out[name][1] + end - begin
    return out


SHORT_AND_LONG = {"short": indexes("s", [300, 200], lambda u: 10 + 10 * u), "long": indexes("l", [100], lambda u: 90 + 20 * u)}


@pytest.mark.parametrize(("weigh", "wanted"), [("samples", 3.0), ("tokens", 3.0), ("epochs", 3.0 * 500 / 100)])
def test_weights_are_shares_of_samples_of_tokens_or_of_passes(weigh: str, wanted: float) -> None:
    stage = Stage(sources=(Source(shards="short", weight=0.75), Source(shards="long", weight=0.25)), weigh=weigh)  # type: ignore[arg-type]
    found = taken(one := plan(SHORT_AND_LONG, (stage,)), 400)
    ratio = [found["short/train*"][i] / found["long/train*"][i] for i in (0, 1)]
    assert ratio[weigh == "tokens"] == pytest.approx(wanted, rel=0.15 if weigh == "tokens" else 0.02)
    first, _ = one.row(0)
    assert abs(np.mean(first.source == 0) - np.mean([b.source == 0 for b in (one.row(n)[0] for n in range(300, 301))])) < 0.03


@settings(max_examples=25)
@given(st.lists(st.floats(0.001, 9), min_size=2, max_size=4), st.integers(1, 50))
def test_shares_hold_to_the_document_over_any_stretch(weights: list[float], block_len: int) -> None:
    sources = {f"s{i}": indexes(f"s{i}", [7 + i]) for i in range(len(weights))}
    stage = Stage(sources=tuple(Source(shards=name, weight=w) for name, w in zip(sources, weights, strict=True)), weigh="samples")
    one, total = plan(sources, (stage,), block_len=block_len), 0
    for row in range(60):
        cursor = one.state(row + 1)["cursor"]
        total = sum(cursor["taken"])
        for n, weight in zip(cursor["taken"], weights, strict=True):
            assert abs(n - total * weight / sum(weights)) <= len(weights) / 2 + 0.51


def test_a_source_is_used_up_after_its_epochs_and_the_mixture_ends_when_all_are() -> None:
    stage = Stage(sources=(Source(shards="short", max_epochs=1.5), Source(shards="long", max_epochs=2)), weigh="samples")
    one, seen = plan(SHORT_AND_LONG, (stage,)), Counter[str]()
    with pytest.raises(ValueError, match=r"there is no row \d+: the mixture ends after \d+ rows.*max_epochs"):
        for row in range(10_000):
            seen.update(key for key, *_ in keys_of(one, row))
    assert sum(n for key, n in seen.items() if key[0] == "s") == 750 and sum(n for key, n in seen.items() if key[0] == "l") == 200
    assert {n for key, n in seen.items() if key[0] == "l"} == {2}
    one.state(row)  # a run that ends here saves


def test_a_mixture_that_is_none_is_refused_with_every_reason() -> None:
    bad = (Stage(sources=(Source(shards="short"), Source(shards="short")), from_step=3), Stage(sources=(), from_step=2))
    with pytest.raises(ValueError) as refused:
        plan(SHORT_AND_LONG, bad)
    for words in ("first stage begins at step 3", "lists short/train* twice", "data.stages[1] has no source", "not behind the 3"):
        assert words in str(refused.value)


# Stop and go on ---------------------------------------------------------------------------------------------------

TWO = (Stage(sources=(Source(shards="short"), Source(shards="long"))), Stage(sources=(Source(shards="long"),), from_step=20))


@settings(max_examples=20)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.booleans())
def test_any_stops_leave_the_rows_as_they_are(steps: list[int], staged: bool) -> None:
    make = lambda: plan(SHORT_AND_LONG, TWO if staged else (), first_row=lambda step: 2 * step)  # noqa: E731
    whole, now, at = make(), make(), 0
    for step in steps:
        for row in range(at, at + step):
            assert keys_of(now, row) == keys_of(whole, row)
        at += step
        state, now = now.state(at), make()
        now.resume(state)
    assert keys_of(now, at + 70) == keys_of(whole, at + 70)
    assert keys_of(now, 0) == keys_of(whole, 0)  # before where it went on


def test_a_stage_may_be_added_to_a_run_that_has_not_come_to_it_and_not_changed_behind_it() -> None:
    steps = lambda step: 2 * step  # noqa: E731
    before = plan(SHORT_AND_LONG, TWO[:1], steps)
    early, late = before.state(40), before.state(41)
    after = plan(SHORT_AND_LONG, TWO, steps)
    after.resume(early)
    assert [keys_of(after, row) for row in range(40)] == [keys_of(before, row) for row in range(40)]
    with pytest.raises(ValueError, match=r"data order .*Add a stage to data.stages with the step"):
        after.resume(late)
    with pytest.raises(ValueError, match="data order"):
        plan(SHORT_AND_LONG, (dataclasses.replace(TWO[0], weigh="samples"),), steps).resume(early)
    with pytest.raises(ValueError, match="data order"):
        plan({**SHORT_AND_LONG, "long": indexes("m", [100])}, TWO[:1], steps).resume(early)


def test_the_new_mixture_holds_from_the_first_block_behind_its_step() -> None:
    one = plan(SHORT_AND_LONG, TWO, lambda step: 2 * step)
    borders = sorted({one.row(row)[0].first_row for row in range(120)})
    for row in range(120):
        block, _ = one.row(row)
        assert (block.source == 1).all() == (block.first_row >= 40)
    assert any(first >= 40 for first in borders) and any(0 < first < 40 for first in borders)


def test_a_plan_reads_pictures_and_roles_from_kinds() -> None:
    index = dataclasses.replace(indexes("a", [2])[0], first_part=np.array([0, 2, 5]), kinds=np.array(
        [IMAGE, TEXT, TEXT + 2 * ROLE, IMAGE + 2 * ROLE, TEXT + 3 * ROLE], np.int8), lengths=np.array([4, 3, 2, 4, 1], np.int32))
    table = Table.join([index])
    assert table.is_pair.tolist() == [True, False] and table.turns.tolist() == [0, 2] and table.pictures.tolist() == [7, 7]
