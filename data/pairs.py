"""Pairs of one picture and one text in raw shards, in random access, and the endless order in which training takes them.

The order is a pure function of seed and step: a run that stops at step n goes on with batch n, at any width. An index of where
each pair lies is made on first use and kept in a folder of the run; pictures are decoded when they are asked for, and kept while
they are few.

Letters: n pairs, H W pixels.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from data import tar
from data.files import written
from data.images import SIDEWAYS, TURNS, fitted, to_array
from tokenizer.grid import Size, nearest_bucket

KEEP_BYTES = 1 << 30
"""Decoded pictures of up to so many bytes stay in memory."""


class Batch(NamedTuple):
    pictures: NDArray[np.uint8]
    """[b, H, W, 3]"""
    texts: list[str]
    keys: list[str]


class Pairs:
    """The documents of raw shards that are one picture with one text, in the order of the shards."""

    def __init__(self, shards: Sequence[Path], sizes: int | Sequence[Size], index: Path | None = None) -> None:
        """sizes: a square side, or the (h, w) of which each picture takes the nearest. index: folder to keep what was found in."""
        self.shards, self.sizes = list(shards), sizes
        found = [_pairs_of(shard, index) for shard in self.shards]
        self.shard = np.repeat(np.arange(len(found)), [len(keys) for keys, _, _ in found])
        self.keys = [key for keys, _, _ in found for key in keys]
        self.texts = [text for _, texts, _ in found for text in texts]
        self.spans = np.concatenate([spans for _, _, spans in found])
        several = [] if isinstance(sizes, int) else list(sizes)
        self.groups = np.array([several.index(nearest_bucket(w, h, several)) for w, h in self.spans[:, 2:]] if len(several) > 1 else
                               [0] * len(self.keys), np.int64)
        """[n] which of the sizes each picture takes"""
        self.kept: dict[int, NDArray[np.uint8]] = {}
        self.kept_bytes = 0
        if not self.keys:
            raise ValueError(f"{', '.join(str(s) for s in self.shards[:3])}: no document is one picture with one text: there is nothing to "
                             "train on")

    def __len__(self) -> int:
        return len(self.keys)

    def picture(self, number: int) -> NDArray[np.uint8]:
        """[H, W, 3]. Errors: ValueError that names shard and sample."""
        picture = self.kept.get(number)
        if picture is None:
            first, size = self.spans[number, :2]
            with self.shards[self.shard[number]].open("rb") as file:
                file.seek(first)
                content = file.read(size)
            try:
                picture = to_array(fitted(content, self.sizes))
            except ValueError as error:
                raise ValueError(f"{self.shards[self.shard[number]]}: sample {self.keys[number]}: {error}") from error
            if self.kept_bytes + picture.nbytes <= KEEP_BYTES:
                self.kept[number] = picture
                self.kept_bytes += picture.nbytes
        return picture

    def batch(self, numbers: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Pictures of one size."""
        return Batch(np.stack([self.picture(int(n)) for n in numbers]), [self.texts[int(n)] for n in numbers],
                     [self.keys[int(n)] for n in numbers])


def batches(groups: NDArray[np.int64], batch: int, seed: int, first: int = 0) -> Iterator[NDArray[np.int64]]:
    """Numbers of batch `first`, `first` + 1, …, each of one group (pictures of one size). Each pass takes every pair once in an order of
    its own, but for a last batch of each group that would be short. groups [n] → [batch] each"""
    counts = np.unique(groups, return_counts=True)[1]
    if batch > counts.max():
        raise ValueError(f"a batch of {batch} is more than the {counts.max()} pictures of one size that there are: lower batch")
    epoch, at = divmod(first, int((counts // batch).sum()))
    while True:
        draw = np.random.default_rng((seed, epoch))
        order = draw.permutation(len(groups))
        rows = np.concatenate([some[:len(some) // batch * batch].reshape(-1, batch)
                               for some in (order[groups[order] == group] for group in np.unique(groups))])
        yield from rows[draw.permutation(len(rows))[at:]]
        epoch, at = epoch + 1, 0


def _pairs_of(shard: Path, index: Path | None) -> tuple[list[str], list[str], NDArray[np.int64]]:
    """keys, texts, and (first byte, bytes, width, height) [n, 4] of the pictures of a shard's pairs."""
    stat = shard.stat()
    name = hashlib.sha256(f"{shard.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    path = index / f"{shard.stem}-{name}.npz" if index else None
    if path and path.exists():
        with np.load(path) as kept:
            return kept["keys"].tolist(), kept["texts"].tolist(), kept["spans"]
    keys, texts, spans = list[str](), list[str](), list[tuple[int, int, int, int]]()
    with tar.opened(shard) as content:
        members = tar.members(content)
        places = {member.name: member for member in members}
        for member in members:
            key, kind = tar.key_of(member.name) or ("", "")
            if kind != "json":
                continue
            record = json.loads(content[member.first:member.first + member.size])
            words = [text for text in record["texts"] if text is not None]
            images = [image for image in record["images"] if image is not None]
            if len(words) == len(images) == 1 and (place := places.get(f"{key}.{images[0]}")):
                picture = content[place.first:place.first + place.size]
                keys.append(key)
                texts.append(words[0])
                spans.append((place.first, place.size, *_upright(picture)))
    array = np.array(spans, np.int64).reshape(-1, 4)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written(path, by_many=True) as beside, beside.open("wb") as file:  # ranks may meet here
            np.savez(file, keys=np.array(keys, str), texts=np.array(texts, str), spans=array)
    return keys, texts, array


def _upright(content: bytes) -> tuple[int, int]:
    """(width, height) of a picture as it is seen, from its header; 1 x 1 where it has none that can be read: decoding will say so."""
    try:
        picture = Image.open(io.BytesIO(content))
        turned = TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1)) in SIDEWAYS
    except Exception:  # decoders meet any bytes, and raise anything
        return 1, 1
    width, height = picture.size[::-1] if turned else picture.size
    return width, height
