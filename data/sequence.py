"""How a document becomes the ids a model is trained on.

A *sequence* is one way to train on a document: draw its picture from a caption, describe the picture and answer, read the parts in
order, or hold the conversation. Which one is a hash of seed, sample and epoch (choices.py), never a stream of random numbers.

Grammar, version 2 (h w code grid, M books):

    image        <boi> <grid_HxW> code × h·w·M <eoi>
    draw         <bos> caption image <eos>                          loss on the image and <eos>
    describe     <bos> image text (<user> question <assistant> answer)* <eos>    loss on text, answers and their ends
                 or the text last, as the answer to an empty question, so that answers are read off the picture too
    interleaved  <bos> (text | image)* <eos>                        loss on everything but <grid>
    chat         <bos> (<system> …)? (<user> … <assistant> …)* <eos>    loss on what the assistant says, and on its end

Letters: n ids of a sequence, p parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from data.document import IMAGE, QUESTION, ROLE, ROLES, TEXT, Role, TokenDocument
from data.vocab import Vocab

GRAMMAR_VERSION = 2

DRAW, DESCRIBE, INTERLEAVED, CHAT = range(4)

FRAME = 3
"""Ids of a picture beside its codes: <boi> <grid> … <eoi>."""

Ids = Sequence[int] | NDArray[np.integer]


@dataclass(frozen=True)
class TokenSequence:
    """Ids [n] of one document and, for each, the loss weight of *predicting it* (0 for the first)."""

    ids: NDArray[np.int64]
    loss_weight: NDArray[np.float32]

    def __getitem__(self, piece: slice) -> "TokenSequence":
        return TokenSequence(self.ids[piece], self.loss_weight[piece])


class Writer:
    """Collects pieces of a sequence."""

    def __init__(self, vocab: Vocab) -> None:
        self.vocab, self._ids, self._weights = vocab, list[Ids](), list[tuple[float, int]]()
        self.add([vocab.bos], 0)

    def add(self, ids: Ids, weight: float) -> None:
        self._ids.append(ids)
        self._weights.append((weight, len(ids)))

    def image(self, codes: Ids, grid: tuple[int, int], weight: float, boi_weight: float) -> None:
        """The grid token is the asker's to give: never trained on."""
        vocab = self.vocab
        self.add([vocab.boi], boi_weight)
        self.add([vocab.grid(*grid)], 0)
        self.add(codes, weight)
        self.add([vocab.eoi], weight)

    def part(self, doc: TokenDocument, number: int, weight: float) -> None:
        """A text, or a picture with its frame."""
        if doc.kinds[number] % ROLE == IMAGE:
            self.image(doc.part(number), doc.grids[number], weight, boi_weight=weight)
        else:
            self.add(doc.part(number), weight)

    def done(self, eos_weight: float = 1) -> TokenSequence:
        self.add([self.vocab.eos], eos_weight)
        weights, counts = zip(*self._weights, strict=True)
        return TokenSequence(np.concatenate(self._ids, dtype=np.int64, casting="unsafe"), np.repeat(np.array(weights, np.float32), counts))


def draw(doc: TokenDocument, caption: int | None, vocab: Vocab, given: float = 0) -> TokenSequence:
    """Text → image. `caption` is the number of the part that is the prompt; None drops it, for guidance. `given`: weight of the prompt."""
    image = doc.kinds.index(IMAGE)
    out = Writer(vocab)
    if caption is not None:
        out.add(doc.part(caption), given)
    out.image(doc.part(image), doc.grids[image], 1, boi_weight=given)
    return out.done()


def describe(doc: TokenDocument, order: Sequence[int], text_first: bool, vocab: Vocab, given: float = 0, answers: float = 1
             ) -> TokenSequence:
    """Image → text and the questions in `order` (numbers 0 …) with their answers; the text directly behind the image, or last as
    the answer to an empty question. `given`: weight of the picture; `answers`: of answers to questions."""
    image, text = doc.kinds.index(IMAGE), doc.kinds.index(TEXT)
    questions = [number for number, kind in enumerate(doc.kinds) if kind == QUESTION]
    turns = [(doc.part(questions[number]), doc.part(questions[number] + 1)) for number in order]
    if not text_first:
        turns.append((doc.part(text)[:0], doc.part(text)))
    out = Writer(vocab)
    out.image(doc.part(image), doc.grids[image], given, boi_weight=given)
    if text_first:
        out.add(doc.part(text), 1)
    for number, (question, answer) in enumerate(turns):
        out.add([vocab.user], text_first or number > 0)  # the end of what came before: the description or an answer
        out.add(question, 0)
        out.add([vocab.assistant], 0)
        out.add(answer, answers if len(question) else 1)
    return out.done()


def interleaved(doc: TokenDocument, vocab: Vocab) -> TokenSequence:
    """Parts in reading order."""
    out = Writer(vocab)
    for number in range(len(doc.kinds)):
        out.part(doc, number, 1)
    return out.done()


def chat(doc: TokenDocument, vocab: Vocab) -> TokenSequence:
    """A conversation: each turn behind its role's token. The token that ends an assistant's turn, the next <user> or <eos>, is learned."""
    out = Writer(vocab)
    names = {"system": vocab.system, "user": vocab.user, "assistant": vocab.assistant}
    spoke: Role | None = None
    for role, parts in turns(doc):
        out.add([names[role]], role == "user" and spoke == "assistant")
        for number in parts:
            out.part(doc, number, role == "assistant")
        spoke = role
    return out.done()


def turns(doc: TokenDocument) -> list[tuple[Role, list[int]]]:
    """Who says which parts, turn by turn."""
    return [(ROLES[spoken - 1], list(numbers)) for spoken, numbers in
            groupby(range(len(doc.kinds)), lambda number: doc.kinds[number] // ROLE)]


# Sequences longer than a row --------------------------------------------------------------------------------------

def pieces(kinds: Sequence[int], lengths: Sequence[int], task: int, row_len: int) -> list[tuple[int, int]]:
    """Where the sequence of a document is cut so that no piece is longer than a row: [(first id, end), …].

    What is read in order is cut where a part ends, or in a text that is longer than a row itself; a conversation before a <user>; a
    picture never, nor what is drawn or described. Empty where there is no such cut."""
    if task in (DRAW, DESCRIBE):
        return []
    borders, inside, at, spoke = [0], list[tuple[int, int]](), 1, 0
    for kind, length in zip(kinds, lengths, strict=True):
        role, kind = divmod(kind, ROLE)
        if task == INTERLEAVED and at > 1:
            borders.append(at)
        if role != spoke:
            if role == 2 and spoke == 3:  # a user behind an assistant
                borders.append(at)
            at, spoke = at + 1, role
        if task == INTERLEAVED and kind == TEXT:
            inside.append((at, at + length))
        at += length + (FRAME if kind == IMAGE else 0)
    whole, out, first = at + 1, list[tuple[int, int]](), 0
    while whole - first > row_len:
        end = max((border for border in borders if first < border <= first + row_len), default=first)
        if end == first:
            end = first + row_len
            if not any(a < end < b for a, b in inside):
                return []
        out.append((first, end))
        first = end
    return [*out, (first, whole)]
