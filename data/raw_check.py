"""One raw shard: what is wrong with it, and its good samples in a new one.

It reads on where `data.shards` stops: behind a damaged header, up to where a tar is cut off. What it calls good, that reads.
"""

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data import shards, tar
from data.findings import Checked, Finding
from data.images import ANY, Limits, header, load_image
from data.index import hashed
from data.tar import BLOCK, RECORD, Member


@dataclass(frozen=True, kw_only=True)
class RawCheck:
    """How raw shards are looked at."""

    quick: bool = False
    """Pictures by their header alone; else every one is decoded."""
    limits: Limits = ANY
    """Pictures that are refused."""


@dataclass
class Held:
    """A sample as it lies in a tar."""

    key: str
    members: dict[str, Member] = field(default_factory=dict[str, Member])
    """By what follows the key and a dot, in lower case."""
    twice: list[str] = field(default_factory=list[str])
    """Names that came again."""


def grouped(members: list[Member]) -> tuple[list[Held], list[str]]:
    """Samples as `data.shards.samples` makes them, and the names of files that belong to none."""
    found: list[Held] = []
    others: list[str] = []
    for member in members:
        place = tar.key_of(member.name)
        if place is None:
            others += [] if tar.META.match(member.name) else [member.name]
            continue
        key, extension = place
        if not found or found[-1].key != key:
            found.append(Held(key))
        if extension.lower() in found[-1].members:
            found[-1].twice.append(member.name)
        found[-1].members.setdefault(extension.lower(), member)
    return found, others


def check(path: Path, how: RawCheck) -> Checked:
    """Look at a raw shard, whatever is in it."""
    with tar.opened(path) as content, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # decoders tell what is odd about a picture that they take
        members, damage = tar.salvaged(content)
        held, others = grouped(members)
        findings = [Finding(path.name, "", what) for what in _shard_faults(members, damage, others, len(content))]
        good = np.ones(len(held), np.bool_)
        for number, sample in enumerate(held):
            for what, fatal in _faults(sample, content, how):
                findings.append(Finding(path.name, sample.key, what))
                good[number] &= not fatal
    return Checked(shard=path.name, key_hash=hashed([_bytes(sample.key) for sample in held]), good=good, findings=tuple(findings))


def keys(path: Path) -> list[str]:
    """Of the samples of a shard, those of a damaged one too."""
    with tar.opened(path) as content:
        return [sample.key for sample in grouped(tar.salvaged(content)[0])[0]]


def _shard_faults(members: list[Member], damage: list[str], others: list[str], size: int) -> Iterator[str]:
    yield from (f"damaged tar: {what}" for what in damage)
    yield from (f"no part of a sample: {name}" for name in others)
    if not damage:
        behind = size - members[-1].first - members[-1].size if members else 0
        if behind > 2 * (BLOCK + RECORD):
            yield f"empty end: {behind:,} bytes, as of a copy that was cut off and filled up"
        if not members:
            yield "no sample: the tar is empty"


def _faults(sample: Held, content: tar.Content, how: RawCheck) -> Iterator[tuple[str, bool]]:
    """What is wrong with a sample, and whether it is lost for it."""
    if problem := _key_problem(sample.key):
        yield f"bad key: {problem}", True
    for name in sample.twice:
        yield f"two members: {name} is there twice", True
    files = {name: content[_slice(member)] for name, member in sample.members.items()}
    try:
        shards.document_of({"__key__": sample.key, **files})
    except ValueError as error:
        yield str(error), True
        return
    names = _named(files["json"])
    for name, member in sample.members.items():
        if name not in ("json", *names):
            yield f"member that nobody names: {member.name}", False
    for name in dict.fromkeys(names):
        try:
            (header if how.quick else load_image)(files[name], how.limits)
        except ValueError as error:
            cause, _, rest = str(error).partition(": ")
            yield f"{cause}: {name}: {rest.removeprefix('picture: ')}", True


def _key_problem(key: str) -> str:
    if key.startswith("/") or ".." in key.split("/"):
        return "it leads out of a folder"
    try:
        key.encode()
    except UnicodeEncodeError:
        return "it is no UTF-8"
    return ""


def _named(record: bytes) -> list[str]:
    """Members that are the pictures of a document."""
    return [name for name in json.loads(record)["images"] if name is not None]


def mend(path: Path, out: Path, keep: NDArray[np.bool_]) -> None:
    """Write the samples of `path` that are to be kept, byte for byte, as a new shard; members that nobody names are left behind."""
    with tar.opened(path) as content:
        held, _ = grouped(tar.salvaged(content)[0])

        def samples() -> Iterator[dict[str, object]]:
            for sample, kept in zip(held, keep, strict=True):
                if kept:
                    names = ("json", *_named(content[_slice(sample.members["json"])]))
                    yield {"__key__": sample.key, **{name: content[_slice(sample.members[name])] for name in names}}

        shards.write_tar(out, samples())


def _slice(member: Member) -> slice:
    return slice(member.first, member.first + member.size)


def _bytes(key: str) -> bytes:
    return key.encode(errors="surrogateescape")
