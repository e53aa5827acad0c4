"""OBELICS: web pages as parallel lists `images` and `texts`, one of the two null at each place (Laurençon et al. 2023,
arXiv:2306.16527, section 3). The pictures are URLs there, so they lie in image shards of one's own."""

from collections.abc import Iterator
from typing import Any

from data.document import Document
from data.formats import rows
from data.formats.album import Album
from data.formats.piece import Piece, Refusal
from data.formats.reading import Reading, listed, said

pieces = rows.pieces


def read(piece: Piece, reading: Reading, album: Album) -> Iterator[Document | Refusal]:
    def make(row: dict[str, Any], name: str) -> Document:
        images, texts = listed(row, "images"), listed(row, "texts")
        if len(images) != len(texts) or any((a is None) == (b is None) for a, b in zip(images, texts, strict=True)):
            raise ValueError("no document: at each place of images and texts one must be null and the other not")
        parts = [said(text, "a text") if image is None else album.take_or_drop(image, name)
                 for image, text in zip(images, texts, strict=True) if image is not None or not _blank(text)]
        if not (left := tuple(part for part in parts if part is not None)):
            raise ValueError("empty document: no text, and no picture that is there")
        return Document("", left)

    yield from rows.documents(piece, make, ("images", "texts"))


def _blank(text: object) -> bool:
    return isinstance(text, str) and not text.strip()
