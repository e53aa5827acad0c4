"""Documents that are there already: in the set itself, or in another one that shall stay unseen.

Two documents are *alike* when they have as many pictures and these are alike, one by one in order; documents without pictures, and under
`by` "both" all, when they say the same. Two pictures are alike when their perceptual hashes differ in at most `distance` bits, or, with
`exact`, when their pixels are equal.

Alike is not transitive, so groups are not chains of it: documents are taken in order of preference, and each is kept unless it is alike one
that was kept before. What is dropped is always alike what it is listed with.

    signatures/NAME.npz   hashes of each shard
    groups.jsonl          {"kept": "SHARD/KEY", "dropped": [["SHARD/KEY", bits], …]}; bits is 0 for equal hashes
    verdicts.npy          [n] uint8, by document; positions in VERDICTS

Letters: n documents, u documents that are not equal to one before, k pairs.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.chance import scrambled
from data.curate import hamming, signatures
from data.curate.rewrite import Judge, Report, Sample, claim, rewrite
from data.curate.signatures import Signatures
from data.curate.workers import Tell, silent
from data.files import written
from data.images import MAX_PIXELS, Limits
from data.skipped import Skipped

VERDICTS = ("", "exact duplicate", "near duplicate", "in the other set", "refused")
EXACT, NEAR, ELSEWHERE, REFUSED = range(1, 5)


@dataclass(frozen=True, kw_only=True)
class Alike:
    """Which documents are duplicates, and which of them stays."""

    exact: bool = False
    """Pixels must be equal, file format and compression apart; else the perceptual hashes decide."""
    distance: int = 4
    """Bits of 64 in which the perceptual hashes of two pictures may differ."""
    by: Literal["pictures", "both"] = "pictures"
    """Whether two documents with pictures must say the same too."""
    keep: Literal["first", "largest"] = "first"
    """The smallest key, or the most pixels and then the smallest key."""
    max_pixels: int = MAX_PIXELS
    """Largest picture that is decoded."""


KeysOf = Callable[[NDArray[np.int64]], NDArray[np.bytes_]]
"""Documents, ascending [k] → their keys [k]."""


class Verdicts(NamedTuple):
    """What becomes of n documents, and why."""

    of: NDArray[np.uint8]
    """[n] position in VERDICTS"""
    kept: NDArray[np.int64]
    """[k] with `dropped`: the document that stays, by groups"""
    dropped: NDArray[np.int64]
    """[k] and one that goes for it"""
    bits: NDArray[np.uint8]
    """[k] largest distance of their pictures; 0 for equal hashes"""


def dedup(source: Sequence[Path], out: Path, alike: Alike, against: Sequence[Path] = (), processes: int = 1,
          progress: Tell = silent) -> Report:
    """Write `source` without duplicates, and without what holds a picture of `against`, or is a text of it. Errors: ValueError,
    FileNotFoundError; `workers.ProcessFailed`."""
    claim(out, source, settings := {"command": "dedup", **asdict(alike),
                                    "against": [[path.name, path.stat().st_size] for path in against] or None})
    hamming.check(alike.distance)
    limits, folder = Limits(max_pixels=alike.max_pixels, max_aspect=float("inf")), out / "signatures"
    mine = signatures.signed(source, folder, limits, processes, progress)
    theirs = signatures.signed(against, folder / "against", limits, processes, progress) if against else None
    if theirs is not None and not theirs.good.all():
        bad = int((~theirs.good).sum())
        raise ValueError(f"{against[0].parent}: {bad} of {len(theirs.good)} documents are none, or have pictures that do not decode, and "
                         "copies of them would not be found: `mmllm data check --fix` writes the good ones to another folder")

    def keys_of(documents: NDArray[np.int64]) -> NDArray[np.bytes_]:
        return signatures.keys(source, folder, mine, documents)

    found = verdicts(mine, alike, keys_of, theirs)
    with written(out / "groups.jsonl", by_many=True) as beside:
        beside.write_text("".join(_groups(found, mine, keys_of, source)))
    with written(out / "verdicts.npy") as beside, beside.open("wb") as file:
        np.save(file, found.of)
    first = {path.name: int(number) for path, number in zip(source, mine.shard, strict=False)}
    return rewrite(source, out, partial(_judge_of, out=out, first=first), settings, processes, progress)


def _judge_of(path: Path, out: Path, first: dict[str, int]) -> Judge:
    of, refusals = np.load(out / "verdicts.npy", mmap_mode="r"), signatures.refusals(path, out / "signatures")
    number = -1

    def judge(sample: Sample, noted: Skipped) -> Sample:
        nonlocal number
        number += 1
        verdict = int(of[first[path.name] + number])
        if verdict:
            raise ValueError(refusals[number] if verdict == REFUSED else VERDICTS[verdict])
        return sample
    return judge


# Who goes for whom ------------------------------------------------------------------------------------------------

def verdicts(mine: Signatures, alike: Alike, keys_of: KeysOf, theirs: Signatures | None = None) -> Verdicts:
    """Memory is some 200 bytes a document with one picture, its signature and `hamming.near` included."""
    of = np.where(mine.good, 0, REFUSED).astype(np.uint8)
    if theirs is not None:
        of[_elsewhere(mine, theirs, alike) & (of == 0)] = ELSEWHERE
    documents = np.flatnonzero(of == 0)
    apart = _apart(mine, alike)
    folded = _folded(mine, mine.hashes(alike.exact), apart)[documents]
    _, any_of, equal, counts = np.unique(folded, return_index=True, return_inverse=True, return_counts=True)  # [u], [n], [u]
    one, other, bits = _near(mine, alike, documents[any_of], apart)

    involved = counts > 1  # [u]
    involved[one] = involved[other] = True
    inside = involved[equal]
    members, number = documents[inside], equal[inside]
    rank = np.empty(len(members), np.int64)
    order = np.lexsort((keys_of(members), -_sums(mine, mine.area)[members] * (alike.keep == "largest")))
    rank[order] = np.arange(len(order))
    best = np.full(len(counts), len(rank))
    np.minimum.at(best, number, rank)  # of equal documents the preferred one stands for all

    leader, apart_bits = _led(one, other, bits, best)
    kept = members[order[best[leader[number]]]]
    goes = kept != members
    members, kept, number = members[goes], kept[goes], number[goes]
    pixels = _folded(mine, mine.pixels, apart)
    of[members] = np.where(pixels[members] == pixels[kept], EXACT, NEAR)
    order = np.lexsort((members, kept))
    return Verdicts(of, kept[order], members[order], apart_bits[number[order]])


def _near(mine: Signatures, alike: Alike, documents: NDArray[np.int64], apart: NDArray[np.uint64]) -> hamming.Pairs:
    """Pairs among `documents` [u] that are alike and not equal, and the largest distance of their pictures."""
    illustrated = np.flatnonzero(mine.num_pictures[documents] > 0)
    if alike.exact or not alike.distance:
        illustrated = illustrated[:0]
    chosen = documents[illustrated]
    one, other, bits = hamming.near(mine.look[mine.first[chosen]], alike.distance, apart[chosen])  # by the first picture
    later = mine.num_pictures[chosen]
    for picture in range(1, int(later.max(initial=0))):
        here = np.flatnonzero((later[one] > picture) & (bits <= alike.distance))
        far = hamming.distance(mine.look[mine.first[chosen[one[here]]] + picture], mine.look[mine.first[chosen[other[here]]] + picture])
        bits[here] = np.maximum(bits[here], far)
    close = bits <= alike.distance
    return hamming.Pairs(illustrated[one[close]], illustrated[other[close]], bits[close])


def _led(one: NDArray[np.int64], other: NDArray[np.int64], bits: NDArray[np.uint8],
         best: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """→ for each of u the one that it goes for, itself where it stays, and their distance."""
    leader, apart_bits = np.arange(len(best)), np.zeros(len(best), np.uint8)
    swap = best[one] > best[other]
    one, other = np.where(swap, other, one), np.where(swap, one, other)
    order = np.lexsort((best[other], best[one]))  # whether `one` stays is known when its pairs come
    for before, after, distance in zip(one[order].tolist(), other[order].tolist(), bits[order].tolist(), strict=True):
        if leader[before] == before and leader[after] == after:
            leader[after], apart_bits[after] = before, distance
    return leader, apart_bits


def _elsewhere(mine: Signatures, theirs: Signatures, alike: Alike) -> NDArray[np.bool_]:
    """[n] whether a document holds a picture that is alike one of theirs; without pictures, whether one of theirs says the same"""
    values, position = np.unique(mine.hashes(alike.exact), return_inverse=True)
    others = np.unique(theirs.hashes(alike.exact))
    if alike.exact:
        hit = np.isin(values, others)
    else:
        one, other, _ = hamming.near(np.concatenate([values, others]), alike.distance)
        hit = np.zeros(len(values), np.bool_)
        hit[one[(one < len(values)) & (other >= len(values))]] = True
    said = np.isin(mine.text, theirs.text[theirs.num_pictures == 0]) & (mine.num_pictures == 0)
    return (_sums(mine, hit[position]) > 0) | said


def _apart(mine: Signatures, alike: Alike) -> NDArray[np.uint64]:
    """[n] what must be equal: how many pictures, and the text where it counts"""
    counts = mine.num_pictures
    said = np.where((counts == 0) | (alike.by == "both"), scrambled(mine.text, 1), np.uint64(0))
    return scrambled(said + counts.astype(np.uint64), 2)


def _folded(mine: Signatures, hashes: NDArray[np.uint64], apart: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """[p] → one hash of all pictures of a document, in order, and of `apart` [n]"""
    place = np.arange(len(hashes)) - np.repeat(mine.first[:-1], mine.num_pictures)
    return scrambled(_sums(mine, scrambled(hashes ^ scrambled(place.astype(np.uint64), 3), 4)) ^ apart, 5)


def _sums(mine: Signatures, values: NDArray[Any]) -> NDArray[Any]:
    """[p] → sum over the pictures of each document [n]; of uint64 modulo 2^64"""
    kind = np.uint64 if values.dtype == np.uint64 else np.int64
    return np.diff(np.concatenate([np.zeros(1, kind), np.cumsum(values, dtype=kind)])[mine.first])


def _groups(found: Verdicts, mine: Signatures, keys_of: KeysOf, source: Sequence[Path]) -> Iterator[str]:
    documents = np.unique(np.concatenate([found.kept, found.dropped]))
    shard = np.searchsorted(mine.shard, documents, side="right") - 1
    names = [f"{source[i].name}/{key.decode(errors='replace')}" for i, key in zip(shard.tolist(), keys_of(documents).tolist(), strict=True)]
    edges = np.flatnonzero(np.diff(found.kept, prepend=-1, append=-1)).tolist()
    for first, last in pairwise(edges):
        dropped = zip(np.searchsorted(documents, found.dropped[first:last]).tolist(), found.bits[first:last].tolist(), strict=True)
        kept = names[int(np.searchsorted(documents, found.kept[first]))]
        yield json.dumps({"kept": kept, "dropped": [[names[i], bits] for i, bits in dropped]}, ensure_ascii=False) + "\n"
