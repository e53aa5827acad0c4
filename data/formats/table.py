"""Rows of a picture and its caption: parquet with image bytes (Hugging Face datasets), jsonl with paths or URLs."""

from collections.abc import Iterator
from typing import Any

from data.document import Document
from data.formats import rows
from data.formats.album import Album
from data.formats.piece import Piece, Refusal
from data.formats.reading import Reading, chosen, said

COLUMNS = {"image": ("image", "img", "jpg", "png", "webp", "picture", "image_path", "file_name", "image_bytes", "url"),
           "text": ("text", "caption", "txt", "prompt", "description", "alt", "TEXT")}

pieces = rows.pieces


def read(piece: Piece, reading: Reading, album: Album) -> Iterator[Document | Refusal]:
    found = chosen(reading, rows.names(piece.path), COLUMNS, piece.within)

    def make(row: dict[str, Any], name: str) -> Document:
        value, words = row.get(found["image"]), row.get(found["text"])
        if value is None:
            raise ValueError("caption without a picture")
        if words is None or (isinstance(words, str) and not words.strip()):
            raise ValueError("picture without a caption")
        if isinstance(words, list):  # COCO's five
            first, *others = dict.fromkeys(said(each, "a caption") for each in words)
            return Document("", (album.take(value), first), tuple(others))
        return Document("", (album.take(value), said(words, found["text"])))

    yield from rows.documents(piece, make, tuple(found.values()))
