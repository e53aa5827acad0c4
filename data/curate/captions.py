"""Other captions for pictures, from a file of lines {"key": …, "caption": "…"} or {"key": …, "captions": ["…", …]}.

Captions belong to documents with one picture, at most one text part, and no turns: the first becomes the text part, the others `captions`.
Lines of one key add up. The file is read by an index of 16 bytes a line, so it may be larger than memory.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data import shards
from data.curate.parts import to_json
from data.curate.rewrite import Judge, Report, Sample, claim, content_of, rewrite
from data.curate.workers import Tell, silent
from data.skipped import Skipped

NO_LINE = "no caption for it"


@dataclass(frozen=True, kw_only=True)
class Recaption:
    """Which captions, and what becomes of those that are there."""

    captions: Path
    """A file of lines {"key": …, "caption": …} or {"key": …, "captions": […]}."""
    how: Literal["replace", "add"] = "replace"
    """"replace": the new ones alone; "add": behind the old ones, but for those that are there already."""
    missing: Literal["keep", "drop"] = "keep"
    """A document without a line stays as it is, or is dropped."""


@dataclass(frozen=True, kw_only=True)
class Lines:
    """What became of the lines of a file of captions."""

    keys: int
    """Different keys."""
    unknown: int
    """Of them without a document."""
    bad: Skipped
    """Lines that are no captions."""


def recaption(source: Sequence[Path], out: Path, how: Recaption, processes: int = 1, progress: Tell = silent) -> tuple[Report, Lines]:
    """What became of documents, and of lines. Errors: ValueError, FileNotFoundError; `workers.ProcessFailed`."""
    settings = {"command": "recaption", "captions": content_of(how.captions), "how": how.how, "missing": how.missing}
    claim(out, source, settings)
    index = out / "captions"
    if not (index / "bad.json").exists():
        _write_index(how.captions, index)
    keys = len(np.unique(np.load(index / "hashes.npy")))
    bad = Skipped.of_json((index / "bad.json").read_text())

    def lines_of(report: Report) -> Lines:  # of a document without a line nothing else is asked
        return Lines(keys=keys, bad=bad, unknown=keys - report.read + report.noted.causes[NO_LINE] + report.dropped.causes[NO_LINE])

    def also(report: Report) -> Mapping[str, object]:
        return {"captions": {"keys": keys, "unknown": lines_of(report).unknown, "bad_lines": json.loads(bad.to_json())}}

    report = rewrite(source, out, partial(_judge_of, how=how, index=index), settings, processes, progress, also)
    return report, lines_of(report)


def _judge_of(path: Path, how: Recaption, index: Path) -> Judge:
    hashes, offsets = np.load(index / "hashes.npy", mmap_mode="r"), np.load(index / "offsets.npy", mmap_mode="r")

    def judge(sample: Sample, noted: Skipped) -> Sample:
        key = str(sample["__key__"])
        found = _captions(how.captions, hashes, offsets, key)
        if not found:
            if how.missing == "drop":
                raise ValueError(NO_LINE)
            noted.add(NO_LINE, key)
            return sample
        out = recaptioned(sample, found, how.how)
        if out is None:
            noted.add("takes no caption", f"{key}: it is no document of one picture, at most one text part, and no turns")
        return out or sample
    return judge


def recaptioned(sample: Sample, captions: Sequence[str], how: Literal["replace", "add"]) -> Sample | None:
    """The sample with other captions, the same object where it has them already; None for one that takes none. Errors: ValueError for
    what is no document."""
    document = shards.document_of(sample)
    texts = [i for i, part in enumerate(document.parts) if isinstance(part, str)]
    if document.roles or len(texts) > 1 or len(document.parts) - len(texts) != 1:
        return None
    old = [*(str(document.parts[i]) for i in texts), *document.captions]
    new = list(dict.fromkeys([*(old if how == "add" else ()), *captions]))
    if new == old:
        return sample
    record: dict[str, Any] = json.loads(sample["json"])
    if texts:
        record["texts"][texts[0]] = new[0]
    else:
        record["texts"], record["images"] = [*record["texts"], new[0]], [*record["images"], None]
    record.pop("captions", None)
    return {**sample, "json": to_json(record | ({"captions": new[1:]} if new[1:] else {}))}


# The file ---------------------------------------------------------------------------------------------------------

def _write_index(path: Path, folder: Path) -> None:
    """`hashes.npy` of keys, sorted, and `offsets.npy` of their lines in bytes; `bad.json` comes last."""
    folder.mkdir(exist_ok=True)
    hashes, offsets, bad, at = bytearray(), bytearray(), Skipped(), 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    hashes += _hash(captions_in(line)[0])
                    offsets += at.to_bytes(8, "little")
                except ValueError as error:
                    bad.refuse(error, f"line {number}")
            at += len(line)
    known, places = np.frombuffer(bytes(hashes), "<u8"), np.frombuffer(bytes(offsets), "<i8")
    order = np.argsort(known, kind="stable")
    np.save(folder / "hashes.npy", known[order])
    np.save(folder / "offsets.npy", places[order])
    (folder / "bad.json").write_text(bad.to_json())


def _captions(path: Path, hashes: NDArray[np.uint64], offsets: NDArray[np.int64], key: str) -> list[str]:
    """Of one document, in the order of the file."""
    mine = np.frombuffer(_hash(key), "<u8")[0]
    found: list[str] = []
    with path.open("rb") as file:
        for place in offsets[np.searchsorted(hashes, mine):np.searchsorted(hashes, mine, side="right")].tolist():
            file.seek(place)
            whose, captions = captions_in(file.readline())
            found += captions if whose == key else []
    return found


def captions_in(line: bytes) -> tuple[str, list[str]]:
    """→ key, captions. Errors: ValueError "cause: …"."""
    try:
        record = json.loads(line)
        key, said = record["key"], record["captions"] if "captions" in record else [record["caption"]]
        if not isinstance(key, str) or not isinstance(said, list) or not all(isinstance(caption, str) for caption in said):
            raise TypeError("key and caption are texts, captions a list of texts")
        found = [text for caption in said if (text := caption.encode().decode().strip())]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"no captions: {error if isinstance(error, (ValueError, TypeError)) else f'there is no {error}'}") from error
    if not found:
        raise ValueError(f"empty caption: of {key}")
    return key, found


def _hash(key: str) -> bytes:
    return hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest()
