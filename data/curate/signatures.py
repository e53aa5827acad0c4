"""What duplicates are found by: hashes of every picture and text, a file a shard.

*pixels* is a hash of the decoded picture, the same for every file of it that loses nothing. *look* is a perceptual hash (pHash: Zauner
2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", the DCT-based one; by imagehash): which of the 64 lowest
frequencies of the picture's lightness are over their median. It hardly changes with size, quality or lightness, and does not see colour.
Of a plain picture, which has next to no frequencies, it is *pixels* again.

All is arrays: a document with one picture costs 37 bytes in memory, and its key is read again where it is wanted.

Letters: n documents, p pictures.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data import shards
from data.curate.workers import Tell, on_each, silent
from data.document import texts_of
from data.files import written
from data.images import Limits, load_image, to_array

PLAIN = 16
"""Half of the frequencies are over their median, unless most have no part in the picture: one flat colour, or one gradient, has the hash
of any other. Under so many a picture is alike its equals alone."""
ARRAYS = ("first", "text", "pixels", "look", "area")


@dataclass(frozen=True, kw_only=True)
class Signatures:
    """Hashes of the documents of some shards, in order."""

    first: NDArray[np.int64]
    """[n + 1] first picture of each document"""
    text: NDArray[np.uint64]
    """[n] of everything said, white space counted as one blank"""
    pixels: NDArray[np.uint64]
    """[p]"""
    look: NDArray[np.uint64]
    """[p]"""
    area: NDArray[np.int32]
    """[p] pixels"""
    good: NDArray[np.bool_]
    """[n] whether it is a document, and all its pictures decode"""
    shard: NDArray[np.int64]
    """[shards + 1] first document of each shard"""

    @property
    def num_pictures(self) -> NDArray[np.int64]:
        """[n]"""
        return np.diff(self.first)

    def hashes(self, exact: bool) -> NDArray[np.uint64]:
        """[p]"""
        return self.pixels if exact else self.look


def signed(source: Sequence[Path], folder: Path, limits: Limits, processes: int = 1, progress: Tell = silent) -> Signatures:
    """Of `source`, of which `folder` may hold some already."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [path for path in source if not _is_of(_path(folder, path), path)]
    on_each(partial(_sign, folder=folder, limits=limits), missing, processes, progress, len(source) - len(missing))
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in (*ARRAYS, "good")}
    shard, pictures = [0], 0
    for path in source:
        with np.load(_path(folder, path)) as file:
            for name in (*ARRAYS[1:], "good"):
                parts[name].append(file[name])
            parts["first"].append(file["first"][:-1] + pictures)
            pictures += len(file["pixels"])
            shard.append(shard[-1] + len(file["text"]))
    parts["first"].append(np.array([pictures]))
    return Signatures(**{name: np.concatenate(several) for name, several in parts.items()}, shard=np.array(shard))


def keys(source: Sequence[Path], folder: Path, signatures: Signatures, documents: NDArray[np.int64]) -> NDArray[np.bytes_]:
    """Keys of some documents, UTF-8; `documents` [k] ascending → [k]"""
    out: list[NDArray[np.bytes_]] = [np.zeros(0, "S1")]
    edges = np.searchsorted(documents, signatures.shard)
    for number, path in enumerate(source):
        own = documents[edges[number]:edges[number + 1]]
        if len(own):
            with np.load(_path(folder, path)) as file:
                out.append(file["keys"][own - signatures.shard[number]])
    return np.concatenate(out)


def refusals(path: Path, folder: Path) -> dict[int, str]:
    """{position in the shard: "cause: …"} of what is no document, or has a picture that does not decode."""
    with np.load(_path(folder, path)) as file:
        return {int(position): why for position, why in json.loads(str(file["refusals"])).items()}


def _path(folder: Path, shard: Path) -> Path:
    return folder / f"{shard.stem}.npz"


def _is_of(path: Path, shard: Path) -> bool:
    if not path.exists():
        return False
    with np.load(path) as file:
        return int(file["source_bytes"]) == shard.stat().st_size


def _sign(path: Path, folder: Path, limits: Limits) -> int:
    names: list[bytes] = []
    refused: dict[int, str] = {}
    first, text, pictures = [0], list[int](), list[tuple[int, int, int]]()
    for number, sample in enumerate(shards.samples(path)):
        names.append(str(sample["__key__"]).encode(errors="surrogateescape"))
        said, own = 0, list[tuple[int, int, int]]()
        try:
            document = shards.document_of(sample)
            own = [sign(load_image(part, limits)) for part in document.parts if isinstance(part, bytes)]
            said = _hash("\n".join(" ".join(words.split()) for words in texts_of(document)).encode())
        except ValueError as error:
            refused[number], own = str(error), []
        text.append(said)
        pictures += own
        first.append(len(pictures))
    table = np.array(pictures, np.uint64).reshape(-1, 3)
    good = np.ones(len(names), np.bool_)
    good[list(refused)] = False
    with written(_path(folder, path)) as beside, beside.open("wb") as file:
        np.savez(file, keys=np.array(names, "S"), first=np.array(first), text=np.array(text, np.uint64), pixels=table[:, 0],
                 look=table[:, 1], area=table[:, 2].astype(np.int32), good=good, refusals=json.dumps(refused),
                 source_bytes=path.stat().st_size)
    return len(names)


def sign(picture: Image.Image) -> tuple[int, int, int]:
    """RGB → pixels, look, area"""
    import imagehash

    array = to_array(picture)
    pixels = _hash(np.array(array.shape, "<i4").tobytes() + array.tobytes())
    look = int.from_bytes(np.packbits(imagehash.phash(picture).hash).tobytes(), "big")
    return pixels, look if look.bit_count() >= PLAIN else pixels, picture.width * picture.height


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
