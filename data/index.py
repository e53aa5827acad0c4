"""The index beside a token shard: where each sample lies, and kinds and lengths of its parts.

A plan needs nothing else: which documents go into which row follows from lengths, so rows are laid out without payload. Reading
needs no torch.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import store, tar
from data.document import IMAGE, KINDS, ROLE, ROLES, TEXT, TokenDocument
from data.files import written
from data.skipped import Skipped
from data.vocab import Vocab


@dataclass(frozen=True)
class Index:
    """Where the samples of a token shard lie and what they hold; row i belongs to sample i."""

    keys: NDArray[np.bytes_]
    """[n] UTF-8"""
    key_hash: NDArray[np.uint64]
    """[n] BLAKE2b of the key, 8 bytes little-endian"""
    offsets: NDArray[np.int64]
    """[n] byte in the tar where the content begins"""
    sizes: NDArray[np.int64]
    """[n] bytes of it"""
    first_part: NDArray[np.int64]
    """[n + 1]"""
    kinds: NDArray[np.int8]
    """[parts]"""
    lengths: NDArray[np.int32]
    """[parts] ids"""
    fingerprint: str
    """Of the tokenizers that made the shard."""
    content: str
    """SHA-256 of the shard, 16 hex digits."""
    skipped: Skipped
    """What was left out of it."""


ARRAYS = {"keys": "S", "key_hash": "u", "offsets": "i", "sizes": "i", "first_part": "i", "kinds": "i", "lengths": "i"}


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".idx.npz")


def hashed(keys: Sequence[bytes]) -> NDArray[np.uint64]:
    return np.frombuffer(b"".join(hashlib.blake2b(key, digest_size=8).digest() for key in keys), "<u8")


def write_index(shard: Path, tokens: Sequence[TokenDocument], fingerprint: str, skipped: Skipped) -> None:
    """Index a token shard that was written; what has an index is whole."""
    with tar.opened(shard) as content:
        members = tar.members(content)
        digest = hashlib.sha256(content).hexdigest()[:16]
    assert len(members) == len(tokens), f"{shard} is not what was written"
    keys = [m.name.removesuffix(".ids").encode(errors="surrogateescape") for m in members]
    with written(index_path(shard)) as beside, beside.open("wb") as file:
        np.savez(file, keys=np.array(keys, np.bytes_), key_hash=hashed(keys),
                 offsets=np.array([m.first for m in members], np.int64), sizes=np.array([m.size for m in members], np.int64),
                 first_part=np.cumsum([0] + [len(t.kinds) for t in tokens]).astype(np.int64),
                 kinds=np.array([k for t in tokens for k in t.kinds], np.int8),
                 lengths=np.array([n for t in tokens for n in t.lengths], np.int32),
                 fingerprint=np.array(fingerprint), content=np.array(digest), skipped=np.array(skipped.to_json()))


def read_index(shard: Path, fingerprint: str | None = None) -> Index:
    """Errors: FileNotFoundError for a shard without index; ValueError for a damaged one, or one of other tokenizers than `fingerprint`
    names."""
    path = index_path(shard)
    if not path.is_file():
        raise FileNotFoundError(f"token shard {shard} has no index {path.name}: encode it again")
    return of_bytes(path.read_bytes(), shard, fingerprint)


def of_bytes(content: bytes, shard: store.Place, fingerprint: str | None = None) -> Index:
    """An index as its file holds it; as `read_index`."""
    try:
        with np.load(io.BytesIO(content)) as arrays:
            fields = dict(arrays)
        index = Index(**{name: fields[name] for name in ARRAYS}, fingerprint=str(fields["fingerprint"]), content=str(fields["content"]),
                      skipped=Skipped.of_json(str(fields["skipped"])))
        problem = problem_of(index)
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError, MemoryError, OverflowError) as error:
        index, problem = None, repr(error)
    if index is None or problem:
        raise ValueError(f"the index of token shard {shard} is damaged, or of another version: {problem}. Encode the shard again")
    if fingerprint is not None and index.fingerprint != fingerprint:
        raise ValueError(f"token shard {shard} was encoded under fingerprint {index.fingerprint}, not {fingerprint}: the tokenizer or the "
                         "vocabulary changed. Remove it and its index, and encode it again")
    return index


def problem_of(index: Index) -> str:
    """What no index that was written here holds; empty where all is well."""
    arrays = {name: getattr(index, name) for name in ARRAYS}
    for name, kind in ARRAYS.items():
        if arrays[name].ndim != 1 or arrays[name].dtype.kind != kind:
            return f"{name} is {arrays[name].dtype} {list(arrays[name].shape)}"
    count, parts = len(index.keys), len(index.kinds)
    per_sample = (index.key_hash, index.offsets, index.sizes, index.first_part[1:])
    if any(len(array) != count for array in per_sample) or not len(index.first_part) or len(index.lengths) != parts:
        return f"its arrays disagree: { {name: len(array) for name, array in arrays.items()} }"
    if index.first_part[0] != 0 or index.first_part[-1] != parts or (np.diff(index.first_part) < 1).any():
        return "first_part does not count up from 0 to the number of parts"
    roles, plain = np.divmod(index.kinds, ROLE)
    if parts and (index.lengths.min() < 0 or index.kinds.min() < 0 or roles.max() > len(ROLES) or plain.max() >= len(KINDS)):
        return "a kind or a length is none"
    if ((index.kinds >= ROLE) & (plain != TEXT) & (plain != IMAGE)).any():
        return "a part of a conversation is neither text nor picture"
    counts = np.diff(index.first_part)
    ids = np.add.reduceat(index.lengths.astype(np.int64), index.first_part[:-1]) if count else counts
    if (index.sizes != 4 * (1 + 4 * counts + ids)).any() or (count and index.offsets.min() < 0):
        return "offsets or sizes are none of what lengths say"
    return ""


def read_manifest(folder: store.Place) -> dict[str, Any]:
    """Errors: FileNotFoundError for none; ValueError for a damaged one."""
    try:
        content = store.read_bytes(store.join(folder, "manifest.json"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} has no manifest.json, so it holds no whole set of token shards: "
                                "run `mmllm data encode`") from error
    try:
        found = json.loads(content)
        Vocab.of(found["vocab"])
        counts = [found[name] for name in ("documents", "image_codes", "text_ids")]
        counts += [about[name] for about in found["shards"].values() for name in ("documents", "bytes")]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError("a count is none")
        if any("/" in name or not isinstance(about["index"], str) for name, about in found["shards"].items()):
            raise ValueError("a shard is none")
        if not isinstance(found["fingerprint"], str):
            raise ValueError("the fingerprint is none")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder}/manifest.json is damaged, or of another version: {error!r}. Encode the shards again") from error
    return found
