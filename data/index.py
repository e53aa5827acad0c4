"""The index beside a token shard: where each sample lies, and kinds and lengths of its parts.

A plan needs nothing else: which documents go into which row follows from lengths, so rows are laid out without payload. Reading
needs no torch.
"""

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.document import TokenDocument


@dataclass(frozen=True)
class Index:
    """Where the samples of a token shard lie and what they hold; row i belongs to sample i.

    keys [n] str; offsets, sizes [n] bytes in the tar; first_part [n + 1]; kinds, lengths [parts]."""

    keys: NDArray[np.str_]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    first_part: NDArray[np.int64]
    kinds: NDArray[np.int8]
    lengths: NDArray[np.int32]


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".idx.npz")


def write_index(shard: Path, tokens: Sequence[TokenDocument]) -> None:
    with tarfile.open(shard) as tar:
        members = [(m.name.removesuffix(".ids"), m.offset_data, m.size) for m in tar if m.isreg()]
    path = index_path(shard)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, keys=np.array([m[0] for m in members]), offsets=np.array([m[1] for m in members], np.int64),
                 sizes=np.array([m[2] for m in members], np.int64),
                 first_part=np.cumsum([0] + [len(t.kinds) for t in tokens]).astype(np.int64),
                 kinds=np.array([k for t in tokens for k in t.kinds], np.int8),
                 lengths=np.array([n for t in tokens for n in t.lengths], np.int32))
    partial.rename(path)


def read_index(shard: Path) -> Index:
    path = index_path(shard)
    if not path.is_file():
        raise FileNotFoundError(f"token shard {shard} has no index {path.name}: encode it again")
    with np.load(path) as arrays:
        return Index(**{name: arrays[name] for name in Index.__dataclass_fields__})


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no manifest.json, so it holds no whole set of token shards: "
                                "run `mmllm data encode`")
    return json.loads(path.read_text())
