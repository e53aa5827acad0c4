"""What rules refuse is left out, all the rest goes through as it was, and every document is accounted for."""

import fcntl
import io
import json
import multiprocessing
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import shards
from data.curate import texts
from data.curate.filter import Limit, Rules, filter_shards
from data.curate.pictures import PictureRules
from data.curate.rewrite import Judge, Sample, rewrite
from data.curate.texts import TextRules
from data.curate.workers import on_each
from data.document import Document
from data.encode import ProcessFailed
from data.skipped import Skipped


def picture(width: int = 40, height: int = 30, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(out, form)
    return out.getvalue()


BIG, SMALL = picture(), picture(8, 8)
DOCUMENTS = [
    Document("pair", (BIG, "a green wall"), captions=("teal", "a wall that is green"), questions=(("colour?", "teal"), ("rude?", "yes"))),
    Document("small", (SMALL, "a green wall")),
    Document("short", (BIG, "wall")),
    Document("captions", (BIG,), captions=("wall", "a green wall")),
    Document("long", ("first a wall", BIG, "then a dot", SMALL, "dot")),
    Document("chat", (BIG, "what?", "wall"), roles=("user", "user", "assistant")),
    Document("chat2", (SMALL, "what?", "wall"), roles=("user", "user", "assistant")),
    Document("words", ("only some words",)),
    Document("broken", (b"none", "a green wall")),
    Document("narrow", (picture(300, 10), "a green line")),
    Document("gif", (picture(form="GIF"), "a green wall")),
]
RULES = Rules(pictures=PictureRules(min_side=10), texts=TextRules(min_words=2))


def raw(folder: Path, documents: list[Document] = DOCUMENTS, shard_len: int = 4) -> list[Path]:
    return shards.write(documents, folder, "train", shard_len)


def kept(folder: Path) -> dict[str, Document]:
    return {document.key: document for document in shards.read_all(shards.find(folder))}


def test_a_refused_part_drops_the_document_and_causes_are_counted(tmp_path: Path) -> None:
    report = filter_shards(raw(tmp_path / "raw"), tmp_path / "out", RULES)
    found = kept(tmp_path / "out")
    assert list(found) == ["pair", "captions", "chat", "words"]
    assert found["pair"].captions == ("a wall that is green",) and len(found["pair"].questions) == 2
    assert found["captions"].captions == ("a green wall",) and found["chat"] == DOCUMENTS[5] and found["words"] == DOCUMENTS[7]
    assert (report.read, report.kept, report.changed) == (11, 4, 2)
    assert dict(report.dropped.causes) == {"too small": 3, "short text": 1, "does not decode as a picture": 1, "too narrow": 1,
                                           "file format": 1}
    assert report.dropped.first["too small"].startswith("small: ") and dict(report.noted.causes) == {"left out, short text": 2}


def test_or_the_part_alone_where_others_of_its_kind_are_left(tmp_path: Path) -> None:
    filter_shards(raw(tmp_path / "raw"), tmp_path / "out", replace(RULES, on_loss="part"))
    found = kept(tmp_path / "out")
    assert list(found) == ["pair", "captions", "long", "chat", "words"]
    assert found["long"].parts == ("first a wall", BIG, "then a dot")
    members = {name for sample in shards.samples(tmp_path / "out" / "train-000001.tar") for name in sample if sample["__key__"] == "long"}
    assert members == {"__key__", "json", "1.png"}


def test_banned_words_are_matched_whole_and_in_everything_said(tmp_path: Path) -> None:
    (tmp_path / "banned.txt").write_text("RUDE\nsome words\n\nall\n")
    rules = Rules(pictures=PictureRules(formats=("png",)), texts=TextRules(banned=tmp_path / "banned.txt"))
    filter_shards(raw(tmp_path / "raw", DOCUMENTS[:8]), tmp_path / "out", rules)
    found = kept(tmp_path / "out")
    assert "words" not in found and "small" in found and found["pair"].questions == (("colour?", "teal"),)
    with pytest.raises(FileNotFoundError, match="banned"):
        filter_shards(raw(tmp_path / "raw"), tmp_path / "out2", Rules(texts=TextRules(banned=tmp_path / "no.txt")))


def test_what_nothing_changes_goes_through_byte_for_byte(tmp_path: Path) -> None:
    sample: dict[str, Any] = {"__key__": "a", "json": b'{"images": [null, "x.jpg"],  "texts": ["odd  spaces", null]}',
                              "x.jpg": picture(form="JPEG"), "txt": b"nobody names me"}
    shards.write_tar(tmp_path / "raw-0.tar", [sample])
    filter_shards([tmp_path / "raw-0.tar"], tmp_path / "out", Rules())
    assert (tmp_path / "out" / "raw-0.tar").read_bytes() == (tmp_path / "raw-0.tar").read_bytes()


def drop_third(path: Path, stop_at: str = "") -> Judge:
    """Drops every third document; fails at a shard, as a killed process would."""
    def judge(sample: Sample, noted: Skipped) -> Sample:
        if path.name == stop_at:
            raise KeyboardInterrupt
        if int(str(sample["__key__"])) % 3 == 0:
            raise ValueError("third: dropped")
        return sample
    return judge


@given(st.lists(st.booleans(), max_size=23), st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_read_is_kept_and_dropped(tmp_path_factory: pytest.TempPathFactory, wanted: list[bool], shard_len: int) -> None:
    folder = tmp_path_factory.mktemp("set")
    documents = [Document(f"{i}", ("yes indeed" if good else "no",)) for i, good in enumerate(wanted)]
    report = filter_shards(raw(folder / "raw", documents, shard_len), folder / "out", RULES)
    assert report.read == len(wanted) and report.kept == sum(wanted) and report.dropped.causes.total() == len(wanted) - sum(wanted)
    assert [d for path in sorted((folder / "out").glob("*.tar")) for d in shards.read(path)] == \
        [d for d, good in zip(documents, wanted, strict=True) if good]


def test_an_interrupted_run_goes_on_and_ends_like_one_in_one_go(tmp_path: Path) -> None:
    source = raw(tmp_path / "raw", [Document(f"{i}", ("words",)) for i in range(12)])
    whole = rewrite(source, tmp_path / "one", drop_third, {"by": 3})
    with pytest.raises(KeyboardInterrupt):
        rewrite(source, tmp_path / "two", partial(drop_third, stop_at="train-000001.tar"), {"by": 3})
    assert not (tmp_path / "two" / "train-000001.tar").exists()
    first = (tmp_path / "two" / "train-000000.tar").stat().st_mtime_ns
    assert rewrite(source, tmp_path / "two", drop_third, {"by": 3}) == whole
    assert (tmp_path / "two" / "train-000000.tar").stat().st_mtime_ns == first
    files = {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir() if not path.name.endswith("partial")}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}


def test_other_settings_a_changed_shard_and_the_source_itself_are_refused(tmp_path: Path) -> None:
    source = raw(tmp_path / "raw", [Document(f"{i}", ("words",)) for i in range(5)])
    rewrite(source, tmp_path / "out", drop_third, {"by": 3})
    with pytest.raises(ValueError, match=r"was made with by = 3, not 4"):
        rewrite(source, tmp_path / "out", drop_third, {"by": 4})
    with pytest.raises(ValueError, match="go to another folder"):
        rewrite(source, tmp_path / "raw", drop_third, {"by": 3})
    (tmp_path / "out" / "train-000001.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train-000001\.tar is not as it was written"):
        rewrite(source, tmp_path / "out", drop_third, {"by": 3})
    raw(tmp_path / "raw", [Document(f"{i}", ("many more words" * 999,)) for i in range(5)])
    with pytest.raises(ValueError, match=r"had .* when"):
        rewrite(source, tmp_path / "out", drop_third, {"by": 3})


def test_a_truncated_shard_ends_the_run_and_leaves_none(tmp_path: Path) -> None:
    path = raw(tmp_path / "raw")[0]
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="truncated or no tar"):
        filter_shards([path], tmp_path / "out", RULES)
    assert not list((tmp_path / "out").glob("*.tar"))


def die(path: Path) -> int:
    os._exit(9)


def test_a_process_that_is_killed_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(ProcessFailed, match="ended without a word"):
        on_each(die, [tmp_path, tmp_path], processes=2)


def hold(lock: Path) -> int:
    """Holds a lock for as long as the process lives."""
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lock.with_suffix(".held").touch()
        time.sleep(60)
    return 0


@pytest.mark.slow
def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    locks = [tmp_path / "a.lock", tmp_path / "b.lock"]
    for lock in locks:
        lock.touch()
    parent = multiprocessing.get_context("spawn").Process(target=on_each, args=(hold, locks, 2))
    parent.start()
    within = time.monotonic() + 60
    while not all(lock.with_suffix(".held").exists() for lock in locks):
        assert time.monotonic() < within and parent.is_alive()
        time.sleep(0.05)
    parent.kill()
    for lock in locks:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # waits for the process to be gone, at most as long as it sleeps
    assert time.monotonic() < within


# Texts ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "rules", "cause"), [
    ("a b", TextRules(min_words=3), "short text"), ("abc", TextRules(max_chars=2), "long text"),
    ("a1 2 3", TextRules(min_letters=0.5), "few letters"), ("a 1 2", TextRules(min_wordlike=0.8), "few words"),
    ("", TextRules(min_letters=0.5), "few letters"),
    ("the same line again\n" * 20, TextRules(repetition=True), "repetition"),
    ("buy now and win more today my friend " + " ".join(map(str, range(100, 150))) + " buy now and win more today my friend" * 3,
     TextRules(repetition=True), "repetition")])
def test_texts_are_refused_by_form(text: str, rules: TextRules, cause: str) -> None:
    with pytest.raises(ValueError, match=f"^{cause}: "):
        texts.check_form(text, rules)
    texts.check_form("Ein Satz mit 7 Wörtern, größer als nötig", TextRules(
        min_words=3, max_chars=99, min_letters=0.5, min_wordlike=0.8, repetition=True))


@given(st.lists(st.sampled_from(["ab", "cde", "f", "gg"]), max_size=30), st.integers(2, 6))
@settings(max_examples=100, deadline=None)
def test_repeated_phrases_are_those_of_the_obvious_count(words: list[str], n: int) -> None:
    grams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    again = {k for i, gram in enumerate(grams) if gram in grams[:i] for k in range(i, i + n)}
    assert texts.repeated_ngram_chars(words, n) == sum(len(words[k]) for k in again)
    shares = [grams.count(gram) * len("".join(gram)) for gram in grams if grams.count(gram) == max(map(grams.count, grams)) > 1]
    assert texts.top_ngram_chars(words, n) == max(shares, default=0)


def test_a_least_score_needs_scores() -> None:
    with pytest.raises(ValueError, match="a least clip score is asked for, but no scores"):
        filter_shards([], Path(), Rules(clip=Limit(least=0.3)))


def test_the_report_is_written_with_its_settings(tmp_path: Path) -> None:
    filter_shards(raw(tmp_path / "raw"), tmp_path / "out", RULES)
    record = json.loads((tmp_path / "out" / "curation.json").read_text())
    assert record["settings"]["pictures"]["min_side"] == 10
    assert record["read"] == record["kept"] + sum(count for count, _ in record["dropped"].values())
    assert record["shards"] == {"train-000000.tar": 2, "train-000001.tar": 2, "train-000002.tar": 0}
    assert not (tmp_path / "out" / "train-000002.tar").exists()
    assert np.sum(list(record["shards"].values())) == record["kept"]
