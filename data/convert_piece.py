"""One piece of a source → its shards and a record of what came of it.

A document gets a key of its own, a hash of where it lies in the source: that is unique, holds no dot, and is the same whatever else is
converted beside it. Another part of the hash says whether it is held out.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from data import shards, tar
from data.files import write_json
from data.formats.album import Album
from data.formats.piece import Piece, Refusal
from data.formats.reading import Reading
from data.formats.which import FORMATS
from data.skipped import Skipped

SPLITS = ("train", "seen")
KEY_LEN = 20
"""Hex digits of a key: two of a billion documents share one with a chance of 4e-7."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Everything but the source that decides what is written."""

    format: str = "auto"
    """Name in `data.formats.which.FORMATS`; auto looks at what is there."""
    reading: Reading = field(default_factory=Reading)
    """How it is read, and what of a picture is kept."""
    held: float = 0.05
    """Share of the documents that is held out, into seen-*.tar."""
    shard_len: int = 4096
    """Most documents of a shard."""
    shard_bytes: int = 256 << 20
    """Most bytes of a shard; as much is held in memory by each process. A document larger than this is a shard of its own."""

    def __post_init__(self) -> None:
        if self.format != "auto" and self.format not in FORMATS:
            raise ValueError(f"format is {self.format!r}: it is auto or one of {', '.join(FORMATS)}")
        if not 0 <= self.held < 1 or self.shard_len < 1 or self.shard_bytes < 1:
            raise ValueError(f"held is {self.held}, shard_len {self.shard_len} and shard_bytes {self.shard_bytes}: held is in [0, 1), the "
                             "others are at least 1")


@dataclass(frozen=True, kw_only=True)
class Record:
    """What came of a piece."""

    piece: str
    """Its name."""
    state: str
    """Of its files when it was read."""
    documents: dict[str, int]
    """Written, by split."""
    pictures: int
    """Written."""
    skipped: dict[str, tuple[int, str]]
    """Samples left out: {cause: (count, the first)}."""
    dropped: dict[str, tuple[int, str]]
    """Pictures that documents went on without."""
    shards: dict[str, list[str]]
    """Names beside the record, by split."""
    published: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """Names that they have in the set, or will."""


def convert_piece(piece: Piece, how: Conversion, home: Path) -> Record:
    """Read one piece and write its shards, then its record, into `home`. Errors: ValueError for a piece that cannot be read at all."""
    slug, began = slug_of(piece.name), piece.state()
    for stray in home.glob(f"{slug}-*"):
        stray.unlink()
    root = how.reading.images or (piece.source if piece.source.is_dir() else piece.source.parent)
    album, skipped, names, pictures = Album(root, how.reading.keep, how.reading.missing == "drop"), Skipped(), set[str](), 0
    writers = {split: _Writer(home, f"{slug}-{split}", how) for split in SPLITS}
    prefix = "" if piece.within == "." else f"{piece.within}/"
    for item in FORMATS[how.format].read(piece, how.reading, album):
        raw = (prefix + (item.name if isinstance(item, Refusal) else item.key)).encode(errors="surrogateescape")
        name, digest = raw.decode(errors="replace"), hashlib.sha256(raw).hexdigest()
        if isinstance(item, Refusal):
            skipped.refuse(item.error, name)
        elif digest in names:
            skipped.add("duplicate name", name)
        else:
            names.add(digest)
            try:
                sample = shards.sample_of(replace(item, key=digest[:KEY_LEN], meta={"name": name, **item.meta}))
            except UnicodeEncodeError as error:  # halves of characters, which JSON can hold
                skipped.add("text is not UTF-8", f"{name}: {error.reason}")
                continue
            writers["seen" if int(digest[-8:], 16) < how.held * 2**32 else "train"].add(sample)
            pictures += sum(isinstance(part, bytes) for part in item.parts)
    for writer in writers.values():
        writer.flush()
    if piece.state() != began:
        raise ValueError(f"{piece.name} changed while it was read: run again when it is whole")
    record = Record(piece=piece.name, state=began, documents={split: writer.documents for split, writer in writers.items()},
                    pictures=pictures, skipped=json.loads(skipped.to_json()), dropped=json.loads(album.dropped.to_json()),
                    shards={split: writer.names for split, writer in writers.items()})
    write_record(record, home)
    return record


class _Writer:
    """Shards of one split of a piece."""

    def __init__(self, home: Path, prefix: str, how: Conversion) -> None:
        self.home, self.prefix, self.how = home, prefix, how
        self.batch, self.bytes, self.documents, self.names = list[dict[str, object]](), 0, 0, list[str]()

    def add(self, sample: dict[str, object]) -> None:
        size = sum(tar.BLOCK + -(-len(content) // tar.BLOCK) * tar.BLOCK for content in sample.values() if isinstance(content, bytes))
        if self.batch and (len(self.batch) == self.how.shard_len or self.bytes + size > self.how.shard_bytes - tar.RECORD):
            self.flush()
        self.batch.append(sample)
        self.bytes, self.documents = self.bytes + size, self.documents + 1

    def flush(self) -> None:
        if self.batch:
            self.names.append(f"{self.prefix}-{len(self.names):04d}.tar")
            shards.write_tar(self.home / self.names[-1], self.batch)
            self.batch, self.bytes = [], 0


# Records ----------------------------------------------------------------------------------------------------------

def slug_of(piece: str) -> str:
    """What a piece's files are called: its name may be long, and hold anything."""
    return hashlib.sha256(piece.encode(errors="surrogateescape")).hexdigest()[:16]


def write_record(record: Record, home: Path) -> None:
    write_json(home / f"{slug_of(record.piece)}.done.json", asdict(record))


def read_records(home: Path) -> list[Record]:
    return [Record(**json.loads(path.read_text())) for path in sorted(home.glob("*.done.json"))]
