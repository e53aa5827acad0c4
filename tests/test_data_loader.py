"""Token shards and rows: nothing lost, order a pure function of the recipe, wrong tokenizers refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import small_world

from data import shards
from data.choices import Choice, choose
from data.config import DataConfig
from data.document import IMAGE, TEXT
from data.index import index_path, read_index
from data.loader import Loader
from data.plan import Place
from data.prefetch import prefetched

CONFIG = DataConfig(shards=Path(), row_len=512, seed=3)


def loader(**changes: object) -> Loader:
    return Loader(dataclasses.replace(CONFIG, **{"shards": small_world().tokens, **changes}))  # type: ignore[arg-type]


def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_world().tokens, tmp_path / "tokens"))


def places(rows: Loader, epoch: int = 0) -> list[Place]:
    """Every document of an epoch."""
    size = rows.plan.orders[0].size
    return [Place(0, e, group, number) for e, group, numbers in rows.plan.orders[0].places(epoch * size, (epoch + 1) * size)
            for number in numbers.tolist()]


def chosen(rows: Loader, place: Place) -> tuple[Choice, int]:
    """What it is in its epoch, and how long."""
    found = choose(rows.plan.table(*place[:3]), np.array([place.number]), place.epoch, rows.config)
    return Choice(int(found.task[0]), int(found.prompt[0]), bool(found.text_first[0])), int(found.length[0])


def test_a_token_document_says_what_the_raw_one_says() -> None:
    world, rows = small_world(), loader()
    raw = {d.key: d for d in shards.read_all(shards.find(world.raw, "train-"))}
    for place in places(rows):
        document = raw[rows.key(place)]
        tokens, = rows.documents([place])
        texts = [world.text.decode(tokens.part(i).tolist()) for i, kind in enumerate(tokens.kinds) if kind != IMAGE]
        said = [p for p in document.parts if isinstance(p, str)] + [*document.captions] + [w for q in document.questions for w in q]
        assert texts == said
        for i, kind in enumerate(tokens.kinds):
            if kind == IMAGE:
                world.vocab.codes(tokens.part(i), *tokens.grids[i])


def test_every_document_is_in_exactly_one_row_of_an_epoch() -> None:
    rows = loader()
    block, _ = rows.plan.row(0)  # of many epochs
    assert len(block.order) == rows.config.block_len and sorted(block.order.tolist()) == list(range(len(block.order)))
    keys = [rows.key(place) for place, *_ in block.members(np.arange(96))]
    assert sorted(keys) == sorted(rows.key(place) for place in places(rows)) and len(set(keys)) == 96


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_the_index_alone_gives_the_length_of_every_sequence(epoch: int) -> None:
    rows = loader()
    for place in places(rows, epoch):
        choice, length = chosen(rows, place)
        assert len(rows.sequence(*rows.documents([place]), place, choice).ids) == length


def test_a_row_is_the_same_whoever_asks_and_in_whatever_order() -> None:
    a, b = loader(), loader()
    later = b.row(40)
    for n in (40, 0, 17):
        x, y = a.row(n), b.row(n) if n != 40 else later
        assert all(np.array_equal(getattr(x, f), getattr(y, f)) for f in ("tokens", "labels", "loss_weight", "cu_seqlens"))
    assert a.plan.hash() == b.plan.hash()


def test_labels_are_the_next_tokens_of_the_same_document() -> None:
    vocab = small_world().vocab
    row = loader().row(1)
    for first, end in zip(row.cu_seqlens[:-1], row.cu_seqlens[1:], strict=True):
        assert np.array_equal(row.labels[first:end - 1], row.tokens[first + 1:end])
        assert row.labels[end - 1] == vocab.pad and row.loss_weight[end - 1] == 0
        assert row.tokens[first] in (vocab.bos, vocab.pad)
    assert row.cu_seqlens[-1] == 512 and row.loss_weight[row.tokens == vocab.pad].sum() == 0


def test_epochs_differ_in_order_and_in_choices() -> None:
    rows = loader()
    first, second = places(rows, 0), places(rows, 1)
    assert [p.number for p in first] != [p.number for p in second]
    assert any(chosen(rows, p) != chosen(rows, p._replace(epoch=1)) for p in first)


def test_the_share_of_drawn_and_of_dropped_follows_the_recipe() -> None:
    vocab, rows = small_world().vocab, loader(draw_ratio=0.5, drop_text=0.3)
    first = [rows.sequence(*rows.documents([p]), p, chosen(rows, p)[0]).ids.tolist() for e in range(12) for p in places(rows, e)]
    drawn = [s for s in first if s[-2] == vocab.eoi]
    blank = [s for s in drawn if s[1] == vocab.boi]
    assert abs(len(drawn) / len(first) - 0.5) < 0.06 and abs(len(blank) / len(drawn) - 0.3) < 0.07


def test_other_settings_are_another_plan() -> None:
    plans = (loader(), loader(seed=4), loader(row_len=600), loader(drop_text=0.2), loader(block_len=64))
    assert len({one.plan.hash() for one in plans}) == 5


def test_shards_of_another_tokenizer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"encoded under fingerprint .* in use have 0123: encode the shards again"):
        Loader(dataclasses.replace(CONFIG, shards=small_world().tokens), "0123")
    Loader(dataclasses.replace(CONFIG, shards=small_world().tokens), small_world().fingerprint)


def test_a_missing_shard_index_or_manifest_is_named(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    config = dataclasses.replace(CONFIG, shards=folder)
    index_path(folder / "train-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-000001.tar has no index"):
        Loader(config).row(0)
    (folder / "train-000000.tar").unlink()
    with pytest.raises(ValueError, match=r"train-000000.tar is missing"):
        Loader(config)
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        Loader(config)


def test_a_document_longer_than_a_row_is_named() -> None:
    with pytest.raises(ValueError, match=r"sample train-\d+ of .* tokens, a row holds 64: raise data.row_len"):
        loader(row_len=64).row(0)


def test_the_index_points_at_the_samples() -> None:
    shard = small_world().tokens / "train-000000.tar"
    index, data = read_index(shard), shard.read_bytes()
    assert len(index.keys) == 32 and index.kinds[0] in (TEXT, IMAGE)
    head = np.frombuffer(data[index.offsets[3]:index.offsets[3] + 4], "<i4")[0]
    assert head == index.first_part[4] - index.first_part[3]


def test_raw_shards_read_online_have_the_ids_of_encoded_ones() -> None:
    world = small_world()
    offline = loader()
    online = loader(shards=world.raw, tokenizer=world.visual_folder, text=world.text_model)
    assert online.vocab == offline.vocab and online.fingerprint == offline.fingerprint
    for number, one in zip((0, 3, 5), prefetched(online, (0, 3, 5), workers=2), strict=True):  # which encode beside each other
        other = offline.row(number)
        assert one.keys == other.keys and np.array_equal(one.tokens, other.tokens) and np.array_equal(one.loss_weight, other.loss_weight)


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 2)), min_size=1, max_size=4))
def test_any_stops_at_any_width_give_the_bytes_of_one_uninterrupted_run(parts: list[tuple[int, int, int]]) -> None:
    """parts: (steps, ranks, micro-batch) until each stop; a step is 8 rows."""
    whole, at, state = loader(block_len=64), 0, None
    for steps, ranks, micro in parts:
        each = [loader(block_len=64) for _ in range(ranks)]
        for rank in each:
            if state is not None:
                rank.resume(json.loads(json.dumps(state)))  # as a checkpoint holds it
        for step in range(steps):
            share = 8 // ranks
            for number, rank in enumerate(each):
                for first in range(at + 8 * step + share * number, at + 8 * step + share * (number + 1), micro):
                    for row in range(first, min(first + micro, at + 8 * step + share * (number + 1))):
                        one, other = rank.row(row), whole.row(row)
                        assert one.tokens.tobytes() == other.tokens.tobytes() and one.loss_weight.tobytes() == other.loss_weight.tobytes()
                        assert one.labels.tobytes() == other.labels.tobytes() and one.cu_seqlens.tobytes() == other.cu_seqlens.tobytes()
        at += 8 * steps
        states = [rank.state(at) for rank in each]
        assert all(one == states[0] for one in states)
        state = states[0]


def test_prompts_padding_and_sizes_are_never_trained_on() -> None:
    vocab, rows = small_world().vocab, loader()
    for number in range(20):
        row = rows.row(number)
        trained = row.labels[row.loss_weight > 0]
        assert not np.isin(trained, [vocab.pad, vocab.bos, *(vocab.grid(*grid) for grid in vocab.grids)]).any()
        for first, end in zip(row.cu_seqlens[:-1], row.cu_seqlens[1:], strict=True):
            ids, weight = row.tokens[first:end], row.loss_weight[first:end]
            if (ids == vocab.boi).sum() == 1 and ids[-2] == vocab.eoi:  # drawn: the prompt is given
                assert weight[:int(np.flatnonzero(ids == vocab.boi)[0]) + 1].sum() == 0


def test_one_tokenizer_without_the_other_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.text None: raw shards need both"):
        loader(tokenizer=small_world().visual_folder)
