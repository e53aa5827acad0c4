"""`.nv-meta` beside raw shards: a folder that Energon opens as a dataset of its own.

Nothing of Energon is needed, or imported: these are the files that `energon prepare` of megatron-energon 7.4.1 writes for the same
shards, laid out as its documentation says ("Dataset Format on Disk") and, where that is silent, as a comparison of the two shows.

    NAME.tar.idx             uint64: the byte where each sample begins, and where the last one ends
    .nv-meta/index.sqlite    samples and their members, by key
    .nv-meta/index.uuid      a name for that index
    .nv-meta/split.yaml      shards of each split
    .nv-meta/dataset.yaml    reads samples as InterleavedSample, by sample_loader.py
    .nv-meta/crude.yaml      or as they are, for a cooker: dataset_config="crude.yaml"
    .nv-meta/.info.json      samples of each shard; written last, since Energon takes a folder that has it for whole
"""

import hashlib
import json
import sqlite3
import struct
import tarfile
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from data import shards, tar
from data.files import written

ENERGON = "7.4.1"
"""Whose layout this is."""

SCHEMA = """
CREATE TABLE samples (tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE, sample_index INTEGER NOT NULL,
                      byte_offset INTEGER, byte_size INTEGER);
CREATE TABLE sample_parts (tar_file_id INTEGER, sample_index INTEGER, part_name TEXT, content_byte_offset INTEGER,
                           content_byte_size INTEGER);
"""
INDEXES = """
CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index);
CREATE INDEX idx_sample_parts_seq ON sample_parts(tar_file_id, sample_index, content_byte_offset);
CREATE INDEX idx_sample_parts_full ON sample_parts(tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size);
"""
CRUDE = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
INTERLEAVED = """sample_type:
  __module__: megatron.energon
  __class__: InterleavedSample
part_filter: sample_loader.py:part_filter
sample_loader: sample_loader.py:sample_loader
"""
SAMPLE_LOADER = '''"""KEY.json and its pictures, decoded by Energon, become the parts of an InterleavedSample in reading order."""


def sample_loader(raw: dict) -> dict:
    parts = zip(raw["json"]["texts"], raw["json"]["images"], strict=True)
    return {"__key__": raw["__key__"], "sequence": [raw[image] if text is None else text for text, image in parts]}


def part_filter(part: str) -> bool:
    return True
'''


class Member(NamedTuple):
    name: str
    begin: int
    """byte in the tar where its header begins, the header that holds a long name included"""
    first: int
    """byte where its content begins"""
    size: int
    """bytes"""


class Part(NamedTuple):
    name: str
    """What stands behind the key: json, 0.png."""
    first: int
    size: int


class Sample(NamedTuple):
    key: str
    begin: int
    parts: list[Part]


def write(folder: Path, splits: Mapping[str, str], progress: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """Index the raw shards of `folder` for Energon; what is there of it is written again. → `.nv-meta`

    splits: {"train": "train-", …}, the shards of a split by how their names begin; each name up to the last dash is a split too.
    Errors: ValueError that names a shard that is damaged or empty, a key that is there twice, a split without shards."""
    paths = shards.find(folder)
    parts = split_parts([path.name for path in paths], splits)
    meta = folder / ".nv-meta"
    meta.mkdir(exist_ok=True)
    (meta / ".info.json").unlink(missing_ok=True)
    partial = meta / "index.sqlite.partial"
    partial.unlink(missing_ok=True)
    counts, digest = dict[str, int](), hashlib.blake2b()
    database = sqlite3.connect(partial)
    try:
        database.executescript(SCHEMA)
        for number, path in enumerate(paths):
            progress(number, len(paths))
            found, end = samples(path)
            begins = [sample.begin for sample in found] + [end]
            offsets = struct.pack(f"<{len(begins)}Q", *begins)
            with written(path.with_suffix(".tar.idx")) as beside:
                beside.write_bytes(offsets)
            _insert(database, paths, number, found, begins)
            counts[path.name] = len(found)
            digest.update(f"{path.name}\n".encode() + offsets + "\n".join(sample.key for sample in found).encode(errors="surrogateescape"))
        database.executescript(INDEXES)
        database.commit()
    finally:
        database.close()
    partial.rename(meta / "index.sqlite")
    files = {"index.uuid": str(uuid.uuid5(uuid.NAMESPACE_OID, digest.hexdigest())), "split.yaml": _yaml(parts), "crude.yaml": CRUDE,
             "dataset.yaml": INTERLEAVED, "sample_loader.py": SAMPLE_LOADER,
             ".info.json": json.dumps({"energon_version": ENERGON, "shard_counts": counts}, indent=2)}
    for name, text in files.items():
        with written(meta / name) as beside:
            beside.write_text(text)
    progress(len(paths), len(paths))
    return meta


def split_parts(names: Sequence[str], splits: Mapping[str, str]) -> dict[str, list[str]]:
    """Shards of each split: the wanted ones, and every other name up to the last dash."""
    if odd := [name for name in names if set("{}") & set(name)]:
        raise ValueError(f"shard {odd[0]} has braces in its name, which Energon expands: rename it")
    parts = {split: [name for name in names if name.startswith(prefix)] for split, prefix in splits.items()}
    if not parts.get("train", names):
        others = sorted({name.rpartition("-")[0] for name in names})
        raise ValueError(f"no shard's name begins with {splits['train']!r}, so nothing would be trained on: say with --train which do "
                         f"({', '.join(others[:5])})")
    for name in names:
        stem = name.rpartition("-")[0] or name.removesuffix(".tar")
        if stem not in splits:
            parts.setdefault(stem, []).append(name)
    return parts


def samples(path: Path) -> tuple[list[Sample], int]:
    """The samples of a tar in order, and the byte where the last one ends. Errors: ValueError that names it where it is damaged."""
    found: list[Sample] = []
    try:
        members, end = _members(path)
    except (ValueError, tarfile.TarError) as error:
        raise ValueError(f"shard {path} is damaged: {error}") from error
    for member in members:
        place = tar.key_of(member.name)
        if place is None:
            continue
        if not member.name.isprintable():  # halves of characters among them, which SQLite refuses
            raise ValueError(f"shard {path}: member {member.name!r} has a name that is no text: write the shard again under other keys")
        key, part = place
        if not found or found[-1].key != key:
            found.append(Sample(key, member.begin, []))
        found[-1].parts.append(Part(part, member.first, member.size))
    if not found:
        raise ValueError(f"shard {path} holds no sample, which Energon refuses: remove it")
    return found, end


def _members(path: Path) -> tuple[list[Member], int]:
    """The files of a tar, and where its last member ends."""
    with tar.opened(path) as content:
        plain = tar.members(content)
    begins = [0, *(member.first + -(-member.size // tar.BLOCK) * tar.BLOCK for member in plain)]
    if all(member.first - tar.BLOCK == begin for member, begin in zip(plain, begins, strict=False)):
        return [Member(member.name, begin, member.first, member.size) for member, begin in zip(plain, begins, strict=False)], begins[-1]
    with tarfile.open(path) as other:  # a long name, a link, a folder: where a header begins is in no list of ours
        return [Member(m.name, m.offset, m.offset_data, m.size) for m in other if m.isreg()], other.offset


def _insert(database: sqlite3.Connection, paths: Sequence[Path], number: int, found: Sequence[Sample], begins: Sequence[int]) -> None:
    sizes = (end - begin for begin, end in pairwise(begins))
    rows = [(number, sample.key, index, sample.begin, size) for index, (sample, size) in enumerate(zip(found, sizes, strict=True))]
    inserted = database.executemany("INSERT OR IGNORE INTO samples VALUES (?, ?, ?, ?, ?)", rows).rowcount
    if inserted < len(rows):
        for _, key, index, *_ in rows:
            other = database.execute("SELECT tar_file_id, sample_index FROM samples WHERE sample_key = ?", (key,)).fetchone()
            if other != (number, index):
                raise ValueError(f"sample {key} is in shard {paths[other[0]]} and again in {paths[number]}: Energon takes a key once")
    parts = ((number, index, *part) for index, sample in enumerate(found) for part in sample.parts)
    database.executemany("INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)", parts)


def _yaml(parts: Mapping[str, Iterable[str]]) -> str:
    lines = ["split_parts:"]
    for split, names in parts.items():
        listed = [f"  - {json.dumps(name)}" for name in names]
        lines += [f"  {json.dumps(split)}:", *listed] if listed else [f"  {json.dumps(split)}: []"]
    return "\n".join([*lines, "exclude: []", ""])
