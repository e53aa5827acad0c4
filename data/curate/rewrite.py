"""Raw shards → new raw shards of the same names, of which a judge has left out or changed documents. The source stays as it is.

    train-000000.tar             what is left of train-000000.tar; missing where nothing is
    train-000000.curation.json   its counts; written last, so a shard that has them is whole and is not made again
    settings.json                what decided; the folder takes no shards that others decided on
    curation.json                counts of all shards: read = kept + dropped, by cause, each with the first document

A document goes through as the bytes that it was, members that it does not name included, unless the judge changes it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data import shards
from data.curate.workers import Tell, on_each, silent
from data.files import write_json
from data.skipped import Skipped

Sample = dict[str, bytes | str]
"""As `data.shards.samples` gives it: "__key__", "json" and pictures by member name."""
Judge = Callable[[Sample, Skipped], Sample]
"""→ the sample as it shall be, the same object where nothing changed. What it notes in the second is counted beside. Errors: ValueError
"cause: …" for a document that is dropped."""
JudgeOf = Callable[[Path], Judge]
"""The judge of one raw shard, made where the shard is read: it goes to other processes as it is."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of documents."""

    read: int = 0
    kept: int = 0
    changed: int = 0
    """Of those kept."""
    dropped: Skipped = field(default_factory=Skipped)
    noted: Skipped = field(default_factory=Skipped)
    """What was left out of documents that were kept, and other things worth a count."""

    def to_record(self) -> dict[str, Any]:
        return {"read": self.read, "kept": self.kept, "changed": self.changed, "dropped": json.loads(self.dropped.to_json()),
                "noted": json.loads(self.noted.to_json())}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "Report":
        return cls(read=record["read"], kept=record["kept"], changed=record["changed"],
                   dropped=Skipped.of_json(json.dumps(record["dropped"])), noted=Skipped.of_json(json.dumps(record["noted"])))

    @classmethod
    def joined(cls, several: Sequence["Report"]) -> "Report":
        return cls(read=sum(r.read for r in several), kept=sum(r.kept for r in several), changed=sum(r.changed for r in several),
                   dropped=Skipped.joined(r.dropped for r in several), noted=Skipped.joined(r.noted for r in several))

    def __str__(self) -> str:
        lines = [f"read {self.read:,} documents: kept {self.kept:,} ({self.changed:,} of them changed), dropped "
                 f"{self.dropped.causes.total():,}"]
        for title, counts in (("dropped", self.dropped), ("noted", self.noted)):
            lines += [f"  {title} {count:,} × {cause} (first: {counts.first[cause]})" for cause, count in counts.causes.most_common()]
        return "\n".join(lines)


def rewrite(source: Sequence[Path], out: Path, judge_of: JudgeOf, settings: Mapping[str, object], processes: int = 1,
            progress: Tell = silent, also: Callable[[Report], Mapping[str, object]] = lambda report: {}) -> Report:
    """Judge every document of `source` and write those that stay into `out`, which may hold some shards already. `settings` are all
    that the judge goes by, and what a second call must bring too; `also` goes into `curation.json`. Errors: ValueError,
    FileNotFoundError; `workers.ProcessFailed`."""
    claim(out, source, settings)
    missing = [path for path in source if _done(path, out) is None]
    on_each(partial(_rewrite_one, out=out, judge_of=judge_of), missing, processes, progress, len(source) - len(missing))
    reports = {path: _done(path, out) for path in source}
    report = Report.joined([found for found in reports.values() if found is not None])
    written = {path.name: found.kept for path, found in reports.items() if found is not None}
    record = {"settings": settings, **report.to_record(), **also(report), "shards": written}
    write_json(out / "curation.json", record, by_many=True)
    return report


def claim(out: Path, source: Sequence[Path], settings: Mapping[str, object]) -> None:
    """Mark a folder as made with these settings. Errors: ValueError where it is not, or where it is the source."""
    if any(path.parent.resolve() == out.resolve() for path in source):
        raise ValueError(f"{out} holds the shards that are read: curated ones go to another folder")
    if len({path.name for path in source}) < len(source):
        raise ValueError(f"of {len(source)} raw shards some have the same name: curate a folder at a time")
    out.mkdir(parents=True, exist_ok=True)
    marker = out / "settings.json"
    mine = json.loads(json.dumps(settings))
    if marker.exists():
        theirs = json.loads(marker.read_text())
        other = [f"{name} = {theirs.get(name)!r}, not {mine.get(name)!r}" for name in {**theirs, **mine}
                 if theirs.get(name) != mine.get(name)]
        if other:
            raise ValueError(f"{out} was made with {'; '.join(other)}: write to another folder, or remove this one")
        return
    if any(out.glob("*.tar")):
        raise ValueError(f"{out} holds tars that no curation wrote: write to another folder")
    write_json(marker, mine, by_many=True)


def _rewrite_one(path: Path, out: Path, judge_of: JudgeOf) -> int:
    judge, read, kept, changed = judge_of(path), 0, 0, 0
    dropped, noted = Skipped(), Skipped()

    def judged() -> Iterator[Sample]:
        nonlocal read, kept, changed
        for sample in shards.samples(path):
            read += 1
            beside = Skipped()
            try:
                found = judge(sample, beside)
            except ValueError as error:
                dropped.refuse(error, str(sample["__key__"]))
                continue
            kept, changed = kept + 1, changed + (found is not sample)
            for cause, count in beside.causes.items():
                noted.causes[cause] += count
                noted.first.setdefault(cause, beside.first[cause])
            yield found

    target = out / path.name
    shards.write_tar(target, judged())
    if not kept:
        target.unlink()
    report = Report(read=read, kept=kept, changed=changed, dropped=dropped, noted=noted)
    record = {**report.to_record(), "source_bytes": path.stat().st_size, "bytes": target.stat().st_size if kept else 0}
    write_json(_counts_path(path, out), record, by_many=True)
    return read


def _counts_path(path: Path, out: Path) -> Path:
    return out / f"{path.stem}.curation.json"


def _done(path: Path, out: Path) -> Report | None:
    """Counts of a shard that is whole. Errors: ValueError where it was made from, or is by now, another file."""
    counts, target = _counts_path(path, out), out / path.name
    if not counts.exists():
        return None
    record = json.loads(counts.read_text())
    if record["source_bytes"] != path.stat().st_size:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, and had {record['source_bytes']:,} when {target} was made of it: "
                         f"remove {counts} to make it again")
    if record["bytes"] != (target.stat().st_size if target.exists() else 0):
        raise ValueError(f"{target} is not as it was written ({record['bytes']:,} bytes): remove {counts} to make it again")
    return Report.of_record(record)


def content_of(path: Path | None) -> str | None:
    """A file's name in settings: 16 hex digits of what it holds. Errors: FileNotFoundError."""
    if path is None:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, or is no file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


