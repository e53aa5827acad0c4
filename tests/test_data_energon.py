"""What is written beside raw shards is what `energon prepare` writes for them, and Energon reads the documents from it."""

import io
import json
import os
import random
import shutil
import sqlite3
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data import energon, shards
from data.document import Document
from mmllm.verbs.store import VERBS, NvMeta

SPLITS = {"train": "train-", "val": "val-", "test": "test-"}
SCHEMA = {  # of the index.sqlite that megatron-energon 7.4.1 writes: table: columns as (name, type, not null)
    "samples": [("tar_file_id", "INTEGER", 1), ("sample_key", "TEXT", 1), ("sample_index", "INTEGER", 1), ("byte_offset", "INTEGER", 0),
                ("byte_size", "INTEGER", 0)],
    "sample_parts": [("tar_file_id", "INTEGER", 0), ("sample_index", "INTEGER", 0), ("part_name", "TEXT", 0),
                     ("content_byte_offset", "INTEGER", 0), ("content_byte_size", "INTEGER", 0)],
}
INDEXES = {
    "idx_samples_by_tar_and_idx": ["tar_file_id", "sample_index"],
    "idx_sample_parts_seq": ["tar_file_id", "sample_index", "content_byte_offset"],
    "idx_sample_parts_full": ["tar_file_id", "sample_index", "part_name", "content_byte_offset", "content_byte_size"],
    "sqlite_autoindex_samples_1": ["sample_key"],
}


def picture(color: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (color, 0, 255)).save(file, "PNG")
    return file.getvalue()


def raw_shards(folder: Path) -> list[Document]:
    """Two shards to train on, one of another set; a shard with long names and a folder, which the plain reader does not place."""
    documents = [Document(f"d{i}", ("before", picture(i), "behind")[:1 + i % 3] if i % 5 else (picture(i), "words")) for i in range(20)]
    shards.write(documents[:12], folder, "train", shard_len=6)
    shards.write(documents[12:16], folder, "seen")
    with tarfile.open(folder / "train-000009.tar", "w") as file:
        directory = tarfile.TarInfo("in")
        directory.type = tarfile.DIRTYPE
        file.addfile(directory)
        for document in documents[16:]:
            for name, content in shards.sample_of(document).items():
                if isinstance(content, bytes):
                    info = tarfile.TarInfo(f"in/{'long' * 30}{document.key}.{name}")
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))
        file.addfile(tarfile.TarInfo("__about__"))
    return documents


def tables(path: Path) -> dict[str, Any]:
    """What an index.sqlite is made of."""
    with sqlite3.connect(path) as database:
        rows = {table: sorted(database.execute(f"SELECT * FROM {table}")) for table in SCHEMA}
        columns = {table: [(c[1], c[2], c[3]) for c in database.execute(f"PRAGMA table_info({table})")] for table in SCHEMA}
        named = [name for name, in database.execute("SELECT name FROM sqlite_master WHERE type = 'index'")]
        indexes = {name: [c[2] for c in database.execute(f"PRAGMA index_info({name})")] for name in named}
    return {"rows": rows, "columns": columns, "indexes": indexes}


def test_every_sample_and_member_is_where_the_index_says(tmp_path: Path) -> None:
    raw_shards(tmp_path)
    meta = energon.write(tmp_path, SPLITS)
    found = tables(meta / "index.sqlite")
    assert found["columns"] == SCHEMA and found["indexes"] == INDEXES
    names = [path.name for path in shards.find(tmp_path)]
    keys = {(number, index): key for number, key, index, _, _ in found["rows"]["samples"]}
    parts = {(keys[number, index], part): (names[number], first, size)
             for number, index, part, first, size in found["rows"]["sample_parts"]}
    whole = {name: (tmp_path / name).read_bytes() for name in names}
    for name in names:
        offsets = struct.unpack(f"<{(tmp_path / f'{name}.idx').stat().st_size // 8}Q", (tmp_path / f"{name}.idx").read_bytes())
        with tarfile.open(tmp_path / name) as file:
            members = [m for m in file if m.isreg() and "." in m.name]
            assert offsets[-1] == file.offset
        for member in members:
            assert parts[tuple(member.name.split(".", 1))] == (name, member.offset_data, member.size)  # type: ignore[index]
        begins = {member.name.split(".")[0]: member.offset for member in reversed(members)}
        assert list(offsets[:-1]) == sorted(begins.values())
        assert all(begin == begins[key] and begin + size in offsets
                   for number, key, _, begin, size in found["rows"]["samples"] if names[number] == name)
    for sample in shards.samples(tmp_path / names[0]):
        place, first, size = parts[str(sample["__key__"]), "json"]
        assert whole[place][first:first + size] == sample["json"]
    assert json.loads((meta / ".info.json").read_text()) == {"energon_version": "7.4.1", "shard_counts": {
        "seen-000000.tar": 4, "train-000000.tar": 6, "train-000001.tar": 6, "train-000009.tar": 4}}


def test_splits_are_the_wanted_ones_and_every_other_set(tmp_path: Path) -> None:
    names = ["b-1.tar", "b-2.tar", "c-0-1.tar", "train-0.tar", "x.tar"]
    assert energon.split_parts(names, {"train": "b-", "val": "c", "test": "test-"}) == {
        "train": ["b-1.tar", "b-2.tar"], "val": ["c-0-1.tar"], "test": [], "b": ["b-1.tar", "b-2.tar"], "c-0": ["c-0-1.tar"],
        "x": ["x.tar"]}
    with pytest.raises(ValueError, match=r"no shard's name begins with 'train-', .* say with --train which do \(seen\)"):
        energon.split_parts(["seen-0.tar"], SPLITS)
    with pytest.raises(ValueError, match="braces in its name"):
        energon.split_parts(["a{0,1}.tar"], {})


def test_writing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    raw_shards(tmp_path)
    VERBS["data nv-meta"].run(NvMeta(raw=tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    energon.write(tmp_path, SPLITS)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    shards.write([Document("new", ("words",))], tmp_path, "train")
    energon.write(tmp_path, SPLITS)
    assert (tmp_path / ".nv-meta" / "index.uuid").read_text() != before[tmp_path / ".nv-meta" / "index.uuid"].decode()


def test_what_energon_refuses_is_refused_by_name(tmp_path: Path) -> None:
    raw_shards(tmp_path)
    shards.write([Document("d13", ("words",))], tmp_path, "train", shard_len=1)
    with pytest.raises(ValueError, match=r"sample d13 is in shard .*seen-000000.tar and again in .*train-000000.tar"):
        energon.write(tmp_path, SPLITS)
    assert not (tmp_path / ".nv-meta" / ".info.json").exists()
    shards.write_tar(tmp_path / "train-000000.tar", [])
    with pytest.raises(ValueError, match=r"train-000000.tar holds no sample"):
        energon.write(tmp_path, SPLITS)
    (tmp_path / "train-000000.tar").write_bytes((tmp_path / "train-000001.tar").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"shard .*train-000000.tar is damaged: "):
        energon.write(tmp_path, SPLITS)
    shards.write_tar(tmp_path / "train-000000.tar", [{"__key__": "\udcff", "txt": b""}])
    with pytest.raises(ValueError, match=r"train-000000.tar: member '\\udcff.txt' has a name that is no text"):
        energon.write(tmp_path, SPLITS)


def test_energon_prepare_writes_the_same(tmp_path: Path) -> None:
    pytest.importorskip("megatron.energon")
    raw_shards(tmp_path / "ours")
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    energon.write(tmp_path / "ours", SPLITS)
    subprocess.run([Path(sys.executable).parent / "energon", "prepare", "--non-interactive", "--num-workers", "1", "--split-parts",
                    "train:train-.*", "--split-parts", "val:val-.*", "--sample-type", "CrudeWebdataset", str(tmp_path / "theirs")],
                   check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    ours, theirs = tmp_path / "ours" / ".nv-meta", tmp_path / "theirs" / ".nv-meta"
    assert tables(ours / "index.sqlite") == tables(theirs / "index.sqlite")
    assert (ours / "crude.yaml").read_text() == (theirs / "dataset.yaml").read_text()
    assert json.loads((ours / ".info.json").read_text())["shard_counts"] == json.loads((theirs / ".info.json").read_text())["shard_counts"]
    for path in (tmp_path / "theirs").glob("*.idx"):
        assert (tmp_path / "ours" / path.name).read_bytes() == path.read_bytes()


def test_energon_reads_the_documents(tmp_path: Path) -> None:
    theirs = pytest.importorskip("megatron.energon")
    documents = {document.key: document for document in raw_shards(tmp_path)}
    energon.write(tmp_path, SPLITS)
    alone = theirs.WorkerConfig(rank=0, world_size=1, num_workers=0)

    def read(split: str, **how: Any) -> list[Any]:
        return list(theirs.get_loader(theirs.get_val_dataset(tmp_path, split_part=split, worker_config=alone, batch_size=None, **how)))

    for split, keys in (("train", set(documents) - {"d12", "d13", "d14", "d15"}), ("seen", {"d12", "d13", "d14", "d15"})):
        got = {sample.__key__.rpartition("long")[2]: sample.sequence for sample in read(split)}
        assert set(got) == keys
        for key, sequence in got.items():
            parts = documents[key].parts
            assert [part if isinstance(part, str) else tuple(part.shape) for part in sequence] == [
                part if isinstance(part, str) else (3, 3, 4) for part in parts]
            for part in sequence:
                assert isinstance(part, str) or round(float(part[0, 0, 0]) * 255) == int(key[1:])

    class Cooking(theirs.DefaultTaskEncoder):
        cookers = (theirs.Cooker(theirs.stateless(lambda sample: theirs.TextSample(
            **theirs.basic_sample_keys(sample), text=str(sample["json"]["texts"])))),)

    crude = read("seen", dataset_config="crude.yaml", task_encoder=Cooking())
    texts = [part if isinstance(part, str) else None for part in documents["d13"].parts]
    assert {sample.__key__: sample.text for sample in crude}["d13"] == str(texts)


def test_a_random_tar_is_indexed_as_tarfile_reads_it(tmp_path: Path) -> None:
    rng = random.Random(1)
    names = [f"{i}{'n' * rng.choice((1, 90, 120))}" for i in range(30)]
    shards.write_tar(tmp_path / "x.tar", [{"__key__": name, "txt": rng.randbytes(rng.choice((0, 511, 512, 513)))} for name in names])
    found, end = energon.samples(tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar") as file:
        assert [(s.key, s.begin, s.parts[0].first) for s in found] == [(m.name[:-4], m.offset, m.offset_data) for m in file]
        assert end == file.offset
