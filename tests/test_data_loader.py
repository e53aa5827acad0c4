"""Token shards and rows: nothing lost, order a pure function of the recipe, wrong tokenizers refused."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_world import small_world

from data import shards
from data.document import IMAGE, TEXT
from data.index import index_path, read_index
from data.loader import DataConfig, Loader

CONFIG = DataConfig(shards=Path(), row_len=512, seed=3)


def loader(**changes: object) -> Loader:
    return Loader(dataclasses.replace(CONFIG, shards=small_world().tokens, **changes))  # type: ignore[arg-type]


def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_world().tokens, tmp_path / "tokens"))


def test_a_token_document_says_what_the_raw_one_says() -> None:
    world, rows = small_world(), loader()
    raw = {d.key: d for d in shards.read_all(shards.find(world.raw, "train-"))}
    for number in range(len(rows)):
        document = raw[str(rows.table.keys[number])]
        tokens = rows.document(number)
        texts = [world.text.decode(tokens.part(i).tolist()) for i, kind in enumerate(tokens.kinds) if kind != IMAGE]
        said = [p for p in document.parts if isinstance(p, str)] + [*document.captions] + [w for q in document.questions for w in q]
        assert texts == said
        for i, kind in enumerate(tokens.kinds):
            if kind == IMAGE:
                world.vocab.codes(tokens.part(i), *tokens.grids[i])


def test_every_document_is_in_exactly_one_row_of_an_epoch() -> None:
    rows = loader()
    keys = [key for n in range(len(rows._rows(0))) for key in rows.row(n).keys]
    assert sorted(keys) == sorted(map(str, rows.table.keys)) and len(keys) == 96


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_the_index_alone_gives_the_length_of_every_sequence(epoch: int) -> None:
    rows = loader()
    lengths = rows.table.sequence_lengths(rows.config, epoch)
    assert [len(rows.sequence(i, epoch).ids) for i in range(len(rows))] == lengths.tolist()


def test_a_row_is_the_same_whoever_asks_and_in_whatever_order() -> None:
    a, b = loader(), loader()
    later = b.row(40)
    for n in (40, 0, 17):
        x, y = a.row(n), b.row(n) if n != 40 else later
        assert all(np.array_equal(getattr(x, f), getattr(y, f)) for f in ("tokens", "labels", "loss_weight", "cu_seqlens"))
    assert a.plan_hash == b.plan_hash


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
    assert rows._rows(0)[0].tolist() != rows._rows(1)[0].tolist()
    assert any(len(rows.sequence(i, 0).ids) != len(rows.sequence(i, 1).ids) for i in range(20))


def test_the_share_of_drawn_and_of_dropped_follows_the_recipe() -> None:
    vocab, rows = small_world().vocab, loader(draw_ratio=0.5, drop_text=0.3)
    first = [rows.sequence(i, e).ids.tolist() for e in range(12) for i in range(len(rows)) if rows.table.is_pair[i]]
    drawn = [s for s in first if s[-2] == vocab.eoi]
    blank = [s for s in drawn if s[1] == vocab.boi]
    assert abs(len(drawn) / len(first) - 0.5) < 0.06 and abs(len(blank) / len(drawn) - 0.3) < 0.07


def test_other_settings_are_another_plan() -> None:
    assert len({loader().plan_hash, loader(seed=4).plan_hash, loader(row_len=600).plan_hash, loader(drop_text=0.2).plan_hash}) == 4


def test_shards_of_another_tokenizer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"encoded under fingerprint .* in use have 0123: encode the shards again"):
        Loader(dataclasses.replace(CONFIG, shards=small_world().tokens), "0123")
    Loader(dataclasses.replace(CONFIG, shards=small_world().tokens), small_world().fingerprint)


def test_a_missing_shard_index_or_manifest_is_named(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    config = dataclasses.replace(CONFIG, shards=folder)
    index_path(folder / "train-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-000001.tar has no index"):
        Loader(config)
    (folder / "train-000000.tar").unlink()
    with pytest.raises(ValueError, match=r"train-000000.tar is missing"):
        Loader(config)
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        Loader(config)


def test_a_document_longer_than_a_row_is_named() -> None:
    with pytest.raises(ValueError, match=r"sample train-\d+: .*a row holds 64: raise data.row_len"):
        loader(row_len=64).row(0)


def test_the_index_points_at_the_samples() -> None:
    shard = small_world().tokens / "train-000000.tar"
    index, data = read_index(shard), shard.read_bytes()
    assert len(index.keys) == 32 and index.kinds[0] in (TEXT, IMAGE)
    head = np.frombuffer(data[index.offsets[3]:index.offsets[3] + 4], "<i4")[0]
    assert head == index.first_part[4] - index.first_part[3]
