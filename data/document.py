"""An interleaved document of text and pictures, and how it becomes the ids a model is trained on.

A *document* holds what was said and shown: parts in order, other captions of its picture, questions with answers.
A *sequence* is one way to train on it: draw the picture from a caption, describe the picture and answer, or read the
parts in order. Which one is a hash of seed, sample and epoch, never a stream of random numbers, so that any rank can
build sequence i without building the others.

Grammar, version 1 (h w code grid, M books):

    image        <boi> <grid_HxW> code × h·w·M <eoi>
    draw         <bos> caption image <eos>                          loss on the image and <eos>
    describe     <bos> image text (<user> question <assistant> answer)* <eos>    loss on text, answers and their ends
                 or the text last, as the answer to an empty question, so that answers are read off the picture too
    interleaved  <bos> (text | image)* <eos>                        loss on everything but <grid>

Letters: n ids of a sequence, p parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data.vocab import Vocab

GRAMMAR_VERSION = 1

Kind = Literal["text", "image", "caption", "question", "answer"]
KINDS: tuple[Kind, ...] = ("text", "image", "caption", "question", "answer")
TEXT, IMAGE, CAPTION, QUESTION, ANSWER = range(5)

DRAW, DESCRIBE, INTERLEAVED = range(3)


@dataclass(frozen=True)
class Document:
    """A raw document: texts and encoded pictures in order, as in a shard."""

    key: str
    """Name of the sample; unique in its set of shards, without a dot."""
    parts: tuple[str | bytes, ...]
    """Text (str) and picture files (bytes) in reading order."""
    captions: tuple[str, ...] = ()
    """Other texts that describe the picture, for a document with one picture."""
    questions: tuple[tuple[str, str], ...] = ()
    """Questions about the picture, with answers."""
    meta: dict[str, object] = field(default_factory=dict[str, object])
    """What evaluation wants to know (the scene that was drawn)."""


def texts_of(document: Document) -> tuple[str, ...]:
    """Everything said in a document."""
    return (*(part for part in document.parts if isinstance(part, str)), *document.captions,
            *(words for pair in document.questions for words in pair))


@dataclass(frozen=True)
class TokenDocument:
    """A document as ids: one array and the kinds and lengths of its parts, in order."""

    kinds: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    """(h, w) of image parts, (0, 0) of others."""
    lengths: tuple[int, ...]
    ids: NDArray[np.int32]

    def __post_init__(self) -> None:
        assert len(self.kinds) == len(self.grids) == len(self.lengths) and sum(self.lengths) == len(self.ids)

    def part(self, number: int) -> NDArray[np.int32]:
        first = sum(self.lengths[:number])
        return self.ids[first:first + self.lengths[number]]

    def to_bytes(self) -> bytes:
        """int32 little-endian: p, then (kind, h, w, length) of each part, then the ids."""
        head = [len(self.kinds)]
        for kind, (h, w), length in zip(self.kinds, self.grids, self.lengths, strict=True):
            head += [kind, h, w, length]
        return np.concatenate([np.array(head, "<i4"), self.ids.astype("<i4")]).tobytes()

    @classmethod
    def from_bytes(cls, payload: bytes | memoryview) -> "TokenDocument":
        array = np.frombuffer(payload, "<i4")
        count = int(array[0])
        table = array[1:1 + 4 * count].reshape(count, 4).tolist()
        return cls(kinds=tuple(row[0] for row in table), grids=tuple((row[1], row[2]) for row in table),
                   lengths=tuple(row[3] for row in table), ids=array[1 + 4 * count:])


# Per-sample decisions ---------------------------------------------------------------------------------------------

def uniform(seed: int, key_hash: NDArray[np.uint64], epoch: int, salt: int) -> NDArray[np.float64]:
    """A number in [0, 1) a sample: SplitMix64 (Steele et al. 2014, OOPSLA, figure 17) of (seed, key, epoch, salt)."""
    mix = (seed * 0x9E3779B97F4A7C15 + epoch * 0xD1B54A32D192ED03 + salt * 0x8CB92BA72F3D8DD7) % 2**64
    with np.errstate(over="ignore"):
        z = key_hash ^ np.uint64(mix)
        for _ in range(2):
            z = z + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) / 2**53


# Sequences --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class TokenSequence:
    """Ids [n] of one document and, for each, the loss weight of *predicting it* (0 for the first)."""

    ids: NDArray[np.int64]
    loss_weight: NDArray[np.float32]


class _Writer:
    """Collects pieces of a sequence."""

    def __init__(self, vocab: Vocab) -> None:
        self.vocab, self.ids, self.weights = vocab, list[int](), list[float]()

    def add(self, ids: Sequence[int] | NDArray[np.int32], weight: float) -> None:
        self.ids += list(ids)
        self.weights += [weight] * len(ids)

    def image(self, codes: NDArray[np.int32], grid: tuple[int, int], weight: float, boi_weight: float) -> None:
        """The grid token is the asker's to give: never trained on."""
        vocab = self.vocab
        self.add([vocab.boi], boi_weight)
        self.add([vocab.grid(*grid)], 0.0)
        self.add(codes, weight)
        self.add([vocab.eoi], weight)

    def done(self) -> TokenSequence:
        return TokenSequence(np.array(self.ids, np.int64), np.array(self.weights, np.float32))


def image_length(codes: int) -> int:
    """Ids of a picture with its frame: <boi> <grid> codes <eoi>."""
    return codes + 3


def draw(doc: TokenDocument, caption: int | None, vocab: Vocab) -> TokenSequence:
    """Text → image. `caption` is the number of the part that is the prompt; None drops it, for guidance."""
    image = doc.kinds.index(IMAGE)
    out = _Writer(vocab)
    out.add([vocab.bos], 0)
    if caption is not None:
        out.add(doc.part(caption), 0)
    out.image(doc.part(image), doc.grids[image], 1, boi_weight=0)
    out.add([vocab.eos], 1)
    return out.done()


def describe(doc: TokenDocument, order: Sequence[int], text_first: bool, vocab: Vocab) -> TokenSequence:
    """Image → text and the questions in `order` (numbers 0 …) with their answers; the text directly behind the image, or last as
    the answer to an empty question."""
    image, text = doc.kinds.index(IMAGE), doc.kinds.index(TEXT)
    questions = [number for number, kind in enumerate(doc.kinds) if kind == QUESTION]
    turns = [(doc.part(questions[number]), doc.part(questions[number] + 1)) for number in order]
    if not text_first:
        turns.append((doc.part(text)[:0], doc.part(text)))
    out = _Writer(vocab)
    out.add([vocab.bos], 0)
    out.image(doc.part(image), doc.grids[image], 0, boi_weight=0)
    if text_first:
        out.add(doc.part(text), 1)
    for number, (question, answer) in enumerate(turns):
        out.add([vocab.user], float(text_first or number > 0))  # the end of what came before: the description or an answer
        out.add(question, 0)
        out.add([vocab.assistant], 0)
        out.add(answer, 1)
    out.add([vocab.eos], 1)
    return out.done()


def interleaved(doc: TokenDocument, vocab: Vocab) -> TokenSequence:
    """Parts in reading order."""
    out = _Writer(vocab)
    out.add([vocab.bos], 0)
    for number, (kind, grid) in enumerate(zip(doc.kinds, doc.grids, strict=True)):
        if kind == IMAGE:
            out.image(doc.part(number), grid, 1, boi_weight=1)
        elif kind == TEXT:
            out.add(doc.part(number), 1)
    out.add([vocab.eos], 1)
    return out.done()
