"""Converting keeps every good document, counts every bad one, and goes on where it was interrupted, to the same bytes."""

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import data.convert as convert_module
from data import shards
from data.convert import Summary, convert
from data.convert_piece import Conversion, convert_piece
from data.document import Document, Role
from data.formats import piece as piece_module
from data.formats.keep import Keep
from data.formats.reading import Reading
from data.images import Limits, to_png


def png(seed: int = 0, size: int = 8) -> bytes:
    return to_png(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


def tars_of_pairs(folder: Path, tars: int = 4, each: int = 12) -> Path:
    """img2dataset's layout; keys begin anew in each tar."""
    folder.mkdir()
    for number in range(tars):
        shards.write_tar(folder / f"{number:05d}.tar", [
            {"__key__": f"{i:09d}", "png": png(number * each + i), "txt": f"caption {number} {i}".encode()} for i in range(each)])
    return folder


def texts(folder: Path, count: int = 40, name: str = "t.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(count)))
    return folder


def documents(folder: Path) -> list[Document]:
    return list(shards.read_all(shards.find(folder)))


def files(folder: Path) -> dict[str, bytes]:
    """The set that was put out."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.is_file()}


HOW = Conversion(held=0.2)


# What is written --------------------------------------------------------------------------------------------------

def test_every_sample_is_written_once_under_a_key_of_its_own(tmp_path: Path) -> None:
    found = convert(tars_of_pairs(tmp_path / "in"), tmp_path / "out", HOW)
    read = documents(tmp_path / "out")
    assert len({d.key for d in read}) == 48 == sum(found.documents.values()) == found.pictures and found.documents["seen"] > 3
    assert sorted(str(d.parts[1]) for d in read) == sorted(f"caption {n} {i}" for n in range(4) for i in range(12))
    assert {d.meta["name"] for d in read} == {f"{n:05d}.tar/{i:09d}" for n in range(4) for i in range(12)}
    assert not found.skipped and not any((tmp_path / "out/pieces").glob("*.tar"))


def test_keys_and_splits_do_not_depend_on_where_the_source_lies_or_what_is_beside(tmp_path: Path) -> None:
    convert(tars_of_pairs(tmp_path / "in"), tmp_path / "one", HOW)
    (tmp_path / "in").rename(tmp_path / "moved")
    (tmp_path / "moved/00000.tar").unlink()
    convert(tmp_path / "moved", tmp_path / "two", HOW)
    two = {d.key for d in documents(tmp_path / "two")}
    assert two == {d.key for d in documents(tmp_path / "one") if not str(d.meta["name"]).startswith("00000")}


def test_members_are_called_what_their_bytes_are(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i, kind in enumerate(("jpeg", "webp", "png", "bmp")):
        Image.new("RGB", (9, 9), "red").save(tmp_path / "in" / f"{i}.png", format=kind)
        (tmp_path / "in" / f"{i}.txt").write_text(kind)
    convert(tmp_path / "in", tmp_path / "out", Conversion(held=0))
    (path,) = shards.find(tmp_path / "out")
    members = {json.loads(sample["json"])["texts"][1]: [name for name in sample if name[0] == "0"] for sample in shards.samples(path)}
    assert members == {"jpeg": ["0.jpg"], "webp": ["0.webp"], "png": ["0.png"], "bmp": ["0.png"]}
    assert {d.parts[1]: d.parts[0] for d in documents(tmp_path / "out")}["jpeg"] == (tmp_path / "in/0.png").read_bytes()


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
pictures = st.integers(0, 20).map(png)


@st.composite
def anything(draw: st.DrawFn) -> Document:
    kind = draw(st.sampled_from(["pair", "interleaved", "conversation"]))
    meta: dict[str, object] = dict(draw(st.dictionaries(st.sampled_from(["n", "url"]), st.integers() | words, max_size=2)))
    if kind == "pair":
        return Document("", (draw(pictures), draw(words)), tuple(draw(st.lists(words, max_size=3))),
                        tuple(draw(st.lists(st.tuples(words, words), max_size=2))), meta)
    if kind == "interleaved":
        return Document("", tuple(draw(st.lists(words | pictures, min_size=1, max_size=5))), meta=meta)
    turns: list[Role] = ["user", "assistant"] * draw(st.integers(1, 3))
    roles: list[Role] = ["system", *turns] if draw(st.booleans()) else turns
    return Document("", tuple(draw(words | pictures) for _ in roles), meta=meta, roles=tuple(roles))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(given_documents=st.lists(anything(), min_size=1, max_size=8), shard_len=st.integers(1, 9))
def test_our_own_shards_convert_to_the_same_documents(tmp_path_factory: pytest.TempPathFactory, given_documents: list[Document],
                                                      shard_len: int) -> None:
    folder = tmp_path_factory.mktemp("x")
    given_documents = [replace(document, key=f"k{number}") for number, document in enumerate(given_documents)]
    shards.write(given_documents, folder / "in", "train", shard_len)
    convert(folder / "in", folder / "out", Conversion(format="interleaved", held=0, shard_len=3))
    back = {str(d.meta["name"]).rpartition("/")[2]: d for d in documents(folder / "out")}
    assert len(back) == len(given_documents)
    for document in given_documents:
        found = back[document.key]
        assert replace(found, key=document.key, meta={k: v for k, v in found.meta.items() if k != "name"}) == document


def test_shards_keep_within_documents_and_bytes(tmp_path: Path) -> None:
    convert(tars_of_pairs(tmp_path / "in", 2, 30), tmp_path / "len", Conversion(held=0, shard_len=7))
    assert [len(list(shards.read(path))) for path in shards.find(tmp_path / "len")] == [7, 7, 7, 7, 2] * 2
    convert(tmp_path / "in", tmp_path / "bytes", Conversion(held=0, shard_bytes=30_000))
    sizes = [path.stat().st_size for path in shards.find(tmp_path / "bytes")]
    assert max(sizes) <= 30_000 and len(sizes) > 4 and len(documents(tmp_path / "bytes")) == 60


# What is left out -------------------------------------------------------------------------------------------------

def test_bad_samples_are_counted_by_cause_and_the_first_is_named(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for i in range(60):
        (source / f"p{i:02d}.png").write_bytes(png(i))
        (source / f"p{i:02d}.txt").write_text(f"picture {i}\n")
    (source / "p07.png").write_bytes(b"junk")
    (source / "p08.txt").unlink()
    (source / "p09.png").unlink()
    (source / "p10.png").write_bytes(png(0, 300))
    how = Conversion(held=0.2, reading=Reading(keep=Keep(limits=Limits(max_pixels=50_000))))
    with pytest.raises(ValueError, match=r"4 of 60 samples are bad, more than max_bad = 5.00%: .*first: p07.*no shard was put out"):
        convert(source, tmp_path / "out", how)
    assert not files(tmp_path / "out")
    told: list[tuple[int, int]] = []
    found = convert(source, tmp_path / "out", how, lambda done, total, _: told.append((done, total)), max_bad=0.1)
    assert told == [(1, 1)] and sum(found.documents.values()) == 56, "nothing is read twice"
    record = json.loads((tmp_path / "out/convert.json").read_text())
    assert record["skipped"]["picture without a caption"] == [1, "p08"] and record["skipped"]["caption without a picture"] == [1, "p09"]
    assert record["skipped"]["too large"][1].startswith("p10: picture has 300x300") and record["documents"] == found.documents


def test_a_name_that_comes_twice_and_half_a_character_are_left_out(tmp_path: Path) -> None:
    shards.write_tar(tmp_path / "in.tar", [{"__key__": key, "png": png(), "txt": text} for key, text in
                                           (("a", b"first"), ("b", b"other"), ("a", b"second"))])
    found = convert(tmp_path / "in.tar", tmp_path / "out", Conversion(held=0), max_bad=0.5)
    assert found.skipped.first == {"duplicate name": "in.tar/a"} and {d.parts[1] for d in documents(tmp_path / "out")} == {"first", "other"}
    (tmp_path / "t.jsonl").write_text('{"text": "half \\ud83d"}\n{"text": "whole"}\n')
    found = convert(tmp_path / "t.jsonl", tmp_path / "out2", Conversion(held=0), max_bad=0.5)
    assert found.skipped.first == {"text is not UTF-8": "t.jsonl/0: surrogates not allowed"}


def test_keys_with_dots_and_folders_become_keys_without(tmp_path: Path) -> None:
    shards.write_tar(tmp_path / "in.tar", [{"__key__": key, "jpg": png(), "txt": key.encode()} for key in ("./a/b.v1", "./a/b.v2", "c")])
    convert(tmp_path / "in.tar", tmp_path / "out", Conversion(held=0))
    read = documents(tmp_path / "out")
    assert {d.meta["name"]: d.parts[1] for d in read} == {f"in.tar/{key}": key for key in ("./a/b.v1", "./a/b.v2", "c")}
    assert all("." not in d.key and "/" not in d.key for d in read)


def test_nothing_to_read_and_nothing_good_are_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no picture"):
        convert(tmp_path / "in", tmp_path / "out", HOW)
    with pytest.raises(FileNotFoundError, match=r"holds no picture, table or tar of format llava"):
        convert(tmp_path / "in", tmp_path / "out", Conversion(format="llava"))
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "out", HOW)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        convert(texts(tmp_path / "in"), tmp_path / "out", Conversion(reading=Reading(images=tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="2 good documents are too few to train on some and hold out 20%"):
        convert(texts(tmp_path / "few", 2), tmp_path / "out", HOW)
    with pytest.raises(ValueError, match=r"lies in .* of which it would become a part"):
        convert(tmp_path / "in", tmp_path / "in/out", HOW)


# Interruption -----------------------------------------------------------------------------------------------------

def test_an_interrupted_conversion_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tars_of_pairs(tmp_path / "in")
    convert(source, tmp_path / "one", HOW)
    for stop in range(4):
        done: list[str] = []

        def interrupted(piece: Any, *rest: Any, stop: int = stop, done: list[str] = done) -> Any:
            if len(done) == stop:
                raise KeyboardInterrupt
            done.append(piece.name)
            return convert_piece(piece, *rest)

        folder = tmp_path / f"two{stop}"
        monkeypatch.setattr(convert_module, "convert_piece", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(source, folder, HOW)
        assert not files(folder)
        (folder / "pieces/0123456789abcdef-train-0000.tar.partial").write_bytes(b"half")
        monkeypatch.setattr(convert_module, "convert_piece", lambda piece, *rest, done=done: done.append(piece.name)
                            or convert_piece(piece, *rest))
        convert(source, folder, HOW)
        assert files(folder) == files(tmp_path / "one") and len(done) == len(set(done)) == 4


def test_putting_out_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, rename = tars_of_pairs(tmp_path / "in"), Path.rename
    convert(source, tmp_path / "one", HOW)
    for stop in range(1, 6):
        moved: list[Path] = []

        def interrupted(self: Path, target: Path, stop: int = stop, moved: list[Path] = moved) -> Path:
            if target.parent.name == "two" and len(moved) == stop:
                raise KeyboardInterrupt
            moved += [target] if target.parent.name == "two" else []
            return rename(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", interrupted)
            with pytest.raises(KeyboardInterrupt):
                convert(source, tmp_path / f"{stop}/two", HOW)
        convert(source, tmp_path / f"{stop}/two", HOW)
        assert files(tmp_path / f"{stop}/two") == files(tmp_path / "one")


def test_what_is_added_or_changed_is_read_and_the_rest_is_kept(tmp_path: Path) -> None:
    source, out = texts(tmp_path / "in", name="b.jsonl"), tmp_path / "out"
    convert(source, out, Conversion(held=0))
    before = files(out)["train-000000.tar"]
    texts(source, 30, "a.jsonl")
    assert convert(source, out, Conversion(held=0)).documents["train"] == 70
    assert files(out)["train-000000.tar"] == before and len(documents(out)) == 70
    texts(source, 50, "b.jsonl")
    assert convert(source, out, Conversion(held=0)).documents["train"] == 80
    read = sorted(str(d.parts[0]) for d in documents(out))
    assert read == sorted([f"a.jsonl {i}" for i in range(30)] + [f"b.jsonl {i}" for i in range(50)])
    (out / "train-000001.tar").unlink()  # lost
    convert(source, out, Conversion(held=0))
    assert len(documents(out)) == 80
    (source / "a.jsonl").unlink()
    with pytest.raises(ValueError, match=r"holds documents of a.jsonl, which the source has no longer"):
        convert(source, out, Conversion(held=0))


def test_other_settings_and_other_folders_are_refused(tmp_path: Path) -> None:
    source = texts(tmp_path / "in")
    convert(source, tmp_path / "out", HOW)
    with pytest.raises(ValueError, match=r"other settings \(held was 0.2, now 0.1; shard_len was 4096, now 9\)"):
        convert(source, tmp_path / "out", Conversion(held=0.1, shard_len=9))
    shards.write([Document("a", ("x",))], tmp_path / "theirs", "train")
    with pytest.raises(ValueError, match="holds shards of something else"):
        convert(source, tmp_path / "theirs", HOW)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(piece_module, "SLICE_FILES", 7)
    yield


def test_pieces_of_a_folder_hold_every_sample_once(tmp_path: Path, small_pieces: None) -> None:
    (tmp_path / "in").mkdir()
    for i in range(40):
        (tmp_path / "in" / f"{i}.png").write_bytes(png(i))
        (tmp_path / "in" / f"{i}.txt").write_text(f"{i}")
    found = convert(tmp_path / "in", tmp_path / "out", Conversion(held=0))
    assert found.pieces == 6 and sorted(int(str(d.parts[1])) for d in documents(tmp_path / "out")) == list(range(40))


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(tmp_path: Path) -> None:
    source = tars_of_pairs(tmp_path / "in")
    one: Summary = convert(source, tmp_path / "one", HOW)
    assert convert(source, tmp_path / "two", HOW, processes=2) == one and files(tmp_path / "two") == files(tmp_path / "one")


@pytest.mark.slow
def test_a_killed_process_is_one_error_and_the_same_command_goes_on(tmp_path: Path) -> None:
    source = tars_of_pairs(tmp_path / "in", 8, 200)

    def kill(done: int, total: int, measures: Any) -> None:
        if done == 2:
            pid = multiprocessing.active_children()[0].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(BrokenProcessPool):
        convert(source, tmp_path / "two", HOW, kill, processes=2)
    convert(source, tmp_path / "two", HOW, processes=2)
    convert(source, tmp_path / "one", HOW)
    assert files(tmp_path / "two") == files(tmp_path / "one")
