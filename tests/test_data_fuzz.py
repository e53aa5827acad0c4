"""Damaged shards give what was in them or one clear error: never another document, another exception, a hang, or memory without end."""

import dataclasses
import hashlib
import io
import json
import resource
import shutil
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_model import sentences, text_tokenizer, visual_tokenizer, vocabulary

from data import shards, tar
from data.check import check
from data.config import DataConfig
from data.document import Document, TokenDocument
from data.encode import encode, write_manifest
from data.images import to_png
from data.index import index_path, read_index, read_manifest
from data.loader import Loader


def tries(count: int) -> settings:
    return settings(max_examples=count, database=None, suppress_health_check=[HealthCheck.too_slow])


few = tries(40)
REFUSED = (ValueError, FileNotFoundError)


def png(number: int) -> bytes:
    return to_png(np.random.default_rng(number).integers(0, 256, (24, 24, 3), np.uint8))


@cache
def documents() -> tuple[Document, ...]:
    words = iter(sentences(50, seed=4))
    pairs = [Document(f"p{i}", (png(i), next(words)), (next(words),), ((next(words), next(words)),)) for i in range(3)]
    return (*pairs, Document("t0", (next(words),)), Document("m0", (next(words), png(3), next(words), png(4)), meta={"n": [1, None]}),
            Document("c0", (png(5), next(words), next(words)), roles=("user", "user", "assistant")), Document("t1", (next(words),)))


@cache
def raw_bytes() -> bytes:
    with TemporaryDirectory() as folder:
        return shards.write(documents(), Path(folder), "train")[0].read_bytes()


@cache
def files() -> tuple[tuple[str, bytes], ...]:
    content = raw_bytes()
    return tuple((m.name, content[m.first:m.first + m.size]) for m in tar.members(content))


@contextmanager
def shard(content: bytes) -> Generator[Path]:
    """A raw shard alone in a folder; whoever reads it writes nothing beside it."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "raw" / "train-000000.tar"
        path.parent.mkdir()
        path.write_bytes(content)
        yield path
        assert set(path.parent.iterdir()) == {path} and {p.name for p in Path(folder).iterdir()} <= {"raw", "out"}


def read(path: Path) -> tuple[list[Document], bool]:
    """Documents before the first error, and whether there was one."""
    found: list[Document] = []
    try:
        found.extend(shards.read(path))
    except REFUSED:
        return found, True
    return found, False


def holds(content: bytes, complete: bool = True) -> None:
    """Reading gives original documents, all of them or an error; so does what `check` mends, and it says what it left out."""
    known = {d.key: d for d in documents()}
    with shard(content) as path:
        found, failed = read(path)
        assert all(known.get(d.key) == d for d in found)
        if complete and not failed:
            assert found == list(documents())
        report = check(path.parent, fix=path.parent.parent / "out")
        mended = list(shards.read_all(sorted((path.parent.parent / "out").glob("*.tar"))))
        assert all(known.get(d.key) == d for d in mended) and len(mended) == report.num_good
        assert len({d.key for d in mended}) == len(mended)
        assert report.findings or (not failed and len(found) == len(mended))
        assert complete is False or report.findings or mended == list(documents())


# Tars -------------------------------------------------------------------------------------------------------------

@few
@given(st.integers(0, len(raw_bytes())))
def test_a_tar_cut_anywhere(end: int) -> None:
    holds(raw_bytes()[:end])


def headers() -> list[int]:
    return [m.first - 512 for m in tar.members(raw_bytes())]


@few
@given(st.sampled_from(headers()), st.integers(0, 511), st.integers(1, 255))
def test_a_byte_changed_in_a_header(header: int, at: int, flip: int) -> None:
    content = bytearray(raw_bytes())
    content[header + at] ^= flip
    holds(bytes(content))


@few
@given(st.integers(0, len(raw_bytes()) - 1), st.integers(1, 255))
def test_a_byte_changed_anywhere_costs_no_other_sample(at: int, flip: int) -> None:
    """Tar has no checksum over content: what a changed byte of a text says cannot be known to be wrong."""
    content = bytearray(raw_bytes())
    content[at] ^= flip
    hit = [m.name.partition(".")[0] for m in tar.members(raw_bytes()) if m.first <= at < m.first + m.size]
    with shard(bytes(content)) as path:
        try:
            found = list(shards.samples(path))
        except REFUSED:
            found = None
        with shard(raw_bytes()) as original:
            wanted = list(shards.samples(original))
        assert found is None or [s for s in found if s["__key__"] not in hit] == [s for s in wanted if s["__key__"] not in hit]
        check(path.parent)


@few
@given(st.randoms(use_true_random=False), st.integers(0, 4), st.integers(0, 4))
def test_members_shuffled_repeated_and_lost(random: Any, repeated: int, lost: int) -> None:
    members = list(files())
    for _ in range(lost):
        del members[random.randrange(len(members))]
    for _ in range(repeated):
        members.insert(random.randrange(len(members) + 1), random.choice(members))
    if random.random() < 0.5:
        random.shuffle(members)
    out = io.BytesIO()
    tar.write(out, members)
    holds(out.getvalue(), complete=False)


def block(name: bytes, kind: bytes, size: bytes, link: bytes = b"", magic: bytes = b"ustar\x0000") -> bytes:
    """A header with a right checksum, whatever it says."""
    head = bytearray(512)
    head[:len(name[:100])] = name[:100]
    head[100:108], head[124:124 + len(size)], head[148:156], head[156:157] = b"0000644\0", size, b" " * 8, kind
    head[157:157 + len(link[:100])], head[257:265] = link[:100], magic
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


names = st.sampled_from([
    b"../x.json", b"/etc/x.json", b"../../../tmp/x.0.png", b"p0.json", b"p0/../p0.json", b"a\nb.json", b"\xff\xfe.json", b".json", b"json",
    b"x" * 100, b"C:\\x.json", b"__meta__", b"__x__/y.json", b"p0.0.png", b"", b"p0.", b"x.y.z.json"])
sizes = st.sampled_from([
    b"00000000000\0", b"77777777777\0", b"00000001000\0", b"99999999999\0", b"7" * 12, b"\x80" + bytes(10) + b"\x05",
    b"\x80" + b"\xff" * 11,
    b"\xff" * 12, b"\xff" * 11 + b"\x00", b"-0000000512\0", b" 0 0 0 0 0 0", b""])
kinds = st.sampled_from([b"0", b"\0", *(b"%d" % i for i in range(1, 8)), b"g", b"x", b"L", b"K", b"S", b"V", b"X", b"\xff"])
bodies = st.sampled_from([b"", b"junk" * 100, b"17 path=../x.json\n", b"30 path=x.json\n", b"9999999 path=x\n", b"9" * 600, b"0 =\n",
                          b"-5 path=x\n", b"28 size=99999999999999999999\n", b"20 size=-5120000000\n", b"18 hdrcharset=BIN\n", b"{}",
                          b"22 GNU.sparse.major=1\n30 GNU.sparse.realsize=99999999\n", b"12 path=a\0b\n", b"5 a=\n" * 100, b"\xff" * 512,
                          b"16 path=p0.json\n", bytes(512), b"22 GNU.sparse.map=0,1\n", b"13 path=\xff\xfe\xfd\n"])


@tries(150)
@given(st.integers(0, len(headers())), st.lists(st.tuples(names, kinds, sizes, bodies), min_size=1, max_size=3))
def test_members_that_mean_harm(place: int, odd: list[tuple[bytes, bytes, bytes, bytes]]) -> None:
    content, at = raw_bytes(), [*headers(), len(raw_bytes()) - 1024][place]
    inserted = b"".join(block(name, kind, size, b"/etc/passwd") + padded(body) for name, kind, size, body in odd)
    known = {d.key: d for d in documents()}
    with shard(content[:at] + inserted + content[at:]) as path:
        tracemalloc.start()
        found, failed = read(path)
        report = check(path.parent)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 5_000_000  # bytes; PIL's modules among them
        assert all(known.get(d.key) == d for d in found)
        assert failed or len(found) == len(known)
        assert report.findings or not failed


def test_a_negative_size_is_no_endless_loop() -> None:
    content = raw_bytes()
    evil = block(b"link", b"2", b"00000000000\0", b"x") + block(b"x.json", b"0", b"\xff" * 11 + b"\x00")
    with shard(evil + content) as path, pytest.raises(ValueError, match="the header at byte 512 is damaged"):
        list(shards.samples(path))


def test_names_of_every_kind_read_as_tarfile_reads_them() -> None:
    out = io.BytesIO()
    odd = ["ключ/ы.json", "x" * 180 + ".json", "d/" * 60 + "k.json", "a\nb.json", "\udcff.json"]
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as file:
        for name in odd:
            info = tarfile.TarInfo(name)
            info.size = 2
            file.addfile(info, io.BytesIO(b"{}"))
    assert [m.name for m in tar.members(out.getvalue())] == odd


# JSON -------------------------------------------------------------------------------------------------------------

leaves = st.sampled_from([None, True, 0, -1, 1e308, float("nan"), float("inf"), 10**30, "", "0.png", "json", "__key__", "a", "ab", "\ud800",
                          "user", "assistant", "system"])
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "0.png", "texts"]), inner,
                                                                                         max_size=2), max_leaves=6)
FIELDS = ("texts", "images", "captions", "questions", "meta", "roles")


def wanted(record: Any, sample: dict[str, bytes]) -> Document | None:
    """What README.md says of KEY.json, word for word; None for what is no document."""
    def said(value: Any) -> bool:
        return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)

    if not isinstance(record, dict):
        return None
    texts, images, captions, questions, meta, roles = (record.get(name, default) for name, default in
                                                       zip(FIELDS, (None, None, [], [], {}, []), strict=True))
    if not all(isinstance(each, list) for each in (texts, images, captions, questions, roles)) or not isinstance(meta, dict):
        return None
    if not texts or len(texts) != len(images) or any((a is None) == (b is None) for a, b in zip(texts, images, strict=True)):
        return None
    pictures = [name for name in images if name is not None]
    if not all(isinstance(name, str) and name in sample for name in pictures) or not all(said(t) for t in texts if t is not None):
        return None
    if not all(map(said, captions)) or not all(isinstance(q, list) and len(q) == 2 and all(map(said, q)) for q in questions):
        return None
    turns = [role for role, before in zip(roles, [None, *roles], strict=False) if role != before]
    spoken = turns[turns[:1] == ["system"]:]
    if roles and (len(roles) != len(texts) or spoken != ["user", "assistant"] * (len(spoken) // 2) or not spoken or captions or questions):
        return None
    parts = tuple(text if text is not None else sample[name] for text, name in zip(texts, images, strict=True))
    return Document("k", parts, tuple(captions), tuple((q, a) for q, a in questions), meta, tuple(roles))


words = st.text(max_size=3)
good = st.fixed_dictionaries({"texts": st.just(["a", None]), "images": st.just([None, "0.png"])}, optional={
    "captions": st.lists(words, max_size=2), "questions": st.lists(st.tuples(words, words).map(list)),
    "roles": st.just(["user", "assistant"])})


@tries(300)
@given(good | values, st.dictionaries(st.sampled_from(FIELDS), values, max_size=2), st.sampled_from((*FIELDS, None)))
def test_a_record_is_the_document_that_it_spells_or_none(record: Any, changes: dict[str, Any], dropped: str | None) -> None:
    if isinstance(record, dict):
        record = {name: value for name, value in {**record, **changes}.items() if name != dropped}
    sample = {"0.png": b"picture"}
    content = json.dumps(record).encode()
    try:
        document = shards.document_of({"__key__": "k", "json": content, **sample})
    except ValueError as error:
        assert str(error).partition(": ")[0] == "no document"
        document = None
    assert repr(document) == repr(wanted(json.loads(content), sample))  # NaN is not itself


NO_RECORD = {
    "nothing": b"", "deep list": b"[" * 100_000, "deep object": b'{"texts":' * 60_000, "UTF-16 cut": b"\xff\xfe\x00", "null": b"null",
    "NaN": b"NaN", "long number": b'{"texts": ["a"], "images": [null], "meta": {"n": ' + b"9" * 9999 + b"}}",
    "deep meta": b'{"meta":' + b"[" * 50_000 + b"]" * 50_000 + b', "texts":["a"],"images":[null]}', "empty": b"\xef\xbb\xbf{}",
    "latin 1": b'{"texts": ["\xff"], "images": [null]}',
    "half a character": b'{"texts": ["\\ud800"], "images": [null]}', "infinity": b'{"texts": [1e999], "images": [null]}',
    "its key": b'{"texts": [null], "images": ["__key__"]}', "itself": b'{"texts": [null], "images": ["json"]}'}


@pytest.mark.parametrize("name", NO_RECORD)
def test_bytes_that_are_no_record(name: str) -> None:
    with pytest.raises(ValueError, match=r"^no document: "):
        shards.document_of({"__key__": "k", "json": NO_RECORD[name]})
    with io.BytesIO() as out:
        tar.write(out, [*files(), ("k.json", NO_RECORD[name])])
        with shard(out.getvalue()) as path:
            assert read(path) == (list(documents()), True)
            assert check(path.parent).num_good == len(documents())


@few
@given(st.binary(max_size=40))
def test_any_bytes_are_no_record(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^no document: "):
        shards.document_of({"__key__": "k", "json": content})


@pytest.mark.parametrize("quick", [False, True])
def test_a_picture_that_would_fill_the_memory_is_a_line(quick: bool) -> None:
    bomb = bytearray(png(0))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    out = io.BytesIO()
    tar.write(out, [(name, bytes(bomb) if name == "p0.0.png" else content) for name, content in files()])
    with shard(out.getvalue()) as path:
        report = check(path.parent, quick=quick)
        assert report.counts == {"too large": 1} and report.findings[0].key == "p0"


# Token shards -----------------------------------------------------------------------------------------------------

@cache
def token_folder() -> Path:
    """Two token shards."""
    folder = Path(mkdtemp(prefix="mmllm-fuzz-"))
    more = [dataclasses.replace(d, key=f"x{d.key}") for d in documents()[::-1]]
    encode(shards.write([*documents(), *more], folder / "raw", "train", len(documents())), folder / "tokens", visual_tokenizer(),
           text_tokenizer(), vocabulary())
    return folder / "tokens"


@contextmanager
def tokens() -> Generator[Path]:
    with TemporaryDirectory() as folder:
        yield Path(shutil.copytree(token_folder(), Path(folder) / "tokens"))


@cache
def encoded() -> frozenset[bytes]:
    """Every document, as bytes."""
    found: set[bytes] = set()
    for path in shards.find(token_folder()):
        index, content = read_index(path), path.read_bytes()
        found |= {content[o:o + n] for o, n in zip(index.offsets, index.sizes, strict=True)}
    return frozenset(found)


def settings_of(folder: Path) -> DataConfig:
    return DataConfig(shards=folder, row_len=256, window=8, block_len=14)


def loads(folder: Path, same: bool) -> None:
    """Rows hold documents that were encoded, or there is one error; with `same`, the very rows or the error."""
    config = settings_of(folder)
    try:
        loader = Loader(config)
        rows = [loader.row(number) for number in range(3)]
        read_docs = [doc for number in range(3) for block, which in [loader.plan.row(number)]
                     for doc in loader.documents([place for place, *_ in block.members(which)])]
    except REFUSED:
        return
    assert all(doc.to_bytes() in encoded() for doc in read_docs)
    if same:
        original = Loader(dataclasses.replace(config, shards=token_folder()))
        assert all(np.array_equal(row.tokens, original.row(number).tokens) for number, row in enumerate(rows))


def checked(folder: Path, damaged: bool = True) -> None:
    for quick in (True, False):
        report = check(folder, quick=quick)
    assert bool(report.findings) == damaged


ARRAYS = ("keys", "key_hash", "offsets", "sizes", "first_part", "kinds", "lengths", "fingerprint", "content", "skipped")
EDITS: dict[str, Callable[[Any, int], Any]] = {
    "nan": lambda a, i: np.full(a.shape, np.nan), "floats": lambda a, i: a.astype(float) if a.dtype.kind in "iu" else a.astype(str) + "x",
    "negative": lambda a, i: put(a, i, -1), "huge": lambda a, i: put(a, i, np.iinfo(a.dtype).max if a.dtype.kind in "iu" else 10**6),
    "off by one": lambda a, i: put(a, i, a.flat[i % a.size] + 1 if a.dtype.kind in "iu" else b"?"),
    "short": lambda a, i: a[:-1] if a.ndim else a[None], "long": lambda a, i: np.concatenate([np.atleast_1d(a)] * 2),
    "empty": lambda a, i: np.atleast_1d(a)[:0], "reversed": lambda a, i: np.atleast_1d(a)[::-1],
    "matrix": lambda a, i: np.atleast_1d(a)[None], "objects": lambda a, i: a.astype(object), "zero": lambda a, i: np.zeros_like(a),
    "counted": lambda a, i: np.atleast_1d(np.arange(a.size)), "gone": lambda a, i: None}


def put(array: Any, at: int, value: Any) -> Any:
    out = np.array(array)
    if out.dtype.kind == "u" and isinstance(value, int) and value < 0:
        value = 2**64 - 1
    out.flat[at % max(out.size, 1)] = value
    return out


@pytest.mark.parametrize("name", ARRAYS)
def test_an_index_with_another_array_of_which_the_manifest_knows(name: str) -> None:
    with np.load(index_path(token_folder() / "train-000000.tar")) as arrays:
        fields = dict(arrays)
    for edit in EDITS.values():
        changed = edit(fields[name], 3)
        if changed is None or changed.shape != fields[name].shape or not np.array_equal(changed, fields[name]):
            with tokens() as folder:
                path = folder / "train-000000.tar"
                others: dict[str, Any] = {n: a for n, a in fields.items() if n != name}
                with index_path(path).open("wb") as file:
                    np.savez(file, **others, **({} if changed is None else {name: changed}))
                manifest = read_manifest(folder)
                manifest["shards"][path.name]["index"] = hashlib.sha256(index_path(path).read_bytes()).hexdigest()[:16]
                (folder / "manifest.json").write_text(json.dumps(manifest))
                loads(folder, same=False)
                checked(folder)


def spoilt(content: bytes, data: st.DataObject) -> bytes:
    """Cut, or with one byte changed."""
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        return content[:at]
    return content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1:]


@few
@given(st.data())
def test_an_index_with_other_bytes(data: st.DataObject) -> None:
    with tokens() as folder:
        path = index_path(folder / "train-000000.tar")
        path.write_bytes(spoilt(path.read_bytes(), data))
        with suppress(*REFUSED):
            read_index(folder / "train-000000.tar")
        loads(folder, same=True)
        checked(folder)


def test_an_index_that_declares_an_endless_array() -> None:
    with tokens() as folder:
        path = index_path(folder / "train-000000.tar")
        with np.load(path) as arrays:
            fields = dict(arrays)
        with zipfile.ZipFile(path, "w") as out:
            for name, array in fields.items():
                one = io.BytesIO()
                np.save(one, array)
                content = one.getvalue()
                if name == "lengths":
                    content = content.replace(b"(%d,), }" % len(array), b"(%d,), }" % 10**13)
                out.writestr(f"{name}.npy", content)
        with pytest.raises(ValueError, match="is damaged"):
            read_index(folder / "train-000000.tar")
        checked(folder)


@tries(30)
@given(st.sampled_from(["fingerprint", "vocab", "documents", "shards", "image_codes", "text_ids", "grammar_version"]), values)
def test_a_manifest_with_other_fields(name: str, value: Any) -> None:
    with tokens() as folder:
        manifest = read_manifest(folder)
        manifest[name] = value
        (folder / "manifest.json").write_text(json.dumps(manifest))
        for quick in (True, False):
            check(folder, quick=quick)
        loads(folder, same=False)


@few
@given(st.data())
def test_a_token_shard_with_other_bytes(data: st.DataObject) -> None:
    with tokens() as folder:
        path = folder / "train-000000.tar"
        whole = path.stat().st_size
        path.write_bytes(spoilt(path.read_bytes(), data))
        rows = []
        with suppress(*REFUSED):
            loader = Loader(settings_of(folder))
            rows = [loader.row(number) for number in range(3)]
        assert not rows or path.stat().st_size == whole
        report = check(folder)
        assert report.findings and check(folder, quick=True).num_samples


def test_the_index_of_another_shard() -> None:
    with tokens() as folder:
        shutil.copy(index_path(folder / "train-000001.tar"), index_path(folder / "train-000000.tar"))
        loads(folder, same=True)
        checked(folder)
        write_manifest(folder, shards.find(folder), read_manifest(folder)["fingerprint"], vocabulary())
        loads(folder, same=False)
        checked(folder)


@few
@given(st.binary(max_size=80))
def test_bytes_that_are_no_token_document(content: bytes) -> None:
    try:
        document = TokenDocument.from_bytes(content)
    except REFUSED:
        return
    assert document.to_bytes() == content


# A full disk ------------------------------------------------------------------------------------------------------

@contextmanager
def file_size_limit(size: int) -> Generator[None]:
    """A write beyond fails with EFBIG, as on a full disk with ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [1, 600, 2000, 8000])
def test_a_full_disk_leaves_no_shard_that_looks_whole(tmp_path: Path, size: int) -> None:
    raw = token_folder().parent / "raw"
    with file_size_limit(size), pytest.raises(OSError, match="too large"):
        shards.write(documents(), tmp_path / "raw", "train")
    with file_size_limit(size), pytest.raises(OSError, match="too large"):
        encode(shards.find(raw), tmp_path / "tokens", visual_tokenizer(), text_tokenizer(), vocabulary())
    with file_size_limit(size), pytest.raises(OSError, match="too large"):
        check(raw, fix=tmp_path / "mended")
    assert not [*tmp_path.glob("raw/*.tar"), *tmp_path.glob("mended/*.tar"), *tmp_path.glob("tokens/manifest.json")]
    for index in tmp_path.glob("tokens/*.npz"):
        read_index(index.with_name(index.name.replace(".idx.npz", ".tar")))
    encode(shards.find(raw), tmp_path / "tokens", visual_tokenizer(), text_tokenizer(), vocabulary())  # goes on where there is room again
    assert not [f for f in check(tmp_path / "tokens").findings if f.cause != "unfinished"]
