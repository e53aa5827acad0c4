"""Is a folder of shards whole? Every fault is one line, with the shard, the sample and the cause; good samples can be had without the bad.

Raw or token shards, told apart by what lies there. Each shard is looked at by itself, by several processes if asked (raw_check.py,
token_check.py); then what only shows between them: keys that come twice, and a manifest that says other than the files do.
"""

import hashlib
import json
import multiprocessing
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import raw_check, shards, token_check
from data.findings import Checked, Finding
from data.images import ANY, Limits
from data.index import index_path, read_index, read_manifest
from data.processes import end_with_parent
from data.raw_check import RawCheck
from data.token_check import TokenCheck
from data.vocab import Vocab

MANIFEST = "manifest.json"
Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
Tell = Callable[[int, int, Mapping[str, float]], None]
"""Told (shards done, shards, {"faults": …}) after every shard."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found in a folder."""

    folder: Path
    kind: str
    """raw or token"""
    num_shards: int
    num_samples: int
    num_good: int
    """Samples in which nothing is wrong."""
    findings: tuple[Finding, ...]
    written: Mapping[str, int] | None = None
    """Samples of each shard that was written anew."""

    @property
    def counts(self) -> dict[str, int]:
        """Findings by cause, the most frequent first."""
        return dict(Counter(finding.cause for finding in self.findings).most_common())

    def to_json(self) -> str:
        record = {"folder": str(self.folder), "kind": self.kind, "shards": self.num_shards, "samples": self.num_samples,
                  "good": self.num_good, "counts": self.counts, "written": self.written,
                  "findings": [{"shard": f.shard, "key": f.key, "cause": f.cause, "what": f.what} for f in self.findings]}
        return json.dumps(record, indent=1) + "\n"  # ASCII: a key need be no UTF-8


def holds_tokens(folder: Path) -> bool:
    """Whether a folder holds token shards, or what is left of them."""
    return any((folder / name).exists() for name in (MANIFEST, "fingerprint")) or any(folder.glob("*.idx.npz"))


def check(folder: Path, *, quick: bool = False, limits: Limits = ANY, processes: int = 1, fix: Path | None = None,
          progress: Tell = lambda done, total, measures: None) -> Report:
    """Look at all shards of a folder. `fix`: a new folder for the good samples of raw shards, in shards of the same names.
    Errors: FileNotFoundError for nothing to look at; ValueError for a `fix` that cannot be."""
    if processes < 1:
        raise ValueError(f"{processes} processes check nothing: there is at least one")
    tokens = folder.is_dir() and holds_tokens(folder)
    if fix is not None:
        if tokens:
            raise ValueError(f"{folder} holds token shards: they are not mended. Remove those that are bad and encode again")
        if fix.is_dir() and any(fix.glob("*.tar")):
            raise ValueError(f"{fix} holds shards already: name a new folder, raw shards are not mended in place")
    if tokens:
        return _check_tokens(folder, quick, processes, progress)
    return _check_raw(folder, RawCheck(quick=quick, limits=limits), processes, fix, progress)


# Raw shards -------------------------------------------------------------------------------------------------------

def _check_raw(folder: Path, how: RawCheck, processes: int, fix: Path | None, progress: Tell) -> Report:
    found = shards.find(folder)
    paths = [path for path in found if path.is_file()]
    odd = [Finding(path.name, "", "no file: it is a folder, or a link to nothing") for path in found if not path.is_file()]
    written: dict[str, int] | None = None
    with _mapping(processes) as apart:
        checked = _each(apart, partial(raw_check.check, how=how), paths, progress)
        once, again = _once(checked, lambda shard: raw_check.keys(paths[shard]))
        keep = [one.good & first for one, first in zip(checked, once, strict=True)]
        if fix is not None:
            fix.mkdir(parents=True, exist_ok=True)
            work = [(path, fix / path.name, kept) for path, kept in zip(paths, keep, strict=True) if kept.any()]
            for done, _ in enumerate(apart(_mend, work), 1):
                progress(done, len(work), {})
            written = {out.name: int(kept.sum()) for _, out, kept in work}
    return _report(folder, "raw", checked, keep, [*odd, *again], written)


def _mend(work: tuple[Path, Path, NDArray[np.bool_]]) -> None:
    raw_check.mend(*work)


# Token shards -----------------------------------------------------------------------------------------------------

def _check_tokens(folder: Path, quick: bool, processes: int, progress: Tell) -> Report:
    try:
        manifest = read_manifest(folder)
        how = TokenCheck(vocab=Vocab.of(manifest["vocab"]), fingerprint=str(manifest["fingerprint"]), quick=quick)
        listed = {Path(name).name: dict(about) for name, about in manifest["shards"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
        return _report(folder, "token", [], [], [Finding(MANIFEST, "", f"bad manifest: {error!r}")], None)
    findings = [Finding(name, "", f"missing shard: {MANIFEST} lists it") for name in listed if not (folder / name).is_file()]
    findings += [Finding(path.name, "", f"unlisted shard: {MANIFEST} does not know it")
                 for path in sorted(folder.glob("*.tar")) if path.name not in listed]
    paths = [folder / name for name in sorted(listed) if (folder / name).is_file()]
    with _mapping(processes) as apart:
        checked = _each(apart, partial(token_check.check, how=how), paths, progress)
    for path, one in zip(paths, checked, strict=True):
        findings += [Finding(path.name, "", what) for what in _manifest_faults(path, one, listed[path.name])]
    marker = folder / "fingerprint"
    said = marker.read_text(errors="replace") if marker.is_file() else how.fingerprint
    if said.partition(" ")[0] != how.fingerprint:
        findings.append(Finding(marker.name, "", f"wrong fingerprint: it says {said[:80]}, {MANIFEST} {how.fingerprint}"))
    totals = Counter[str]()
    for one in checked:
        totals.update(one.totals)
    if not findings and not any(one.findings for one in checked):
        findings += [Finding(MANIFEST, "", f"wrong counts: it says {manifest.get(name)} {name}, the indexes {total:,}")
                     for name, total in totals.items() if manifest.get(name) != total]
    once, again = _once(checked, lambda shard: [key.decode(errors="surrogateescape") for key in read_index(paths[shard]).keys.tolist()])
    keep = [one.good & first for one, first in zip(checked, once, strict=True)]
    return _report(folder, "token", checked, keep, [*findings, *again], None)


def _manifest_faults(path: Path, checked: Checked, listed: Mapping[str, Any]) -> Iterator[str]:
    if (size := path.stat().st_size) != listed.get("bytes"):
        yield f"wrong size: the shard has {size:,} bytes, {MANIFEST} says {listed.get('bytes')}"
    index = index_path(path)
    if index.is_file() and hashlib.sha256(index.read_bytes()).hexdigest()[:16] != listed.get("index"):
        yield f"wrong index: {index.name} is not the one in {MANIFEST}"
    if checked.key_hash.size and len(checked.key_hash) != listed.get("documents"):
        yield f"wrong counts: the index lists {len(checked.key_hash):,} documents, {MANIFEST} says {listed.get('documents')}"


# Both -------------------------------------------------------------------------------------------------------------

@contextmanager
def _mapping(processes: int) -> Generator[Map]:
    """`map`, on several processes if asked; what they give comes in order."""
    if processes == 1:
        yield map
        return
    spawn = multiprocessing.get_context("spawn")  # a fork takes torch's threads along
    with ProcessPoolExecutor(processes, spawn, end_with_parent) as pool:
        yield pool.map


def _each(apart: Map, look: Callable[[Path], Checked], paths: Sequence[Path], progress: Tell) -> list[Checked]:
    progress(0, len(paths), {})
    checked: list[Checked] = []
    faults = 0
    for one in apart(look, paths):
        checked.append(one)
        faults += len(one.findings)
        progress(len(checked), len(paths), {"faults": faults})
    return checked


def _once(checked: Sequence[Checked], keys_of: Callable[[int], list[str]]) -> tuple[list[NDArray[np.bool_]], list[Finding]]:
    """Of each shard, the samples whose key has not come before in a good sample; and a finding for each of the others."""
    once = [np.ones(len(one.key_hash), np.bool_) for one in checked]
    if not checked:
        return once, []
    _, which, counts = np.unique(np.concatenate([one.key_hash for one in checked]), return_inverse=True, return_counts=True)
    repeated = np.flatnonzero(counts[which] > 1)
    ends = np.cumsum([len(one.key_hash) for one in checked])
    places: dict[str, list[tuple[int, int]]] = {}
    for shard in np.unique(np.searchsorted(ends, repeated, "right")).tolist():
        first = int(ends[shard]) - len(once[shard])
        keys = keys_of(shard)
        for number in (repeated[(repeated >= first) & (repeated < ends[shard])] - first).tolist():
            places.setdefault(keys[number], []).append((shard, number))
    findings: list[Finding] = []
    for key, found in places.items():
        kept = next((place for place in found if checked[place[0]].good[place[1]]), found[0])
        for shard, number in found:
            if (shard, number) != kept:
                once[shard][number] = False
                findings.append(Finding(checked[shard].shard, key, f"duplicate key: {checked[kept[0]].shard} holds it too"))
    return once, findings


def _report(folder: Path, kind: str, checked: Sequence[Checked], keep: Sequence[NDArray[np.bool_]], more: Iterable[Finding],
            written: Mapping[str, int] | None) -> Report:
    findings = [finding for one in checked for finding in one.findings]
    findings += [*more, *(Finding(path.name, "", "unfinished: left behind by a writing that was interrupted")
                          for path in sorted(folder.glob("*.partial")))]
    return Report(folder=folder, kind=kind, num_shards=len(checked), num_samples=sum(len(kept) for kept in keep),
                  num_good=sum(int(kept.sum()) for kept in keep), findings=tuple(findings), written=written)
