"""Every format that people have becomes the documents that it means; what is broken in it is refused by cause, and the rest is read."""

import base64
import gzip
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import shards, tar
from data.document import Document
from data.formats import rows
from data.formats.album import Album
from data.formats.keep import Keep, extension_of, kept
from data.formats.piece import Refusal
from data.formats.reading import Reading
from data.formats.which import FORMATS, recognised
from data.images import Limits, Refused, to_png
from mmllm.verbs.convert import Format

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


def picture(seed: int = 0, kind: str = "png", size: tuple[int, int] = (12, 9), **options: object) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(out, format=kind, **options)  # type: ignore[arg-type]
    return out.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        tar.write(file, members.items())
    return path


def write_rows(path: Path, *found: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(list(found)), path, row_group_size=2)
    elif path.suffix == ".json":
        path.write_text(json.dumps(found))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def read(name: str, source: Path, **options: Any) -> tuple[list[Document], list[tuple[str, str]]]:
    """Documents, and (name, what was said) of refusals."""
    reading = Reading(**options)
    album = Album(reading.images or (source if source.is_dir() else source.parent), reading.keep, reading.missing == "drop")
    found = [item for piece in FORMATS[name].pieces(source) for item in FORMATS[name].read(piece, reading, album)]
    refused = [(item.name, str(item.error)) for item in found if isinstance(item, Refusal)]
    return [item for item in found if isinstance(item, Document)], refused + [("dropped", cause) for cause in album.dropped.causes]


A, B, C = picture(1), picture(2, "jpeg"), picture(3, "webp", lossless=True)


# Pairs and labels -------------------------------------------------------------------------------------------------

def test_pairs_in_a_tar_are_read_and_each_bad_one_is_named(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "00000.tar", {
        "000.jpg": B, "000.txt": b" a cat\n", "000.json": b'{"caption": "not this"}',
        "001.png": A, "001.json": b'{"caption": "from json"}', "002.webp": C, "002.txt": b"\xff\xfe\xfa", "003.png": A, "003.txt": b" \n",
        "004.txt": b"alone", "005.png": b"junk", "005.txt": b"x", "__meta__/x.txt": b"", "._000.jpg": b"mac",
        "v.1.clip.npy": b"?", "v.1.jpg": B, "v.1.more.json": b"{}", "v.1.txt": b"dots", "v.2.jpg": B, "v.2.txt": b"more dots"})
    documents, refused = read("pairs", source)
    assert documents == [Document("000", (B, "a cat")), Document("001", (A, "from json")), Document("v.1", (B, "dots")),
                         Document("v.2", (B, "more dots"))]
    assert [(name, said.partition(":")[0]) for name, said in refused] == [
        ("002", "text is not UTF-8"), ("003", "picture without a caption"), ("004", "caption without a picture"),
        ("005", "does not decode as a picture")]


def test_pairs_in_a_folder_are_read_at_any_depth(tmp_path: Path) -> None:
    for name, content in {"a/x.PNG": A, "a/x.txt": b"one", "b/c.d/y.jpg": B, "b/c.d/y.json": b'{"caption": "two"}', "z.txt": b"alone",
                          "00000_stats.json": b"{}", "t.png": A, "t.jpg": B, "t.txt": b"twice"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    documents, refused = read("pairs", tmp_path)
    assert documents == [Document("a/x", (A, "one")), Document("b/c.d/y", (B, "two"))]
    assert refused == [("t", "duplicate name: t.jpg, t.png, t.txt"), ("z", "caption without a picture")]


def test_a_truncated_tar_is_read_as_far_as_it_is_whole(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "a.tar", {f"{i}.{e}": c for i in range(4) for e, c in (("png", A), ("txt", b"words"))})
    end = tar.members(source.read_bytes())[5].first
    source.write_bytes(source.read_bytes()[:end + 2])
    documents, refused = read("pairs", source)
    assert [d.key for d in documents] == ["0", "1"] and refused[0] == ("2", "picture without a caption")
    assert refused[1][0] == "a.tar" and refused[1][1].startswith("damaged tar: member 2.txt is cut off")
    source.write_bytes(b"")
    assert read("pairs", source)[1][0][1].startswith("damaged tar")


def test_two_members_of_one_name_cost_their_sample_alone(tmp_path: Path) -> None:
    with (tmp_path / "a.tar").open("wb") as file:
        tar.write(file, [("a.txt", b"1"), ("a.TXT", b"2"), ("b.png", A), ("b.txt", b"b")])
    documents, refused = read("pairs", tmp_path)
    assert [d.key for d in documents] == ["b"] and refused == [("a", "duplicate name: two members .txt")]


@pytest.mark.parametrize(("file", "content"), [
    ("classes.txt", "tench\ngreat white shark\n"), ("classes.json", '["tench", "great white shark"]'),
    ("classes.json", '{"0": ["n01", "tench"], "1": ["n02", "great white shark"]}')])
def test_labelled_shards_are_called_by_their_classes_names(tmp_path: Path, file: str, content: str) -> None:
    write_tar(tmp_path / "a.tar", {"a.jpg": B, "a.cls": b"1", "b.png": A, "b.cls": b"tench\n", "c.png": A, "c.cls": b"7", "d.png": A})
    with pytest.raises(ValueError, match="says a number for a class, not its name: give classes"):
        read("labels", tmp_path)
    (tmp_path / file).write_text(content)
    documents, refused = read("labels", tmp_path)
    assert documents == [Document("a", (B, "great white shark"), meta={"label": 1}), Document("b", (A, "tench"), meta={"label": 0})]
    assert [said.partition(":")[0] for _, said in refused] == ["unknown class", "picture without a label"]


def test_a_folder_a_class_is_a_label_a_folder(tmp_path: Path) -> None:
    for name in ("white_cat/1.png", "dog/deep/2.png", "3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(A)
    documents, refused = read("folders", tmp_path)
    assert documents == [Document("dog/deep/2.png", (A, "dog"), meta={"label": 0}),
                         Document("white_cat/1.png", (A, "white cat"), meta={"label": 1})]
    assert refused == [("3.png", "picture without a label: it lies in no class's folder")]


# Rows -------------------------------------------------------------------------------------------------------------

def test_a_table_holds_its_pictures_or_names_them(tmp_path: Path) -> None:
    (tmp_path / "b.jpg").write_bytes(B)
    source = write_rows(tmp_path / "t.parquet", {"image": {"bytes": A, "path": "a.png"}, "caption": "one", "n": 1},
                        {"image": {"bytes": None, "path": "b.jpg"}, "caption": "two", "n": 2}, {"image": None, "caption": "three", "n": 3},
                        {"image": {"bytes": A, "path": None}, "caption": " ", "n": 4})
    documents, refused = read("table", source)
    assert documents == [Document("0", (A, "one")), Document("1", (B, "two"))]
    assert refused == [("2", "caption without a picture"), ("3", "picture without a caption")]
    with pytest.raises(ValueError, match=r"missing column: t.parquet has image, caption, n, and no text \(looked for text: alt\)"):
        read("table", source, columns={"text": "alt"})
    lines = write_rows(tmp_path / "t.jsonl", {"file_name": "b.jpg", "text": ["first", "second", "first"]},
                       {"file_name": "no.jpg", "text": "x"})
    documents, refused = read("table", lines)
    assert documents == [Document("0", (B, "first"), ("second",))] and refused[0][1].startswith("missing picture: no.jpg is not in")


def test_a_table_with_broken_utf8_costs_its_row_alone(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    words = pyarrow.array([b"fine", b"\xff\xfe", b"also"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": words}), tmp_path / "t.parquet")
    documents, refused = read("text", tmp_path)
    assert [d.parts for d in documents] == [("fine",), ("also",)] and refused == [("1", "text is not UTF-8: in a column of the table")]


def test_a_damaged_table_is_one_error(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "t.parquet", *({"text": f"words {i}"} for i in range(9)))
    source.write_bytes(source.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"t.parquet is damaged, or no parquet file"):
        read("text", source)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_obelics_pages_find_their_pictures_by_path_url_and_hash(tmp_path: Path, ending: str) -> None:
    urls = [f"https://example.org/{i}.jpg" for i in range(4)]
    (tmp_path / "local.png").write_bytes(A)
    (tmp_path / f"{hashlib.md5(urls[0].encode()).hexdigest()}.jpg").write_bytes(B)
    write_tar(tmp_path / "images.tar", {"0007.webp": C, "0007.json": json.dumps({"url": urls[1]}).encode(),
                                        f"{hashlib.sha256(urls[2].encode()).hexdigest()}.png": A})
    page = {"images": [None, "local.png", urls[0], None, urls[1], urls[2]], "texts": ["before", None, None, "between", None, None]}
    lost = {"images": [None, urls[3], "local.png", None], "texts": ["t", None, None, " "]}
    source = write_rows(tmp_path / f"pages.{ending}", page, lost, {"images": [None, None], "texts": ["x", None]})
    documents, refused = read("obelics", source)
    assert documents == [Document("0", ("before", A, B, "between", C, A))]
    assert [said.partition(":")[0] for _, said in refused] == ["picture not local", "no document"]
    documents, refused = read("obelics", source, missing="drop")
    assert documents[1].parts == ("t", A) and [said for _, said in refused][1:] == ["picture not local"]


def test_mmc4_pictures_stand_before_their_sentences(tmp_path: Path) -> None:
    write_tar(tmp_path / "images/0.tar", {"p.png": A, "q.jpg": B})
    info = [{"image_name": "p.png", "raw_url": "u", "matched_text_index": 2, "matched_sim": 0.25},
            {"image_name": "q.jpg", "raw_url": "u", "matched_text_index": 0, "matched_sim": 0.5}]
    row = {"url": "http://x", "text_list": ["One.", "Two. ", "Three.", "Four."], "image_info": info, "similarity_matrix": [[0.0] * 4] * 2}
    bad = {**row, "image_info": [{**info[0], "matched_text_index": 4}]}
    source = write_rows(tmp_path / "docs.jsonl", row, bad)
    documents, refused = read("mmc4", source, images=tmp_path / "images")
    assert documents == [Document("0", (B, "One. Two.", A, "Three. Four."), meta={"url": "http://x", "matched_sim": [0.25, 0.5]})]
    assert refused[0][1] == "no place for a picture: matched_text_index is 4 of 4 sentences"
    for path, content in ((tmp_path / "z/d.jsonl.gz", gzip.compress(source.read_bytes())), (tmp_path / "z/d.jsonl.zip", b"")):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.write(source, "docs.jsonl")
        assert read("mmc4", path, images=tmp_path / "images")[0] == documents


def say(who: str, words: str) -> dict[str, str]:
    return {"from": who, "value": words}


def test_llava_conversations_put_pictures_where_they_are_named(tmp_path: Path) -> None:
    (tmp_path / "images/coco").mkdir(parents=True)
    (tmp_path / "images/coco/a.png").write_bytes(A)
    (tmp_path / "images/b.jpg").write_bytes(B)
    exchange = [say("human", "<image>\nWhat is it?"), say("gpt", "A cat.")]
    good: list[dict[str, Any]] = [
        {"id": "x1", "image": "coco/a.png", "conversations": exchange},
        {"id": 7, "conversations": [say("system", "Be brief."), say("human", "Hi"), say("gpt", "Hello"), say("human", "More"),
                                    say("gpt", "No")]},
        {"image": ["coco/a.png", "b.jpg"], "conversations": [say("user", "Compare <image> with <image>"), say("assistant", "Alike")]}]
    bad: list[tuple[str, dict[str, Any]]] = [
        ("<image> count: 1 places for 0 pictures", {"conversations": exchange}),
        ("<image> count: 1 places for 2 pictures", {"image": ["b.jpg", "b.jpg"], "conversations": exchange}),
        ("no conversations: it is str, not a list", {"conversations": "hello"}),
        ("no conversations: the row has id", {"id": 1}),
        ("no conversation: a turn is hello", {"conversations": ["hello"]}),
        ("unknown role: 'tool'", {"conversations": [say("human", "x"), say("tool", "y")]}),
        ("conversation: turns are assistant, user", {"conversations": [say("gpt", "x"), say("human", "y")]}),
        ("conversation: turns are user:", {"conversations": [say("human", "x")]}),
        ("empty turn: the assistant says nothing", {"conversations": [say("human", "x"), say("gpt", " ")]}),
        ("empty conversation", {"conversations": []}),
        ("missing picture: c.png is not in", {"image": "c.png", "conversations": exchange})]
    for path in (tmp_path / "l.json", tmp_path / "l.jsonl"):
        documents, refused = read("llava", write_rows(path, *good, *(row for _, row in bad)), images=tmp_path / "images")
        assert [d.parts for d in documents] == [(A, "What is it?", "A cat."), ("Be brief.", "Hi", "Hello", "More", "No"),
                                                ("Compare", A, "with", B, "Alike")]
        assert documents[0].roles == ("user", "user", "assistant") and documents[0].meta == {"id": "x1"}
        assert documents[1].roles == ("system", "user", "assistant", "user", "assistant")
        assert all(said.startswith(begins) for (_, said), (begins, _) in zip(refused, bad, strict=True)), refused


def test_openai_messages_take_local_pictures_in_every_way_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(A)
    url = "data:image/jpeg;base64," + base64.b64encode(B).decode()

    def ask(*content: object) -> dict[str, object]:
        return {"messages": [{"role": "developer", "content": "S"}, {"role": "user", "content": list(content)},
                             {"role": "assistant", "content": "R"}]}

    def link(url: str) -> dict[str, object]:
        return {"type": "image_url", "image_url": {"url": url}}

    text = {"type": "text", "text": "look"}
    good = [ask(text, link(url)), ask(link(f"file://{tmp_path}/a%20b.png"), "plain"),
            ask(link("a b.png"), {"type": "input_text", "text": "x"}), {**ask({"type": "image"}, text), "images": ["a b.png"]}]
    bad = [("picture not local: https://x/y.png", ask(link("https://x/y.png"))),
           ("broken data URL", ask(link("data:image/png;base64,@@"))),
           ("unknown part: of type 'audio'", ask({"type": "audio"})),
           ("images count: a message has a picture more", ask({"type": "image"})),
           ("images count: 1 of 1 are in no message", {**ask(text), "images": ["a b.png"]}),
           ("unknown role: 'tool'", {"messages": [{"role": "tool", "content": "x"}]}),
           ("no conversation: the content of a message is NoneType", {"messages": [{"role": "assistant", "content": None}]}),
           ("no messages: it is dict, not a list", {"messages": {}}), ("no conversation: a message is int", {"messages": [1]})]
    documents, refused = read("messages", write_rows(tmp_path / "m.jsonl", *good, *(row for _, row in bad)))
    assert [d.parts for d in documents] == [("S", "look", B, "R"), ("S", A, "plain", "R"), ("S", A, "x", "R"), ("S", A, "look", "R")]
    assert documents[0].roles == ("system", "user", "user", "assistant")
    assert all(said.startswith(begins) for (_, said), (begins, _) in zip(refused, bad, strict=True)), refused


@pytest.mark.parametrize("names", [("original_image", "edit_prompt", "edited_image"), ("source_img", "instruction", "target_img")])
def test_an_edit_is_an_exchange_of_pictures(tmp_path: Path, names: tuple[str, str, str]) -> None:
    values = ({"bytes": A, "path": None}, "make it red", {"bytes": B, "path": None})
    source = write_rows(tmp_path / "e.parquet", dict(zip(names, values, strict=True)))
    documents, refused = read("edits", source)
    assert documents == [Document("0", (A, "make it red", B), roles=("user", "user", "assistant"))] and not refused


def test_plain_text_is_read_from_lines_tables_and_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "a/t.jsonl", {"text": "one"}, {"text": ""}, {"other": 1})
    write_rows(tmp_path / "a/u.parquet", {"text": "two", "n": 1})
    (tmp_path / "a/v.txt").write_bytes(b"\xef\xbb\xbfthree\n")
    (tmp_path / "a/w.txt").write_bytes("é".encode("latin-1"))
    documents, refused = read("text", tmp_path / "a")
    assert [d.parts for d in documents] == [("one",), ("two",), ("three",)]
    assert [said.partition(":")[0] for _, said in refused] == ["empty text", "no text", "text is not UTF-8"]
    assert read("text", write_rows(tmp_path / "b.jsonl", {"body": "four"}), columns={"text": "body"})[0][0].parts == ("four",)


def test_lines_that_are_no_rows_are_refused_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LINE_BYTES", 2000)
    source = tmp_path / "t.jsonl"
    lines = [b'{"text": "a"}', b"", b'{"text": "' + b"x" * 5000 + b'"}', b"[1]", b'{"text": "\xff"}', b"[" * 1900, b'{"text": "b"}',
             b'{"text": "c"']
    source.write_bytes(b"\n".join(lines))
    documents, refused = read("text", source)
    assert [d.parts for d in documents] == [("a",), ("b",)]
    assert [said.partition(":")[0] for _, said in refused] == ["line too long", "no object", "no JSON", "no JSON", "no JSON"]
    whole = write_rows(tmp_path / "w.jsonl", *({"text": f"{i} {hashlib.md5(bytes([i])).hexdigest()}"} for i in range(200))).read_bytes()
    (tmp_path / "w.jsonl.gz").write_bytes(gzip.compress(whole)[:-3000])
    documents, refused = read("text", tmp_path / "w.jsonl.gz")
    assert 0 < len(documents) < 200 and refused[-1][1].startswith("damaged file")


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("slice_bytes", [1, 50, 333, 1 << 20])
def test_slices_of_a_file_hold_every_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, slice_bytes: int) -> None:
    source = write_rows(tmp_path / f"t.{ending}", *({"text": "x" * (i % 7) + str(i)} for i in range(40)))
    whole = [(d.key, d.parts) for d in read("text", source)[0]]
    monkeypatch.setattr(rows, "SLICE_BYTES", slice_bytes)
    assert [(d.key, d.parts) for d in read("text", source)[0]] == whole and len(whole) == 40
    assert (len(rows.pieces(source)) > 1) == (slice_bytes < 1 << 20)


WORDS = st.sampled_from(["user", "human", "assistant", "gpt", "image", "text", "image_url", "see <image>", "a.png", "data:,x", "file://[",
                         "\ud800", " ", ""])
VALUES = st.none() | st.booleans() | st.integers(-1, 3) | st.floats() | WORDS
FIELDS = st.sampled_from(["type", "text", "image", "image_url", "url", "bytes", "path", "image_name", "matched_text_index"])
JSON = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=4), max_leaves=8)


def rows_of(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Rows that are nearly right."""
    turns = {"llava": ("from", "value"), "messages": ("role", "content")}.get(name, ("image_name", "matched_text_index"))
    several = st.lists(JSON | st.fixed_dictionaries(dict.fromkeys(turns, JSON)), max_size=3) | JSON
    fields = {"llava": ("conversations", "image"), "messages": ("messages", "images"), "mmc4": ("text_list", "image_info"),
              "obelics": ("images", "texts"), "table": ("image", "caption"), "edits": ("source", "instruction", "target"),
              "text": ("text",)}
    return st.fixed_dictionaries(dict.fromkeys(fields[name], several))


@pytest.mark.parametrize("name", ["llava", "messages", "mmc4", "obelics", "table", "edits", "text"])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_a_row_holds_it_is_a_document_or_refused(tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    found = data.draw(st.lists(rows_of(name), min_size=1, max_size=4))
    folder = tmp_path_factory.mktemp("rows")
    (folder / "a.png").write_bytes(A)
    documents, refused = read(name, write_rows(folder / "x.jsonl", *found), missing="drop")
    assert len(documents) + sum(who != "dropped" for who, _ in refused) == len(found)


# Pictures ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "images/../../secret.png", "file:///etc/passwd", "a/../../images2/x.png",
                                  "\0", "..", "x" * 5000])
def test_a_path_that_leads_out_of_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    for folder in ("images", "images2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(A)
    (tmp_path / "secret.png").write_bytes(A)
    with pytest.raises(ValueError, match="picture outside the folder: "):
        Album(tmp_path / "images", Keep()).take(path)


def test_a_path_within_the_folder_is_found_however_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/x.png").write_bytes(A)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/y.png").write_bytes(A)
    (tmp_path / "images/link").symlink_to(tmp_path / "elsewhere")  # the owner's
    album = Album(tmp_path / "images", Keep())
    for path in ("a/x.png", "./a/x.png", "a/../a/x.png", f"{tmp_path}/images/a/x.png", f"file://{tmp_path}/images/a/x.png", "link/y.png"):
        assert album.take(path) == A
    for odd in (7, "", None, {}, ["a"], "a", "x" * 300, "\ud800.png"):
        with pytest.raises(ValueError, match=r"missing picture|unreadable picture"):
            album.take(odd)


def test_a_name_that_several_members_have_is_no_picture(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"train/x.png": A, "val/x.png": B, "y.png": A, "deep/z.png": A})
    album = Album(tmp_path, Keep())
    assert album.take("val/x.png") == B and album.take("z.png") == A and album.take("some/y.png") == A
    with pytest.raises(ValueError, match=r"ambiguous picture: several are called x.png"):
        album.take("x.png")
    with pytest.raises(ValueError, match="missing picture"):
        album.take("other/z.png")


def test_a_cut_image_shard_gives_what_it_holds_and_is_named_where_a_picture_is_missing(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "0.tar", {"x.png": A, "y.png": B})
    source.write_bytes(source.read_bytes()[:tar.members(source.read_bytes())[1].first + 5])
    album = Album(tmp_path, Keep())
    assert album.take("x.png") == A
    with pytest.raises(ValueError, match=r"missing picture: y.png .*\(1 faults in image shards: 0.tar: member y.png is cut off"):
        album.take("y.png")


def test_files_are_kept_byte_for_byte_and_called_what_they_are() -> None:
    for file, extension in ((A, "png"), (B, "jpg"), (C, "webp")):
        assert kept(file, Keep()) == file and extension_of(file) == extension
    other = picture(4, "bmp")
    made = kept(other, Keep())
    before, after = (np.asarray(Image.open(io.BytesIO(file))) for file in (other, made))
    assert extension_of(made) == "png" and np.array_equal(before, after)


def test_pictures_are_made_smaller_or_square_on_demand() -> None:
    for kind, extension in (("jpeg", "jpg"), ("png", "png")):
        small = kept(picture(5, kind, (120, 40)), Keep(max_side=30))
        assert Image.open(io.BytesIO(small)).size == (30, 10) and extension_of(small) == extension
    assert kept(A, Keep(max_side=12)) == A
    turned = Image.Exif()
    turned[0x112] = 6
    small = Image.open(io.BytesIO(kept(picture(5, "jpeg", (120, 40), exif=turned), Keep(max_side=30))))
    assert small.size == (10, 30) and 0x112 not in small.getexif()
    assert Image.open(io.BytesIO(kept(picture(5, size=(120, 40)), Keep(size=16)))).size == (16, 16)
    with pytest.raises(ValueError, match="size is 8 and max_side 9"):
        Keep(size=8, max_side=9)


def test_a_cut_picture_is_refused_unless_its_header_is_believed() -> None:
    for kind in ("png", "jpeg", "webp"):
        cut = picture(6, kind, (64, 64))[:-300]
        with pytest.raises(Refused, match="does not decode"):
            kept(cut, Keep())
        assert kind == "webp" or kept(cut, Keep(check="header")) == cut


def test_a_bomb_is_refused_from_its_header() -> None:
    bomb = to_png(np.zeros((4000, 4000, 3), np.uint8))
    for keep in (Keep(limits=Limits(max_pixels=10_000_000)), Keep(check="header", limits=Limits(max_pixels=10_000_000))):
        with pytest.raises(Refused, match="too large"):
            kept(bomb, keep)


# Which ------------------------------------------------------------------------------------------------------------

def test_what_a_source_is_is_recognised(tmp_path: Path) -> None:
    def put(folder: str, **files: bytes) -> Path:
        for name, content in files.items():
            path = tmp_path / folder / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return tmp_path / folder

    shards.write([Document("a", ("x", A))], tmp_path / "interleaved", "train")
    write_tar(tmp_path / "labels/0.tar", {"a.png": A, "a.cls": b"0"})
    write_tar(tmp_path / "pairs/0.tar", {"a.png": A, "a.txt": b"0"})
    put("folders", cat__a_png=A)
    put("folders", classes_json=b'{"cat": "cat"}')
    put("text", a_txt=b"x")
    row: dict[str, dict[str, Any]] = {
        "llava": {"id": 1, "conversations": []}, "messages": {"messages": []}, "mmc4": {"text_list": [], "image_info": []},
        "obelics": {"images": [], "texts": []}, "edits": {"source_image": "", "edit_prompt": "", "edited_image": ""},
        "table": {"url": "", "caption": ""}}
    for name, fields in row.items():
        put(name, images__a_png=A)
        write_rows(tmp_path / name / "rows.jsonl", fields)
    for name in FORMATS:
        assert recognised(tmp_path / name, Reading())[0] == name
    assert recognised(put("pairs2", a_jpg=B, a_json=b"{}"), Reading())[0] == "pairs"
    assert recognised(write_rows(tmp_path / "x.jsonl", {"body": "x"}), Reading(columns={"text": "body"}))[0] == "text"
    with pytest.raises(ValueError, match=r"x.jsonl has body, which tells no format: name it with format"):
        recognised(tmp_path / "x.jsonl", Reading())
    with pytest.raises(FileNotFoundError, match="holds no picture"):
        recognised(put("empty", x_md=b""), Reading())


def test_the_command_knows_every_format() -> None:
    assert set(get_args(Format)) == {"auto", *FORMATS}
