"""What a model is evaluated on: documents of raw shards, split by split, and their pictures as a model takes them.

A *split* is what a shard is called before its number (`seen-000000.tar`). Of a large split some documents are taken by a hash of their
keys: the same ones for every model, whatever the order of shards.
"""

import hashlib
import heapq
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from data import shards
from data.document import Document
from data.images import fitted, to_array, to_tensor
from data.tokens import sizes_of
from mmllm.generate.engine import Engine

T = TypeVar("T")


class Item(NamedTuple):
    split: str
    document: Document

    @property
    def name(self) -> str:
        return f"{self.split}/{self.document.key}"

    @property
    def picture(self) -> bytes:
        """The first one's file."""
        return next(part for part in self.document.parts if isinstance(part, bytes))

    @property
    def texts(self) -> tuple[str, ...]:
        """All that describes the only picture."""
        said = tuple(part for part in self.document.parts if isinstance(part, str))
        return tuple(dict.fromkeys((*said, *self.document.captions)))

    @property
    def is_pair(self) -> bool:
        """One picture with one text, that nobody speaks."""
        kinds = sorted(type(part).__name__ for part in self.document.parts)
        return kinds == ["bytes", "str"] and not self.document.roles


def items(source: Path, prefix: str | None, limit: int) -> list[Item]:
    """Up to `limit` documents of each split, in order of their hash. Without a prefix: of what was held out (not train-*) where there is
    any, else of all. Errors: FileNotFoundError, ValueError of a damaged shard."""
    found = shards.find(source, prefix or "")
    if prefix is None:
        found = [path for path in found if not path.name.startswith("train-")] or found
    by_split: dict[str, list[Path]] = defaultdict(list)
    for path in found:
        by_split[re.sub(r"-\d+$", "", path.name.removesuffix(".tar"))].append(path)

    def order(item: Item) -> bytes:
        return hashlib.blake2b(item.name.encode(), digest_size=16).digest()

    return [item for split, paths in sorted(by_split.items())
            for item in heapq.nsmallest(limit, (Item(split, document) for document in shards.read_all(paths)), key=order)]


def coded(engine: Engine, pictures: Sequence[bytes], names: Sequence[str]) -> list[NDArray[np.int32]]:
    """Files → codes [M, h, w] of each, at the size of the tokenizer's that is nearest in aspect. Errors: ValueError that names the one
    which is refused."""
    sizes, arrays = sizes_of(engine.visual), list[NDArray[np.uint8]]()
    for file, name in zip(pictures, names, strict=True):
        try:
            arrays.append(to_array(fitted(file, sizes)))
        except ValueError as error:
            raise ValueError(f"a picture of {name} is refused: {error}. Mend the shards with `mmllm data check RAW --fix OUT`") from error
    out: list[NDArray[np.int32]] = [np.zeros(0, np.int32)] * len(arrays)
    for same in alike(arrays, lambda array: array.shape):
        for place, codes in zip(same, engine.codes(to_tensor(np.stack([arrays[i] for i in same]))), strict=True):
            out[place] = codes
    return out


def alike(values: Sequence[T], shape: Callable[[T], object]) -> Iterator[list[int]]:
    """Places of the values that share a shape, group after group."""
    groups: dict[object, list[int]] = defaultdict(list)
    for place, value in enumerate(values):
        groups[shape(value)].append(place)
    yield from groups.values()
