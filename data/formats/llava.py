"""LLaVA's conversations: `conversations: [{"from": "human", "value": "<image>\\nWhat is it?"}, …]` and `image`, a path or several
(Liu et al. 2023, arXiv:2304.08485). Each `<image>` is the next picture."""

from collections.abc import Iterator
from typing import Any

from data.document import Document, Role
from data.formats import rows
from data.formats.album import Album
from data.formats.piece import Piece, Refusal
from data.formats.reading import Reading, listed
from data.formats.turns import conversation, named, role_of

PLACE = "<image>"

pieces = rows.pieces


def read(piece: Piece, reading: Reading, album: Album) -> Iterator[Document | Refusal]:
    def make(row: dict[str, Any], name: str) -> Document:
        pictures = row.get("image") if row.get("image") is not None else row.get("images")
        pictures = pictures if isinstance(pictures, list) else [] if pictures is None else [pictures]
        turns = list[tuple[Role, str]]()
        if isinstance(row.get("system"), str) and row["system"].strip():
            turns.append(("system", row["system"]))
        for turn in listed(row, "conversations"):
            if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
                raise ValueError(f"no conversation: a turn is {str(turn)[:60]}, without from and value")
            turns.append((role_of(turn.get("from")), turn["value"]))
        places = sum(words.count(PLACE) for _, words in turns)
        if places != len(pictures):
            raise ValueError(f"{PLACE} count: {places} places for {len(pictures)} pictures")
        files = iter([album.take(picture) for picture in pictures])
        return conversation(((role, _parts(words, files)) for role, words in turns), named(row, "id"))

    yield from rows.documents(piece, make)


def _parts(words: str, files: Iterator[bytes]) -> list[str | bytes]:
    """Texts and pictures of a turn; blanks beside a picture belong to the placeholder."""
    first, *others = words.split(PLACE)
    parts: list[str | bytes] = [first.strip()]
    for text in others:
        parts += [next(files), text.strip()]
    return parts
