"""One raw shard → one token shard: pictures to codes, texts to ids, in the order of the documents.

Three things go on at once: a thread reads, decodes and groups pictures by size for the next batches, the model encodes one, and a
thread writes the shard before. What a picture becomes depends on its own shard alone, so shards may be encoded in any order, by
any number of processes, and again after an interruption, to the same bytes.

Letters: b batch, H W picture, M books, h w code grid, n ids.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from operator import add
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data import shards
from data.document import ANSWER, CAPTION, IMAGE, QUESTION, ROLE, ROLES, TEXT, Document, TokenDocument, texts_of
from data.images import ANY, Limits, Size, fitted, to_array, to_tensor
from data.index import write_index
from data.skipped import Skipped
from data.vocab import Vocab
from tokenizer.text import TextTokenizer

T = TypeVar("T")

BUCKETS_HELD = 8
"""Batches' worth of decoded pictures that wait for others of their size; beyond, the largest batch goes as it is."""


class ImageEncoder(Protocol):
    """What is asked of a visual tokenizer here; `tokenizer.model.VisualTokenizer` is one. One that takes other sizes than the square
    of `image_size` lists them as `sizes: tuple[(H, W), …]`."""

    @property
    def image_size(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def encode(self, images: Tensor, scale: int = 1) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How shards are encoded. The limits decide what is left out; the batch can only move what fp32 rounds."""

    batch_len: int = 256
    """b: pictures of one size that are encoded at once."""
    max_bad: float = 0.0
    """Share of a shard's documents that may be left out, rounded up to whole documents."""
    limits: Limits = ANY
    """Pictures that are refused."""
    scale: int = 1
    """Of the tokenizer's scales, the one whose codes are written."""


class Coded(NamedTuple):
    """A picture as ids [h · w · M] of its grid (h, w)."""

    grid: tuple[int, int]
    ids: NDArray[np.int64]


class Said(NamedTuple):
    """The texts of a document in the order of `texts_of`: their ids [n] joined, and how many each has."""

    ids: NDArray[np.int32]
    lengths: list[int]


class Batch(NamedTuple):
    """Pictures of one size, uint8 [b, H, W, 3], and which of the shard's they are."""

    places: list[int]
    pictures: NDArray[np.uint8]


class Documents(NamedTuple):
    """What is left of a shard when its pictures are on their way: documents (their pictures emptied), texts, what was left out."""

    documents: list[Document]
    said: list[Said]
    skipped: Skipped


def sizes_of(visual: ImageEncoder) -> tuple[Size, ...]:
    """(H, W) that a visual tokenizer takes."""
    return getattr(visual, "sizes", ()) or ((visual.image_size, visual.image_size),)


def token_document(document: Document, said: Said, pictures: Iterable[Coded]) -> TokenDocument:
    """One document as ids; `pictures` are its own, in order."""
    lengths, coded = iter(said.lengths), iter(pictures)
    kinds = [TEXT if isinstance(part, str) else IMAGE for part in document.parts]
    kinds += [CAPTION] * len(document.captions) + [QUESTION, ANSWER] * len(document.questions)
    spoken = [ROLE * (1 + ROLES.index(role)) for role in document.roles] or [0] * len(kinds)
    grids: list[tuple[int, int]] = []
    sizes: list[int] = []
    pieces: list[NDArray[np.integer]] = []
    first = end = 0  # of the texts since the last picture
    for kind in kinds:
        if kind == IMAGE:
            picture = next(coded)
            pieces += [said.ids[first:end], picture.ids]
            grids.append(picture.grid)
            sizes.append(len(picture.ids))
            first = end
        else:
            grids.append((0, 0))
            sizes.append(next(lengths))
            end += sizes[-1]
    pieces.append(said.ids[first:])
    ids = np.concatenate(pieces, dtype=np.int32, casting="same_kind")
    return TokenDocument(tuple(map(add, kinds, spoken)), tuple(grids), tuple(sizes), ids)


def said_in(documents: Sequence[Document], text: TextTokenizer) -> list[Said]:
    """Texts → ids, those of all documents in one call."""
    texts = [texts_of(document) for document in documents]
    ids = iter(text.encode_all(list(chain.from_iterable(texts))))
    out: list[Said] = []
    for each in texts:
        mine = list(islice(ids, len(each)))
        out.append(Said(np.array(list(chain.from_iterable(mine)), np.int32), list(map(len, mine))))
    return out


# Reading ----------------------------------------------------------------------------------------------------------

def read(source: Path, sizes: Sequence[Size], text: TextTokenizer, how: Encoding) -> Iterator[Batch | Documents]:
    """Batches of one raw shard, each as soon as it is full, and its documents last. A document that is none, or has a picture that is
    refused, is left out whole. Errors: ValueError that names shard, sample and cause, past `how.max_bad`."""
    documents, skipped, pictures, held = list[Document](), Skipped(), 0, 0
    waiting: dict[Size, list[tuple[int, NDArray[np.uint8]]]] = {size: [] for size in sizes}
    for sample in shards.samples(source):
        try:
            document = shards.document_of(sample)
            decoded = [to_array(fitted(part, sizes, how.limits)) for part in document.parts if isinstance(part, bytes)]
        except ValueError as error:
            if not how.max_bad:
                raise ValueError(f"{source}: sample {sample['__key__']}: {error}. Mend it, or set max_bad to go on without") from error
            skipped.refuse(error, str(sample["__key__"]))
            continue
        parts = tuple(part if isinstance(part, str) else b"" for part in document.parts)
        documents.append(Document(document.key, parts, document.captions, document.questions, {}, document.roles))
        for picture in decoded:
            same = waiting[picture.shape[0], picture.shape[1]]
            same.append((pictures, picture))
            pictures, held = pictures + 1, held + 1
            if crowded := held == BUCKETS_HELD * how.batch_len:
                same = max(waiting.values(), key=len)
            if crowded or len(same) == how.batch_len:
                held -= len(same)
                yield _batch(same)
    bad, whole = skipped.causes.total(), len(documents) + skipped.causes.total()
    if bad > math.ceil(how.max_bad * whole):
        raise ValueError(f"{source}: {bad} of {whole} documents are bad, more than max_bad = {how.max_bad:.2%}: {skipped}. "
                         "Mend them or raise max_bad; of this shard nothing was written")
    yield from (_batch(same) for same in waiting.values() if same)
    yield Documents(documents, said_in(documents, text), skipped)


def _batch(same: list[tuple[int, NDArray[np.uint8]]]) -> Batch:
    batch = Batch([place for place, _ in same], np.stack([picture for _, picture in same]))
    same.clear()
    return batch


def ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, made by a thread that stays up to `depth` of them ahead."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, end) for _ in range(depth))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(next, items, end))
                yield item  # type: ignore[misc]
        finally:
            for future in waiting:
                future.cancel()


# Encoding ---------------------------------------------------------------------------------------------------------

def encode_shards(work: Sequence[tuple[Path, Path]], visual: ImageEncoder, text: TextTokenizer, vocab: Vocab, fingerprint: str,
                  how: Encoding) -> Iterator[tuple[int, int]]:
    """Encode raw shards, each into its token shard with an index. Yields (pictures, shards) that were done since the last time."""
    device = next(visual.parameters()).device if isinstance(visual, nn.Module) else torch.device("cpu")
    sizes = sizes_of(visual)
    items = ahead((item for source, _ in work for item in read(source, sizes, text, how)), 3)
    targets = (target for _, target in work)
    coded: dict[int, Coded] = {}
    with ThreadPoolExecutor(1) as thread:
        writing: Future[None] | None = None
        for item in items:
            if isinstance(item, Batch):
                codes = visual.encode(to_tensor(item.pictures, device), how.scale).cpu().numpy()  # [b, M, h, w]
                grid = int(codes.shape[2]), int(codes.shape[3])
                vocab.grid(*grid)  # there must be a token for it
                coded.update(zip(item.places, (Coded(grid, ids) for ids in vocab.image_ids(codes)), strict=True))
                yield len(codes), 0
                continue
            if writing is not None:
                writing.result()
                yield 0, 1
            writing = thread.submit(write, next(targets), item, coded, fingerprint)
            coded = {}
        if writing is not None:
            writing.result()
            yield 0, 1


def write(target: Path, read: Documents, coded: dict[int, Coded], fingerprint: str) -> None:
    """Write a token shard, then its index."""
    tokens: list[TokenDocument] = []
    place = 0
    for document, said in zip(read.documents, read.said, strict=True):
        count = sum(isinstance(part, bytes) for part in document.parts)
        tokens.append(token_document(document, said, [coded[i] for i in range(place, place + count)]))
        place += count
    samples = ({"__key__": document.key, "ids": token.to_bytes()} for document, token in zip(read.documents, tokens, strict=True))
    shards.write_tar(target, samples)
    write_index(target, tokens, fingerprint, read.skipped)
