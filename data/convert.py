"""What people have → raw shards: a source is read piece by piece, in any of the formats of data/formats/.

    OUT/train-000000.tar …    documents to train on, and seen-*.tar, a share that is held out by a hash of the name
    OUT/convert.json          what was read and written, and what was left out by cause
    OUT/pieces/               settings.json; PIECE.done.json for each piece that was read, and its shards until all are

A piece's shards and then its record appear whole, so a rerun goes on behind them; a piece whose file has changed is read again, and
other settings are refused. The shards come out of `pieces` together, once every piece was read and no more than `max_bad` of the
samples are bad: what lies in OUT is a whole set.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import count, islice, zip_longest
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

from data.convert_piece import (
    SPLITS,
    Conversion,
    Record,
    convert_piece,
    read_records,
    slug_of,
    write_record,
)
from data.files import write_json
from data.formats.piece import Piece
from data.formats.which import FORMATS, recognised
from data.processes import end_with_parent
from data.skipped import Skipped

VERSION = 1
"""Of what settings mean; shards of another one are not gone on with."""
Tell = Callable[[int, int, Mapping[str, float]], None]
"""Told (pieces done, pieces, {"documents/s": …}) after every piece."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What came of a source."""

    format: str
    """That it was read as."""
    pieces: int
    """That it has."""
    documents: dict[str, int]
    """Written, by split."""
    pictures: int
    """Written."""
    shards: int
    """Written."""
    skipped: Skipped
    """Samples left out."""
    dropped: Skipped
    """Pictures that documents went on without."""


def convert(source: Path, folder: Path, how: Conversion, progress: Tell = lambda done, total, measures: None, *, processes: int = 1,
            max_bad: float = 0.05) -> Summary:
    """Convert `source` into raw shards in `folder`, or go on with it.

    Errors: FileNotFoundError for nothing to read; ValueError for other settings than before, and past `max_bad`, the share of the
    samples that may be left out; BrokenProcessPool where one of several processes was killed."""
    if processes < 1:
        raise ValueError(f"processes is {processes}: there is at least one")
    if folder.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{folder} lies in {source}, of which it would become a part: write elsewhere")
    for path in (how.reading.images, how.reading.classes):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{path} does not exist: name the folder of the pictures, or the file of class names")
    if how.format == "auto":
        how = replace(how, format=recognised(source, how.reading)[0])
    pieces = FORMATS[how.format].pieces(source)
    if not pieces:
        raise FileNotFoundError(f"{source} holds no picture, table or tar of format {how.format}: {FORMATS[how.format].about}")
    home = folder / "pieces"
    _claim(home, how)
    records = _whole(home, folder, pieces)
    todo = [piece for piece in pieces if piece.name not in records]
    progress(len(records), len(pieces), {})
    began, written = perf_counter(), 0
    for record in _converted(todo, how, home, processes):
        records[record.piece] = record
        written += sum(record.documents.values())
        progress(len(records), len(pieces), {"documents/s": written / max(perf_counter() - began, 1e-6)})
    ordered = [records[piece.name] for piece in pieces]
    summary = _summary(how.format, ordered)
    _check(summary, source, how.held, max_bad)
    _publish(ordered, home, folder)
    write_json(folder / "convert.json", {**summary.__dict__, "skipped": json.loads(summary.skipped.to_json()),
                                         "dropped": json.loads(summary.dropped.to_json())})
    return summary


def _converted(pieces: Sequence[Piece], how: Conversion, home: Path, processes: int) -> Iterator[Record]:
    """Records as they are made. The first piece that fails ends the work, behind those that were begun."""
    processes = min(processes, len(pieces))
    if processes <= 1:
        yield from (convert_piece(piece, how, home) for piece in pieces)
        return
    # spawned: a fork takes torch's threads along as if they still ran
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        try:
            for future in as_completed([pool.submit(convert_piece, piece, how, home) for piece in pieces]):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _summary(name: str, records: Sequence[Record]) -> Summary:
    def joined(several: Iterator[dict[str, tuple[int, str]]]) -> Skipped:
        return Skipped.joined(Skipped.of_json(json.dumps(each)) for each in several)

    return Summary(format=name, pieces=len(records), documents={split: sum(r.documents[split] for r in records) for split in SPLITS},
                   pictures=sum(r.pictures for r in records), shards=sum(len(names) for r in records for names in r.shards.values()),
                   skipped=joined(r.skipped for r in records), dropped=joined(r.dropped for r in records))


def _check(summary: Summary, source: Path, held: float, max_bad: float) -> None:
    good, bad = sum(summary.documents.values()), summary.skipped.causes.total()
    if not good or bad > max_bad * (good + bad):
        raise ValueError(f"{source}: {bad:,} of {good + bad:,} samples are bad, more than max_bad = {max_bad:.2%}: {summary.skipped}. "
                         "Mend them, or raise max_bad and run again, which reads nothing twice; no shard was put out")
    if not summary.documents["train"] or (held and not summary.documents["seen"]):
        raise ValueError(f"{source}: {good:,} good documents are too few to train on some and hold out {held:.0%}: add some, or lower held")


# The folder -------------------------------------------------------------------------------------------------------

def _claim(home: Path, how: Conversion) -> None:
    """Mark the folder as one of these settings. Errors: ValueError where it belongs to others, or to something else."""
    keep = how.reading.keep
    flat = {name: value for each in (how, how.reading, keep, keep.limits) for name, value in vars(each).items()
            if name not in ("reading", "keep", "limits")}
    path, fields = home / "settings.json", json.loads(json.dumps({"version": VERSION, **flat}, default=str))
    if path.exists():
        before = json.loads(path.read_text())
        changed = [f"{name} was {before.get(name)}, now {fields.get(name)}" for name in {**before, **fields}
                   if before.get(name) != fields.get(name)]
        if changed:
            raise ValueError(f"{home.parent} was converted with other settings ({'; '.join(changed)}): write into another folder, or "
                             "remove this one")
        return
    if home.parent.exists() and any(home.parent.glob("*.tar")):
        raise ValueError(f"{home.parent} holds shards of something else: write into another folder")
    home.mkdir(parents=True, exist_ok=True)
    write_json(path, fields)


def _whole(home: Path, folder: Path, pieces: Sequence[Piece]) -> dict[str, Record]:
    """Records of what was read and has not changed; what has changed is removed. Errors: ValueError where a file has vanished."""
    now, places = {piece.name: piece for piece in pieces}, {piece.within for piece in pieces}
    records = dict[str, Record]()
    for record in read_records(home):
        piece = now.get(record.piece)
        if piece is None and record.piece.partition("#")[0] not in places:
            raise ValueError(f"{folder} holds documents of {record.piece}, which the source has no longer: bring it back, or write into "
                             "another folder")
        pending = [shard for split in SPLITS for shard in record.shards[split]]
        out = [shard for split in SPLITS for shard in record.published.get(split, ())]
        if piece is not None and record.state == piece.state() and all(
                (home / before).is_file() or (after and (folder / after).is_file()) for before, after in zip_longest(pending, out)):
            records[record.piece] = record
            continue
        for path in (home / f"{slug_of(record.piece)}.done.json", folder / "convert.json", *(home / shard for shard in pending),
                     *(folder / shard for shard in out)):
            path.unlink(missing_ok=True)
    return records


def _publish(records: Sequence[Record], home: Path, folder: Path) -> None:
    """Number the shards and move them out. Their numbers are written down first, so that it can be gone on with."""
    used = {shard for record in records for shards in record.published.values() for shard in shards}
    free = {split: _free(split, used) for split in SPLITS}
    for record in records:
        if not record.published:
            record = replace(record, published={split: list(islice(free[split], len(record.shards[split]))) for split in SPLITS})
            write_record(record, home)
        for split in SPLITS:
            for pending, shard in zip(record.shards[split], record.published[split], strict=True):
                if (home / pending).exists():
                    (home / pending).rename(folder / shard)


def _free(split: str, used: set[str]) -> Iterator[str]:
    return (name for number in count() if (name := f"{split}-{number:06d}.tar") not in used)
