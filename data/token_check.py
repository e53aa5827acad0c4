"""One token shard: whether shard, index, vocabulary and grammar say the same.

Training trusts the index of a shard and reads the ids that it points at; here every id is read.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data import tar
from data.document import ANSWER, CAPTION, IMAGE, KINDS, QUESTION, ROLE, ROLES, TEXT, Document, check_roles
from data.findings import Checked, Finding
from data.index import Index, hashed, read_index
from data.vocab import Vocab


@dataclass(frozen=True, kw_only=True)
class TokenCheck:
    """What token shards are held against."""

    vocab: Vocab
    fingerprint: str
    """Of the tokenizers."""
    quick: bool = False
    """Headers and indexes alone; else every id."""


def check(path: Path, how: TokenCheck) -> Checked:
    """Look at a token shard, whatever is in it."""
    findings: list[Finding] = []
    try:
        index = read_index(path, how.fingerprint)
    except (ValueError, FileNotFoundError) as error:
        return Checked(shard=path.name, key_hash=np.zeros(0, np.uint64), good=np.zeros(0, np.bool_),
                       findings=(Finding(path.name, "", f"bad index: {error}"),))
    good = np.ones(len(index.keys), np.bool_)
    with tar.opened(path) as content:
        findings += [Finding(path.name, "", what) for what in _shard_faults(index, content, how.quick)]
        for number, key in enumerate([] if how.quick else index.keys.tolist()):
            for what in _sample_faults(index, number, content, how.vocab):
                good[number] = False
                findings.append(Finding(path.name, key.decode(errors="backslashreplace"), what))
    if any(not finding.key for finding in findings):
        good[:] = False
    return Checked(shard=path.name, key_hash=index.key_hash, good=good, findings=tuple(findings), totals=totals(index))


def totals(index: Index) -> dict[str, int]:
    """What the manifest of token shards counts."""
    kinds = index.kinds % ROLE
    picture, ids = kinds == IMAGE, index.lengths.astype(np.int64)
    return {"documents": len(index.keys), "images": int(picture.sum()), "image_codes": int(ids[picture].sum()),
            "text_ids": int(ids[~picture].sum()), "captions": int((kinds == CAPTION).sum()), "questions": int((kinds == QUESTION).sum())}


def _shard_faults(index: Index, content: tar.Content, quick: bool) -> Iterator[str]:
    if not quick and hashlib.sha256(content).hexdigest()[:16] != index.content:
        yield "index of another shard: the bytes of this one are not those that were indexed"
    members, damage = tar.salvaged(content)
    yield from (f"damaged tar: {what}" for what in damage)
    keys = [member.name.removesuffix(".ids").encode(errors="surrogateescape") for member in members]
    if len(members) != len(index.keys):
        yield f"index of another shard: it lists {len(index.keys):,} samples, the shard holds {len(members):,}"
    elif keys != index.keys.tolist() or not np.array_equal(hashed(keys), index.key_hash):
        yield "index of another shard: its keys are not those of the shard"
    elif [(member.first, member.size) for member in members] != list(zip(index.offsets.tolist(), index.sizes.tolist(), strict=True)):
        yield "index of another shard: its samples lie elsewhere"


def _sample_faults(index: Index, number: int, content: tar.Content, vocab: Vocab) -> Iterator[str]:
    first, size = int(index.offsets[number]), int(index.sizes[number])
    if first < 0 or first + size > len(content):
        yield f"outside the shard: bytes {first:,} to {first + size:,} of {len(content):,}"
        return
    array = np.frombuffer(content[first:first + size], "<i4")
    parts = slice(int(index.first_part[number]), int(index.first_part[number + 1]))
    count = parts.stop - parts.start
    table = array[1:1 + 4 * count].reshape(-1, 4) if len(array) >= 1 + 4 * count and array[0] == count else None
    if table is None or not (np.array_equal(table[:, 0], index.kinds[parts]) and np.array_equal(table[:, 3], index.lengths[parts])):
        yield "another document: kinds or lengths are not those in the index"
        return
    kinds, ends = table[:, 0] % ROLE, np.cumsum(table[:, 3])
    if problem := _grammar_problem(kinds, table[:, 0] // ROLE):
        yield f"bad grammar: {problem}"
    for kind, (h, w), part in zip(kinds, table[:, 1:3].tolist(), np.split(array[1 + 4 * count:], ends[:-1]), strict=True):
        if problem := _picture_problem(part, h, w, vocab) if kind == IMAGE else _text_problem(part, h, w, vocab):
            yield problem


def _grammar_problem(kinds: NDArray[np.int32], roles: NDArray[np.int32]) -> str:
    """Empty where a document may have these parts."""
    if not np.array_equal(np.flatnonzero(kinds == QUESTION) + 1, np.flatnonzero(kinds == ANSWER)):
        return f"a question without an answer in {', '.join(KINDS[kind] for kind in kinds)}"
    if roles.any():
        if not roles.all():
            return "some parts have a role and some have none"
        try:
            check_roles(Document("", ("",) * len(roles), roles=tuple(ROLES[role - 1] for role in roles)))
        except ValueError as error:
            return str(error)
    if not np.isin(kinds, (TEXT, IMAGE)).any():
        return "there is neither text nor picture"
    return ""


def _text_problem(ids: NDArray[np.int32], h: int, w: int, vocab: Vocab) -> str:
    if h or w:
        return f"bad grid: a text has a grid of {h}x{w}"
    wrong = ids[(ids < 0) | (ids >= vocab.text_size)]
    return f"bad id: {wrong[0]} is no piece of text, they end at {vocab.text_size}" if len(wrong) else ""


def _picture_problem(ids: NDArray[np.int32], h: int, w: int, vocab: Vocab) -> str:
    if (h, w) not in vocab.grids:
        return f"bad grid: {h}x{w} has no token in the vocabulary"
    try:
        vocab.codes(ids, h, w)
    except ValueError as error:
        return f"bad code: {error}"
    return ""
