"""An interleaved document of text and pictures: what was said and shown.

Parts lie in reading order, beside them other captions of a picture, questions with answers, or who says what. `Document` is the raw
form, `TokenDocument` the same as ids. How a model is trained on one is a matter of sequence.py.

Letters: n ids, p parts.
"""

from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["text", "image", "caption", "question", "answer"]
KINDS: tuple[Kind, ...] = ("text", "image", "caption", "question", "answer")
TEXT, IMAGE, CAPTION, QUESTION, ANSWER = range(5)

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
ROLE = 8
"""A part of a conversation has kind + ROLE × (1 for the system, 2 for the user, 3 for the assistant)."""


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
    roles: tuple[Role, ...] = ()
    """Who says each part of a conversation; empty for a document that nobody speaks."""


def check_roles(document: Document) -> None:
    """Errors: ValueError "conversation: …" unless user and assistant take turns, the user first and the assistant last, behind at
    most one turn of the system; neighbouring parts of one role are one turn."""
    roles = document.roles
    if not roles:
        return
    if len(roles) != len(document.parts):
        raise ValueError(f"conversation: {len(roles)} roles for {len(document.parts)} parts")
    if unknown := set(roles) - set(ROLES):
        raise ValueError(f"conversation: role {min(map(str, unknown))!r} is none of {', '.join(ROLES)}")
    turns = [role for role, _ in groupby(roles)]
    spoken = turns[turns[0] == "system":]
    if len(spoken) % 2 or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)) or not spoken:
        raise ValueError(f"conversation: turns are {', '.join(turns[:6])}{', …' if len(turns) > 6 else ''}: user and assistant alternate, "
                         "the user begins and the assistant ends; the system speaks first or not at all")
    if document.captions or document.questions:
        raise ValueError("conversation: captions and questions belong to pictures, not to conversations")


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
        """Errors: ValueError for bytes that are none."""
        array = np.frombuffer(payload, "<i4")
        count = int(array[0]) if len(array) else -1
        if not 0 <= count <= len(array) // 4 or int(array[4:1 + 4 * count:4].sum(dtype=np.int64)) != len(array) - 1 - 4 * count:
            raise ValueError(f"{len(payload)} bytes are no token document")
        table = array[1:1 + 4 * count].reshape(count, 4).tolist()
        return cls(kinds=tuple(row[0] for row in table), grids=tuple((row[1], row[2]) for row in table),
                   lengths=tuple(row[3] for row in table), ids=array[1 + 4 * count:])
