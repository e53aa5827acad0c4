"""The index beside a token shard: where each sample lies, and kinds and lengths of its parts.

A plan needs nothing else: which documents go into which row follows from lengths, so rows are laid out without payload. Reading
needs no torch.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import tar
from data.document import TokenDocument
from data.skipped import Skipped


@dataclass(frozen=True)
class Index:
    """Where the samples of a token shard lie and what they hold; row i belongs to sample i.

    keys [n] str; offsets, sizes [n] bytes in the tar; first_part [n + 1]; kinds, lengths [parts]; fingerprint of the tokenizers that
    made the shard; what was left out of it."""

    keys: NDArray[np.str_]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    first_part: NDArray[np.int64]
    kinds: NDArray[np.int8]
    lengths: NDArray[np.int32]
    fingerprint: str
    skipped: Skipped


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".idx.npz")


def write_index(shard: Path, tokens: Sequence[TokenDocument], fingerprint: str, skipped: Skipped) -> None:
    """Index a token shard that was written; what has an index is whole."""
    with tar.opened(shard) as content:
        members = tar.members(content)
    assert members is not None and len(members) == len(tokens), f"{shard} is not what was written"
    path = index_path(shard)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, keys=np.array([m.name.removesuffix(".ids") for m in members], np.str_),
                 offsets=np.array([m.first for m in members], np.int64), sizes=np.array([m.size for m in members], np.int64),
                 first_part=np.cumsum([0] + [len(t.kinds) for t in tokens]).astype(np.int64),
                 kinds=np.array([k for t in tokens for k in t.kinds], np.int8),
                 lengths=np.array([n for t in tokens for n in t.lengths], np.int32),
                 fingerprint=np.array(fingerprint), skipped=np.array(skipped.to_json()))
    partial.rename(path)


def read_index(shard: Path, fingerprint: str | None = None) -> Index:
    """Errors: FileNotFoundError for a shard without index; ValueError for one of other tokenizers than `fingerprint` names."""
    path = index_path(shard)
    if not path.is_file():
        raise FileNotFoundError(f"token shard {shard} has no index {path.name}: encode it again")
    with np.load(path) as arrays:
        fields = dict(arrays)
    made_by = str(fields.pop("fingerprint", "none"))
    if fingerprint is not None and made_by != fingerprint:
        raise ValueError(f"token shard {shard} was encoded under fingerprint {made_by}, not {fingerprint}: the tokenizer or the "
                         "vocabulary changed. Remove it and its index, and encode it again")
    skipped = Skipped.of_json(str(fields.pop("skipped", "{}")))
    return Index(**fields, fingerprint=made_by, skipped=skipped)


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no manifest.json, so it holds no whole set of token shards: "
                                "run `mmllm data encode`")
    return json.loads(path.read_text())
