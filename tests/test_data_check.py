"""Whatever is wrong with a folder of shards is named once, with its shard and sample; what is good is kept."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
from tiny_model import sentences, text_tokenizer, token_shards, visual_tokenizer, vocabulary

from data import shards, tar
from data.check import Report, check
from data.document import TEXT, Document, TokenDocument
from data.encode import encode, write_manifest
from data.images import Limits, to_png
from data.index import index_path, read_index, read_manifest, write_index
from data.skipped import Skipped
from mmllm.verbs.inspect import Check, data_check


def png(number: int) -> bytes:
    return to_png(np.random.default_rng(number).integers(0, 256, (24, 24, 3), np.uint8))


def documents(count: int) -> list[Document]:
    words = iter(sentences(4 * count, seed=3))
    plain = [Document(f"d{i:03d}", (png(i), next(words)) if i % 2 else (next(words), png(i), next(words), png(i + 1)),
                      (next(words),) if i % 2 else ()) for i in range(count - 1)]
    return [*plain, Document("talk", (next(words), png(0), "a", png(1)), roles=("user", "user", "assistant", "assistant"))]


@cache
def _raw() -> Path:
    folder = Path(mkdtemp(prefix="mmllm-check-"))
    shards.write(documents(12), folder / "raw", "train", 5)
    return folder / "raw"


@cache
def _tokens() -> Path:
    out = _raw().parent / "tokens"
    encode(shards.find(_raw()), out, visual_tokenizer(), text_tokenizer(), vocabulary())
    return out


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """12 documents in three shards."""
    return Path(shutil.copytree(_raw(), tmp_path / "raw"))


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """The same, encoded."""
    return Path(shutil.copytree(_tokens(), tmp_path / "tokens"))


def lines(report: Report) -> list[str]:
    return [f"{f.shard} {f.key} {f.what}" for f in report.findings]


def change(path: Path, edit: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> None:
    """Write a tar again with other members."""
    content = path.read_bytes()
    files = [(m.name, content[m.first:m.first + m.size]) for m in tar.members(content)]
    with path.open("wb") as file:
        tar.write(file, edit(files))


# Raw --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("quick", [False, True])
def test_whole_shards_have_no_fault_and_mend_to_the_same_bytes(raw: Path, tmp_path: Path, quick: bool) -> None:
    told: list[int] = []
    report = check(raw, quick=quick, fix=tmp_path / "out", progress=lambda done, total, measures: told.append(done))
    assert (report.kind, report.num_shards, report.num_samples, report.num_good, report.findings) == ("raw", 3, 12, 12, ())
    assert told == [0, 1, 2, 3, 1, 2, 3] and report.written == {f"train-00000{i}.tar": n for i, n in enumerate((5, 5, 2))}
    assert all((tmp_path / "out" / path.name).read_bytes() == path.read_bytes() for path in shards.find(raw))


SPOILT: dict[str, tuple[Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]], str]] = {
    "json missing": (lambda files: [f for f in files if f[0] != "d001.json"], r"d001 no document: it has no d001\.json"),
    "picture missing": (lambda files: [f for f in files if f[0] != "d001.0.png"], r"d001 no document: .* it names picture 0\.png, which"),
    "no json": (lambda files: [(n, b"{" if n == "d001.json" else c) for n, c in files], r"d001 no document: d001\.json"),
    "picture cut": (lambda files: [(n, c[:-300] if n == "d001.0.png" else c) for n, c in files],
                    r"d001 does not decode as a picture: 0\.png: "),
    "roles": (lambda files: [(n, c.replace(b"}", b', "roles": ["user", "user"]}') if n == "d001.json" else c) for n, c in files],
              r"d001 no document: .*conversation: turns are user"),
    "member twice": (lambda files: [*files[:4], ("d001.0.PNG", b""), *files[4:]], r"d001 two members: d001\.0\.PNG is there twice"),
    "key that leads out": (lambda files: [(n.replace("d001", "../d001"), c) for n, c in files], r"\.\./d001 bad key: it leads out"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_sample_is_named_and_the_others_are_kept(raw: Path, tmp_path: Path, name: str) -> None:
    edit, what = SPOILT[name]
    before = {d.key: d for d in shards.read_all(shards.find(raw))}
    change(raw / "train-000000.tar", edit)
    report = check(raw, fix=tmp_path / "out")
    assert report.num_good == 11 and any(re.match(r"train-000000\.tar " + what, line) for line in lines(report))
    assert {f.key.removeprefix("../") for f in report.findings} == {"d001"}
    after = {d.key: d for d in shards.read_all(shards.find(tmp_path / "out"))}
    assert after == {key: document for key, document in before.items() if key != "d001"}
    assert not check(tmp_path / "out").findings


def test_what_nobody_names_is_told_and_left_behind_but_costs_no_sample(raw: Path, tmp_path: Path) -> None:
    change(raw / "train-000001.tar", lambda files: [("notes", b""), ("__meta__/x.json", b""), *files[:1], ("d005.9.png", b""), *files[1:]])
    report = check(raw, fix=tmp_path / "out")
    assert lines(report) == ["train-000001.tar  no part of a sample: notes", "train-000001.tar d005 member that nobody names: d005.9.png"]
    assert (tmp_path / "out/train-000001.tar").read_bytes() == (_raw() / "train-000001.tar").read_bytes()


def test_limits_are_those_of_encoding(raw: Path) -> None:
    for quick in (False, True):
        report = check(raw, limits=Limits(max_pixels=500), quick=quick)
        assert report.counts == {"too large": 19} and report.num_good == 0


def test_a_key_that_comes_again_is_good_once(raw: Path, tmp_path: Path) -> None:
    change(raw / "train-000000.tar", lambda files: [(n, b"junk" if n == "d000.1.png" else c) for n, c in files])
    shutil.copy(_raw() / "train-000000.tar", raw / "train-000007.tar")
    report = check(raw, fix=tmp_path / "out")
    assert report.counts == {"duplicate key": 5, "does not decode as a picture": 1} and report.num_good == 12
    assert "train-000000.tar d000 duplicate key: train-000007.tar holds it too" in lines(report)
    assert report.written == {"train-000000.tar": 4, "train-000001.tar": 5, "train-000002.tar": 2, "train-000007.tar": 1}


def test_all_that_lies_before_the_cut_is_recovered(raw: Path, tmp_path: Path) -> None:
    path = raw / "train-000001.tar"
    whole = path.read_bytes()
    members = tar.members(whole)
    for number, end in enumerate((0, 700, members[4].first + 3, members[-1].first + members[-1].size, len(whole) - 9800)):
        path.write_bytes(whole[:end])
        report = check(raw, fix=tmp_path / f"out{number}")
        kept = report.written.get(path.name, 0) if report.written else 0  # type: ignore[union-attr]
        ends = {m.name.partition(".")[0]: m.first + m.size for m in members}
        assert kept == sum(last <= end for last in ends.values()) and any(f.cause == "damaged tar" for f in report.findings)
        if kept:
            assert [d.key for d in shards.read(tmp_path / f"out{number}" / path.name)] == sorted(ends)[:kept]


def test_a_hole_at_the_end_and_an_unfinished_shard_are_told(raw: Path) -> None:
    with (raw / "train-000000.tar").open("ab") as file:
        file.write(bytes(50_000))
    (raw / "train-000003.tar.partial").write_bytes(b"")
    (raw / "train-000004.tar").symlink_to(raw / "nowhere")
    assert check(raw).counts == {"empty end": 1, "unfinished": 1, "no file": 1}


def test_two_processes_say_what_one_says(raw: Path, tmp_path: Path) -> None:
    change(raw / "train-000001.tar", lambda files: [(n, c[:-99]) for n, c in files])
    one, two = check(raw, fix=tmp_path / "one"), check(raw, processes=2, fix=tmp_path / "two")
    assert two == one and sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())


def test_a_fix_is_never_in_place(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds shards already: name a new folder"):
        check(raw, fix=raw)
    with pytest.raises(ValueError, match="they are not mended"):
        check(_tokens(), fix=tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        check(tmp_path / "nowhere")


def test_the_command_prints_a_line_a_fault_and_fails(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_check(Check(folder=raw))
    assert "3 raw shards, 12 samples, 12 good\n" in capsys.readouterr().out
    change(raw / "train-000000.tar", lambda files: [(n.replace("d001", "d\n\udc80"), c) for n, c in files])
    with pytest.raises(SystemExit) as error:
        data_check(Check(folder=raw, json=tmp_path / "report.json", fix=tmp_path / "out"))
    said = capsys.readouterr().out
    assert error.value.code == 1 and "train-000000.tar  d\\n\\udc80  bad key: it is no UTF-8" in said
    assert "11 good; 1 × bad key" in said and "11 samples in 3 shards →" in said
    assert json.loads((tmp_path / "report.json").read_text())["counts"] == {"bad key": 1}


# Tokens -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("quick", [False, True])
def test_whole_token_shards_have_no_fault(quick: bool) -> None:
    report = check(_tokens(), quick=quick)
    assert (report.kind, report.num_shards, report.num_samples, report.num_good, report.findings) == ("token", 3, 12, 12, ())


def rewritten(folder: Path, edit: Callable[[TokenDocument], TokenDocument]) -> None:
    """Second sample of the first shard changed, shard and index and manifest in order."""
    path = folder / "train-000000.tar"
    index, content = read_index(path), path.read_bytes()
    docs = [TokenDocument.from_bytes(content[o:o + n]) for o, n in zip(index.offsets, index.sizes, strict=True)]
    docs[1] = edit(docs[1])
    shards.write_tar(path, ({"__key__": key.decode(), "ids": doc.to_bytes()} for key, doc in zip(index.keys.tolist(), docs, strict=True)))
    write_index(path, docs, index.fingerprint, Skipped())
    relist(folder)


def relist(folder: Path) -> None:
    manifest = read_manifest(folder)
    write_manifest(folder, sorted(folder.glob("*.tar")), manifest["fingerprint"], vocabulary())


def with_ids(doc: TokenDocument, at: int, value: int) -> TokenDocument:
    ids = doc.ids.copy()
    ids[at] = value
    return dataclasses.replace(doc, ids=ids)


V = vocabulary()
WRONG: dict[str, tuple[Callable[[TokenDocument], TokenDocument], str]] = {
    "text beyond": (lambda doc: with_ids(doc, -1, V.bos), f"bad id: {V.bos} is no piece of text"),
    "below": (lambda doc: with_ids(doc, -1, -1), "bad id: -1 is no piece"),
    "code of the other book": (lambda doc: with_ids(doc, 1, int(doc.ids[1]) - V.codebook_size), "bad code: ids hold one"),
    "grid": (lambda doc: dataclasses.replace(doc, grids=((9, 9), *doc.grids[1:])), "bad grid: 9x9 has no token"),
    "grid of another length": (lambda doc: dataclasses.replace(doc, grids=((2, 3), *doc.grids[1:])), "bad code: a 2x3 picture"),
    "text with a grid": (lambda doc: dataclasses.replace(doc, grids=(doc.grids[0], (3, 3), *doc.grids[2:])), "bad grid: a text has"),
    "question": (lambda doc: dataclasses.replace(doc, kinds=(*doc.kinds[:-1], 3)), "bad grammar: a question without an answer"),
    "half a role": (lambda doc: dataclasses.replace(doc, kinds=(doc.kinds[0], 16 + TEXT, *doc.kinds[2:])), "bad grammar: some parts have"),
    "roles": (lambda doc: dataclasses.replace(doc, kinds=(17, 24, 16)), "bad grammar: conversation: turns are"),
}


@pytest.mark.parametrize("name", WRONG)
def test_ids_that_the_vocabulary_or_the_grammar_does_not_have_are_named(tokens: Path, name: str) -> None:
    edit, what = WRONG[name]
    rewritten(tokens, edit)
    assert all(line.startswith(f"train-000000.tar d001 {what}") for line in lines(check(tokens))) and check(tokens).num_good == 11


def test_a_shard_changed_after_indexing_is_named_by_headers_or_by_content(tokens: Path) -> None:
    path = tokens / "train-000000.tar"
    whole = path.read_bytes()
    at = int(read_index(path).offsets[2]) + 40
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
    assert check(tokens).counts["index of another shard"] == 1 and check(tokens, quick=True).counts == {}
    shutil.copy(tokens / "train-000001.tar", path)
    assert check(tokens, quick=True).counts["index of another shard"] == 1
    path.write_bytes(whole[:3000])
    assert check(tokens, quick=True).counts["damaged tar"] == 1 and check(tokens).num_good == 7


def test_manifest_files_and_indexes_must_agree(tokens: Path) -> None:
    (tokens / "train-000000.tar").unlink()
    shutil.copy(tokens / "train-000001.tar", tokens / "more.tar")
    index_path(tokens / "train-000002.tar").unlink()
    (tokens / "fingerprint").write_text("0123")
    assert check(tokens).counts == {"missing shard": 1, "unlisted shard": 1, "bad index": 1, "wrong fingerprint": 1}
    (tokens / "manifest.json").write_text("{")
    assert check(tokens).counts == {"bad manifest": 1}


def test_a_manifest_that_counts_otherwise_is_named(tokens: Path) -> None:
    manifest = read_manifest(tokens)
    manifest["image_codes"] += 1
    manifest["shards"]["train-000001.tar"]["documents"] = 4
    (tokens / "manifest.json").write_text(json.dumps(manifest))
    assert lines(check(tokens)) == ["train-000001.tar  wrong counts: the index lists 5 documents, manifest.json says 4"]
    manifest["shards"]["train-000001.tar"]["documents"] = 5
    (tokens / "manifest.json").write_text(json.dumps(manifest))
    assert "wrong counts: it says" in lines(check(tokens))[0] and len(check(tokens).findings) == 1


def test_an_index_of_other_tokenizers_or_of_another_shard_is_named(tokens: Path, tmp_path: Path) -> None:
    shutil.copy(index_path(tokens / "train-000001.tar"), index_path(tokens / "train-000000.tar"))
    assert check(tokens, quick=True).counts["index of another shard"] == 1
    other = token_shards(tmp_path / "other", 5)
    shutil.copy(index_path(other / "train-000000.tar"), index_path(tokens / "train-000000.tar"))
    assert any("was encoded under fingerprint" in line for line in lines(check(tokens)))


def test_a_key_in_two_token_shards_is_named(tokens: Path) -> None:
    shutil.copy(tokens / "train-000000.tar", tokens / "train-000009.tar")
    shutil.copy(index_path(tokens / "train-000000.tar"), index_path(tokens / "train-000009.tar"))
    relist(tokens)
    assert check(tokens).counts == {"duplicate key": 5} and check(tokens).num_good == 12
